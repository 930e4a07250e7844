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
    UNKNOWN,
    bounds,
    bounds_in_memory,
    load_keys,
    running_counts,
    threshold,
    threshold_in_memory,
)


@triton.jit
def _place(position, x, t, ties, base, first, last, out):
    """Write the positions of what is above t, and of the first ``ties`` keys equal to it, to ``out`` from ``base`` on,
    as far as they fall into places ``[first, last)``.

    Returns how many keys up to each are above t, and how many equal it.
    """
    above, equal = running_counts(x, t)
    place = base + above + tl.minimum(equal, ties) - 1
    take = ((x > t) | ((x == t) & (equal <= ties))) & (place >= first) & (place < last)
    tl.store(out + place, position, mask=take)
    return above, equal


@triton.jit
def _top(
    keys,
    offsets,
    groups,
    listed,
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
):
    """Ranks ``[first, last)``, in order of position, of the k largest of n keys: their positions to ``out``.

    Args:
        low, high: bounds of the keys that may be among the k best, where they are ``listed``.

    Returns:
        Such bounds, narrower.
    """
    reached = tl.full([], UNKNOWN, tl.int32)
    if SINGLE:
        index, x = load_keys(keys, offsets, groups, listed, 0, n, limit, S, GROUP, BLOCK)
        if not listed:
            low, high = bounds(x)
            reached = n
        t, ties = threshold(x, k, low, high, reached)
        _place(index, x, t, ties, 0, first, last, out)
    else:
        if not listed:
            low, high = bounds_in_memory(keys, offsets, groups, listed, n, limit, S, GROUP, BLOCK)
            reached = n
        t, ties = threshold_in_memory(
            keys, offsets, groups, listed, n, limit, k, low, high, reached, S, GROUP, BLOCK
        )
        base = 0
        for start in range(0, n, BLOCK):
            index, x = load_keys(keys, offsets, groups, listed, start, n, limit, S, GROUP, BLOCK)
            above, equal = _place(index, x, t, ties, base, first, last, out)
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
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Ranks ``[first, last)`` (ascending in the sequence) of the k best of ``pages`` scored pages.

    Args:
        keys, maxima, masses: from ``score_pages``; with the group rule ``share`` the keys are its ``head_scores``. The
            masses of ``scorers`` programs are looked at with that rule only.
        groups: int32 ``[k]`` scratch of this program.
        chosen: int32 ``[k]`` out: places in the mid region.
        BLOCK, SINGLE: keys looked at at a time, and whether that is all of a level.
    """
    offsets = None
    if S.by_share:
        offsets = head_offsets(masses, scorers, S, MASSES)
    n_groups = tl.cdiv(pages, GROUP)
    nested = (GROUP > 1) & (n_groups > k)
    level_0 = 1
    if GROUP > 1:
        level_0 = tl.where(nested, 0, 1)
    low, high = tl.full([], LOWEST, tl.int32), tl.full([], HIGHEST, tl.int32)
    # Both levels by the same instructions: fetching them for the first time takes longer than executing them.
    for level in range(level_0, 2):
        source, n, begin, end, out = keys, pages, first, last, chosen
        if GROUP > 1:
            if level == 0:
                source, n, begin, end, out = maxima, n_groups, 0, k, groups
        limit, listed = n, nested & (level == 1)
        if listed:
            n = k * GROUP
        low, high = _top(
            source, offsets, groups, listed, n, limit, k, low, high, begin, end, out, S, GROUP, BLOCK, SINGLE
        )
        tl.debug_barrier()  # what this program wrote it reads next
