"""Masses from the page scores: the residual's for the completion ``paged``, twin of ``reference.unread_log_mass``, and
that of all pages for the group rule ``share``, as in ``reference.reduce_group``.

The mass of all pages of the mid region, summed while they were scored, minus that of the retrieved ones. Both sums are
of the same rounded numbers. Where the retrieved pages hold nearly all of it, the difference of two float32 is uncertain
by a millionth of the whole, and the output by as little.

Everything in base 2.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.reference.select import SHARE_WEIGHT

SMALLEST_SHARE = tl.constexpr(1e-6)
WEIGHT = tl.constexpr(SHARE_WEIGHT)


@triton.jit
def add_masses(m, total, more_m, more_total):
    """Maximum and sum of what two maxima and sums of powers of two are of: to reduce both at once."""
    new_m = tl.maximum(m, more_m)
    return new_m, total * tl.exp2(m - finite(new_m)) + more_total * tl.exp2(more_m - finite(new_m))


@triton.jit
def page_scores(chosen, head_scores, first, last, S: tl.constexpr, PAGES: tl.constexpr):
    """Scores of the retrieved pages ``[first, first + PAGES)``, as far as they are before ``last``: float16
    ``[merge_rows, PAGES]``.

    Args:
        chosen: int32, places in the mid region of the retrieved pages.
        head_scores: float16 ``[pages, group]``.
    """
    heads = tl.arange(0, S.merge_rows)
    i = first + tl.arange(0, PAGES)
    place = tl.load(chosen + i, mask=i < last, other=0)
    # .cg: written by other programs of this launch, so the first-level cache may not answer.
    return tl.load(
        head_scores + place[None, :] * S.group + heads[:, None],
        mask=(i < last)[None, :] & (heads < S.group)[:, None],
        other=float("-inf"),
        cache_modifier=".cg",
    )


@triton.jit
def retrieved_mass(scores, chosen, head_scores, first, last, S: tl.constexpr, PAGES: tl.constexpr):
    """Maximum and sum of the scores of the retrieved pages ``[first, last)``, without the factor page_size: float32
    ``[merge_rows]`` each. ``scores`` are those that ``page_scores`` gives first."""
    m, total = _mass(scores)
    for start in range(first + PAGES, last, PAGES):
        more_m, more = _mass(page_scores(chosen, head_scores, start, last, S, PAGES))
        m, total = add_masses(m, total, more_m, more)
    return m, total


@triton.jit
def _mass(scores):
    """Maximum and sum of each row."""
    scores = scores.to(tl.float32)
    return tl.reduce((scores, tl.where(scores == float("-inf"), 0.0, 1.0)), 1, add_masses)


@triton.jit
def scored_masses(masses, scorers, S: tl.constexpr, MASSES: tl.constexpr, HEADS: tl.constexpr):
    """Maximum and sum of the scores of the pages of each program that scored: float32 ``[MASSES, HEADS]`` each.

    Args:
        masses: float32 ``[scorers, 2, block_n]``, from ``score.score_pages``.
    """
    N: tl.constexpr = S.block_n
    i, heads = tl.arange(0, MASSES), tl.arange(0, HEADS)
    at = masses + i[:, None] * (2 * N) + heads[None, :]
    real = (i < scorers)[:, None] & (heads < S.group)[None, :]
    m = tl.load(at, mask=real, other=float("-inf"), cache_modifier=".cg")
    return m, tl.load(at + N, mask=real, other=0.0, cache_modifier=".cg")


@triton.jit
def _total(scored_m, scored):
    """Maximum and sum of the scores of all pages: float32 ``[heads]`` each."""
    m = tl.max(scored_m, 0)
    return m, tl.sum(scored * tl.exp2(scored_m - finite(m)[None, :]), 0)


@triton.jit
def head_offsets(masses, scorers, S: tl.constexpr, MASSES: tl.constexpr):
    """What the group rule ``share`` takes off each query head's scores: float32 ``[block_n]``, finite."""
    N: tl.constexpr = S.block_n
    m, total = _total(*scored_masses(masses, scorers, S, MASSES, N))
    # Ends in a sum: a product could be contracted with the subtraction from the scores at one place and not at another,
    # and both levels of the selection must make the same key.
    return WEIGHT * finite(m) + WEIGHT * tl.log2(tl.where(total > 0, total, 1.0))


@triton.jit
def unread_log_mass(scored_m, scored, retrieved_m, retrieved, S: tl.constexpr):
    """The residual's log-mass ``[merge_rows]`` from ``scored_masses`` and the sum of all ``retrieved_mass``."""
    g: tl.constexpr = S.geometry
    all_m, total = _total(scored_m, scored)
    all_m = finite(all_m)
    rest = total - retrieved * tl.exp2(retrieved_m - all_m)
    rest = tl.maximum(rest, total * SMALLEST_SHARE)
    return all_m + tl.log2(rest) + tl.log2(tl.full([], g.page_size, tl.float32))


@triton.jit
def finite(maximum):
    """A maximum to subtract: of nothing, zero."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
