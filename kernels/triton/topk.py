"""The k largest of n keys by one program, exact and deterministic: ties go to the earlier key.

Scores are compared as integers: a float32's bits, with the negative numbers turned around, have the order of the
numbers. The threshold is then found digit by digit from the top (radix select), counting in registers; the search
ends as soon as exactly k keys are left.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
DIGITS = tl.constexpr(4)  # tried at a time: two bits


@triton.jit
def ordered_key(score):
    """int32 of the same order as the float32 score."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: a negative zero is a zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load(keys, groups, start, n, limit, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Positions in ``keys`` and keys of elements ``[start, start + BLOCK)`` of the ``n`` that take part.

    With GROUP > 1 they are the members of the listed groups, GROUP neighbours each; ``limit`` keys exist.
    """
    i = start + tl.arange(0, BLOCK)
    if GROUP > 1:
        index = tl.load(groups + i // GROUP, mask=i < n, other=0) * GROUP + i % GROUP
    else:
        index = i
    # .cg: written by other programs of this launch, so the first-level cache may not answer.
    return index, tl.load(keys + index, mask=(i < n) & (index < limit), other=LOWEST, cache_modifier=".cg")


@triton.jit
def threshold(keys, groups, n, limit, k, GROUP: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """The largest t with at least k keys >= t, or any t with exactly k; and the number of keys > t."""
    if SINGLE:
        _, x = _load(keys, groups, 0, n, limit, GROUP, BLOCK)
    digits = tl.arange(0, DIGITS)
    t = tl.full([], LOWEST, tl.int32)
    reached = tl.full([], 2**30, tl.int32)
    shift = 30
    while (shift >= 0) & (reached != k):
        candidates = t + (digits << shift)
        if SINGLE:
            counts = tl.sum((x[:, None] >= candidates[None, :]).to(tl.int32), 0)
        else:
            counts = tl.zeros([DIGITS], tl.int32)
            for start in range(0, n, BLOCK):
                _, y = _load(keys, groups, start, n, limit, GROUP, BLOCK)
                counts += tl.sum((y[:, None] >= candidates[None, :]).to(tl.int32), 0)
        # Counts fall with the digit. Digit 0 is the threshold so far, which always reaches k.
        enough = (counts >= k) | (digits == 0)
        t += (tl.sum(enough.to(tl.int32), 0) - 1) << shift
        reached = tl.min(tl.where(enough, counts, 2**30), 0)
        shift -= 2
    if SINGLE:
        above = tl.sum((x > t).to(tl.int32), 0)
    else:
        above = tl.full([], 0, tl.int32)
        for start in range(0, n, BLOCK):
            _, y = _load(keys, groups, start, n, limit, GROUP, BLOCK)
            above += tl.sum((y > t).to(tl.int32), 0)
    return t, above


@triton.jit
def chosen(x, t, ties_left):
    """Which of the keys in this block are among the k, where they go, and how many were above and equal.

    ``ties_left`` keys equal to the threshold may still be taken.
    """
    is_above, is_equal = (x > t).to(tl.int32), (x == t).to(tl.int32)
    running = tl.cumsum(is_above + (is_equal << 16), 0)  # two counts of less than 2^15 in one scan
    above, equal = running & 0xFFFF, running >> 16
    take = (x > t) | ((x == t) & (equal <= ties_left))
    return take, above + tl.minimum(equal, ties_left) - 1, tl.max(above, 0), tl.max(equal, 0)
