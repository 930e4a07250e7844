"""The k largest of n keys by one program, exact and deterministic: ties go to the earlier key.

Scores are compared as integers: a float32's bits, with the negative numbers turned around, have the order of the
numbers. The threshold is searched for between two bounds, three ways at a time so that one reduction of two packed
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
def load_keys(keys, groups, start, n, limit, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Positions in ``keys``, keys and validity of elements ``[start, start + BLOCK)`` of the ``n`` that take part.

    With GROUP > 1 they are the members of the listed groups, GROUP neighbours each; ``limit`` keys exist.
    """
    i = start + tl.arange(0, BLOCK)
    if GROUP > 1:
        index = tl.load(groups + i // GROUP, mask=i < n, other=0) * GROUP + i % GROUP
    else:
        index = i
    real = (i < n) & (index < limit)
    # .cg: written by other programs of this launch, so the first-level cache may not answer.
    return index, tl.load(keys + index, mask=real, other=LOWEST, cache_modifier=".cg"), real


@triton.jit
def _narrow(low, high, reached, first, second, count_first, count_second, k):
    """The third of ``[low, high)`` that holds the threshold, and the number of keys >= its lower bound."""
    reached = tl.where(count_second >= k, count_second, tl.where(count_first >= k, count_first, reached))
    high = tl.where(count_second >= k, high, tl.where(count_first >= k, second, first))
    low = tl.where(count_second >= k, second, tl.where(count_first >= k, first, low))
    return low, high, reached


@triton.jit
def _probes(low, high):
    """Two keys that cut ``[low, high)`` into thirds; int64, since the bounds may be 2^32 apart."""
    width = high - low
    return low + (width + 2) // 3, low + (2 * width + 2) // 3


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
        first, second = _probes(low, high)
        hits = (x >= first.to(tl.int32)).to(tl.int32) + ((x >= second.to(tl.int32)).to(tl.int32) << 16)
        counts = tl.sum(hits, 0)
        low, high, reached = _narrow(low, high, reached, first, second, counts & 0xFFFF, counts >> 16, k)
    return low.to(tl.int32)


@triton.jit
def threshold_in_memory(keys, groups, n, limit, k, low, high, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The same over keys that are read again and again, BLOCK at a time; and the number of keys > t."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    reached = tl.full([], 2**30, tl.int32)
    while (high - low > 1) & (reached != k):
        first, second = _probes(low, high)
        count_first = tl.full([], 0, tl.int32)
        count_second = tl.full([], 0, tl.int32)
        for start in range(0, n, BLOCK):
            _, x, _ = load_keys(keys, groups, start, n, limit, GROUP, BLOCK)
            count_first += tl.sum((x >= first.to(tl.int32)).to(tl.int32), 0)
            count_second += tl.sum((x >= second.to(tl.int32)).to(tl.int32), 0)
        low, high, reached = _narrow(low, high, reached, first, second, count_first, count_second, k)
    t = low.to(tl.int32)
    above = tl.full([], 0, tl.int32)
    for start in range(0, n, BLOCK):
        _, x, _ = load_keys(keys, groups, start, n, limit, GROUP, BLOCK)
        above += tl.sum((x > t).to(tl.int32), 0)
    return t, above


@triton.jit
def running_counts(x, t):
    """How many keys up to each are above t and how many equal it: two counts below 2^15 in one scan."""
    running = tl.cumsum((x > t).to(tl.int32) + ((x == t).to(tl.int32) << 16), 0)
    return running & 0xFFFF, running >> 16
