"""The Top-K pages of a (row, KV head) from their keys: twin of ``reference.select_pages``.

Each of the programs that attend to a (row, head)'s tokens finds the same threshold and takes its own share of the
ranks, which spares them waiting for one that does it for all. For long contexts the selection is exact in two levels:
the k groups of neighbouring pages with the largest maxima contain the k best pages (a page outside them is beaten by k
pages), so it looks at the maxima and then only at the pages of k groups. That holds for keys made of several heads'
scores, too: the largest key of a group is that of its heads' maxima.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.mass import head_offsets
from vllm_rc_backend.kernels.triton.topk import (
    HIGHEST,
    LOWEST,
    load_keys,
    running_counts,
    threshold,
    threshold_in_memory,
)


@triton.jit
def _place(position, x, real, t, ties, base, first, last, out):
    """Write the positions of what is above t, and of the first ``ties`` keys equal to it, to ``out`` from ``base`` on,
    as far as they fall into places ``[first, last)``.

    Returns how many keys up to each are above t, and how many equal it.
    """
    above, equal = running_counts(x, t)
    place = base + above + tl.minimum(equal, ties) - 1
    take = real & ((x > t) | ((x == t) & (equal <= ties))) & (place >= first) & (place < last)
    tl.store(out + place, position, mask=take)
    return above, equal


@triton.jit
def _top(
    keys,
    offsets,
    groups,
    n,
    limit,
    k,
    low,
    high,
    first,
    last,
    out,
    S: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Ranks ``[first, last)``, in order of position, of the k largest of n keys: their positions to ``out``.

    Returns bounds of the keys that may still be among the k best.
    """
    if SINGLE:
        index, x, real = load_keys(keys, offsets, groups, 0, n, limit, S, GROUP, BLOCK)
        if not FINAL or GROUP == 1:
            low = tl.min(tl.where(real, x, HIGHEST), 0)
            high = tl.max(x, 0) + 1
        t = threshold(x, k, low, high)
        ties = k - tl.sum((x > t).to(tl.int32), 0)
        _place(index, x, real, t, ties, 0, first, last, out)
    else:
        t, all_above = threshold_in_memory(keys, offsets, groups, n, limit, k, low, high, S, GROUP, BLOCK)
        ties, base = k - all_above, 0
        for start in range(0, n, BLOCK):
            index, x, real = load_keys(keys, offsets, groups, start, n, limit, S, GROUP, BLOCK)
            above, equal = _place(index, x, real, t, ties, base, first, last, out)
            used = tl.minimum(tl.max(equal, 0), ties)
            base += tl.max(above, 0) + used
            ties -= used
    return t, high


@triton.jit
def choose_pages(
    keys,
    maxima,
    masses,
    scorers,
    groups,
    chosen,
    pages,
    k,
    first,
    last,
    S: tl.constexpr,
    MASSES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Ranks ``[first, last)`` (ascending in the sequence) of the k best of ``pages`` scored pages.

    Args:
        keys, maxima, masses: from ``score_pages``; with the group rule ``share`` the keys are its ``head_scores``. The
            masses of ``scorers`` programs are looked at with that rule only.
        groups: int32 ``[k]`` scratch of this program.
        chosen: int32 ``[k]`` out: places in the mid region.
    """
    low, high = tl.full([], LOWEST, tl.int32), tl.full([], HIGHEST, tl.int32)
    n = pages
    offsets = None
    if S.by_share:
        offsets = head_offsets(masses, scorers, S, MASSES)
    if GROUP > 1:
        n_groups = tl.cdiv(pages, GROUP)
        if n_groups > k:
            low, high = _top(
                maxima,
                offsets,
                maxima,
                n_groups,
                n_groups,
                k,
                low,
                high,
                0,
                k,
                groups,
                S,
                1,
                BLOCKS[0][0],
                BLOCKS[0][1],
                False,
            )
        else:
            for start in range(0, n_groups, BLOCKS[0][0]):
                i = start + tl.arange(0, BLOCKS[0][0])
                tl.store(groups + i, i, mask=i < n_groups)
        tl.debug_barrier()
        n = tl.minimum(n_groups, k) * GROUP
    _top(
        keys,
        offsets,
        groups,
        n,
        pages,
        k,
        low,
        high,
        first,
        last,
        chosen,
        S,
        GROUP,
        BLOCKS[1][0],
        BLOCKS[1][1],
        True,
    )
    tl.debug_barrier()  # what this program wrote it reads next
