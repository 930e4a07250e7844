"""The k largest of n keys by one program, exact and deterministic: ties go to the earlier key.

Scores are compared as integers: a float32's bits, with the negative numbers turned around, have the order of the
numbers. The threshold is searched for between two bounds, five ways at a time so that one reduction of four packed
counts decides; the search ends as soon as exactly k keys are left.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def ordered_key(score):
    """int32 of the same order as the float32 score."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: a negative zero is a zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_keys(
    keys, offsets, groups, start, n, limit, S: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Positions in ``keys``, keys and validity of elements ``[start, start + BLOCK)`` of the ``n`` that take part.

    With GROUP > 1 they are the members of the listed groups, GROUP neighbours each; ``limit`` keys exist. With the
    group rule ``share`` a key is made here, of float16 ``[group]`` and from ``mass.head_offsets``.
    """
    i = start + tl.arange(0, BLOCK)
    if GROUP > 1:
        index = tl.load(groups + i // GROUP, mask=i < n, other=0) * GROUP + i % GROUP
    else:
        index = i
    real = (i < n) & (index < limit)
    # .cg: written by other programs of this launch, so the first-level cache may not answer.
    if S.by_share:
        heads = tl.arange(0, S.block_n)
        scores = tl.load(
            keys + index[:, None] * S.group + heads[None, :],
            mask=real[:, None] & (heads < S.group)[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        best = tl.max(scores.to(tl.float32) - offsets[None, :], 1)
        x = tl.where(real, ordered_key(best), LOWEST)
    else:
        x = tl.load(keys + index, mask=real, other=LOWEST, cache_modifier=".cg")
    return index, x, real


@triton.jit
def _counts(x, low, step):
    """How many keys (fewer than 2^15) reach low + step, + 2 step, + 3 step and + 4 step: four int32. They are counted
    in 16 bits each, so that one reduction does."""
    first = tl.minimum(low + step, HIGHEST).to(tl.int32)
    second = tl.minimum(low + 2 * step, HIGHEST).to(tl.int32)
    third = tl.minimum(low + 3 * step, HIGHEST).to(tl.int32)
    fourth = tl.minimum(low + 4 * step, HIGHEST).to(tl.int32)
    lower = (x >= first).to(tl.int32) + ((x >= second).to(tl.int32) << 16)
    upper = (x >= third).to(tl.int32) + ((x >= fourth).to(tl.int32) << 16)
    sums = tl.sum(lower.to(tl.int64) + (upper.to(tl.int64) << 32), 0)
    return (
        (sums & 0xFFFF).to(tl.int32),
        ((sums >> 16) & 0xFFFF).to(tl.int32),
        ((sums >> 32) & 0xFFFF).to(tl.int32),
        (sums >> 48).to(tl.int32),
    )


@triton.jit
def _step(low, high):
    """A little more than a fifth of ``high - low``, at least 1; int64, since the bounds may be 2^32 apart."""
    return tl.maximum(((high - low) * 13) >> 6, 1)


@triton.jit
def _raise(low, reached, probe, count, high, k):
    """Move the lower bound up to a probe that k keys reach."""
    enough = (count >= k) & (probe < high)
    return tl.where(enough, probe, low), tl.where(enough, count, reached)


@triton.jit
def _narrow(low, high, reached, step, first, second, third, fourth, k):
    """The fifth of ``[low, high)`` that holds the threshold, and the number of keys >= its lower bound."""
    base = low
    low, reached = _raise(low, reached, base + step, first, high, k)
    low, reached = _raise(low, reached, base + 2 * step, second, high, k)
    low, reached = _raise(low, reached, base + 3 * step, third, high, k)
    low, reached = _raise(low, reached, base + 4 * step, fourth, high, k)
    # Above the fourth probe there may be more than a step left.
    return low, tl.where(low == base + 4 * step, high, tl.minimum(high, low + step)), reached


@triton.jit
def threshold(x, k, low, high):
    """A t that at least k keys reach, and exactly k unless keys equal to t tie.

    Args:
        x: int32 keys in registers, fewer than 2^15.
        low, high: at least k keys are >= low, and fewer than k are >= high.
    """
    low, high = low.to(tl.int64), high.to(tl.int64)
    reached = tl.full([], 2**30, tl.int32)
    while (high - low > 1) & (reached != k):
        step = _step(low, high)
        first, second, third, fourth = _counts(x, low, step)
        low, high, reached = _narrow(low, high, reached, step, first, second, third, fourth, k)
    return low.to(tl.int32)


@triton.jit
def threshold_in_memory(
    keys, offsets, groups, n, limit, k, low, high, S: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The same over keys that are read again and again, BLOCK at a time; and the number of keys > t."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    reached = tl.full([], 2**30, tl.int32)
    while (high - low > 1) & (reached != k):
        step = _step(low, high)
        first = tl.full([], 0, tl.int32)
        second, third, fourth = first, first, first
        for start in range(0, n, BLOCK):
            _, x, _ = load_keys(keys, offsets, groups, start, n, limit, S, GROUP, BLOCK)
            one, two, three, four = _counts(x, low, step)
            first, second, third, fourth = first + one, second + two, third + three, fourth + four
        low, high, reached = _narrow(low, high, reached, step, first, second, third, fourth, k)
    t = low.to(tl.int32)
    above = tl.full([], 0, tl.int32)
    for start in range(0, n, BLOCK):
        _, x, _ = load_keys(keys, offsets, groups, start, n, limit, S, GROUP, BLOCK)
        above += tl.sum((x > t).to(tl.int32), 0)
    return t, above


@triton.jit
def running_counts(x, t):
    """How many keys up to each are above t and how many equal it: two counts below 2^15 in one scan."""
    running = tl.cumsum((x > t).to(tl.int32) + ((x == t).to(tl.int32) << 16), 0)
    return running & 0xFFFF, running >> 16
