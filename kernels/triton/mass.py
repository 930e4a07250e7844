"""The residual's mass from the page scores, for the completion ``paged``: twin of ``reference.unread_log_mass``.

The mass of all pages of the mid region, summed while they were scored, minus that of the retrieved ones. Both sums are
of the same rounded numbers. Where the retrieved pages hold nearly all of it, the difference of two float32 is uncertain
by a millionth of the whole, and the output by as little.

Everything in base 2.
"""

import triton
import triton.language as tl

SMALLEST_SHARE = tl.constexpr(1e-6)


@triton.jit
def retrieved_mass(chosen, head_scores, first, last, S: tl.constexpr):
    """Maximum and sum of the scores of retrieved pages, without the factor page_size: float32 ``[block_m]`` each.

    Args:
        chosen: int32, places in the mid region of the retrieved pages, of which ``[first, last)`` count.
        head_scores: float16 ``[pages, group]``.
    """
    M: tl.constexpr = S.block_m  # Triton 3.6 takes no plain int in a shape
    heads = tl.arange(0, M)
    step = tl.arange(0, 32)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(first, last, 32):
        real = start + step < last
        place = tl.load(chosen + start + step, mask=real, other=0)
        # .cg: written by other programs of this launch, so the first-level cache may not answer.
        x = tl.load(
            head_scores + place[None, :] * S.group + heads[:, None],
            mask=real[None, :] & (heads < S.group)[:, None],
            other=float("-inf"),
            cache_modifier=".cg",
        ).to(tl.float32)
        new_m = tl.maximum(m, tl.max(x, 1))
        finite = tl.where(new_m == float("-inf"), 0.0, new_m)
        total = total * tl.exp2(m - finite) + tl.sum(tl.exp2(x - finite[:, None]), 1)
        m = new_m
    return m, total


@triton.jit
def unread_log_mass(masses, scorers, retrieved_m, retrieved, S: tl.constexpr, MASSES: tl.constexpr):
    """The residual's log-mass: float32 ``[merge_rows]``.

    Args:
        masses: float32 ``[scorers, 2, block_n]``, from ``score.score_pages``.
        retrieved_m, retrieved: maximum and sum of ``retrieved_mass`` over all retrieved pages, ``[merge_rows]``.
    """
    g: tl.constexpr = S.geometry
    R: tl.constexpr = S.merge_rows
    heads = tl.arange(0, R)
    m = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    for start in range(0, scorers, MASSES):
        i = start + tl.arange(0, MASSES)
        at = masses + i[:, None] * (2 * S.block_n) + heads[None, :]
        real = (i < scorers)[:, None] & (heads < S.group)[None, :]
        part_m = tl.load(at, mask=real, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(at + S.block_n, mask=real, other=0.0, cache_modifier=".cg")
        new_m = tl.maximum(m, tl.max(part_m, 0))
        finite = tl.where(new_m == float("-inf"), 0.0, new_m)
        total = total * tl.exp2(m - finite) + tl.sum(part * tl.exp2(part_m - finite[None, :]), 0)
        m = new_m
    finite = tl.where(m == float("-inf"), 0.0, m)
    rest = total - retrieved * tl.exp2(retrieved_m - finite)
    rest = tl.maximum(rest, total * SMALLEST_SHARE)
    return m + tl.log2(tl.where(total > 0, rest, 1.0)) + tl.log2(tl.full([], g.page_size, tl.float32))
