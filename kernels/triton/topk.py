"""The k largest of n keys by one program, exact and deterministic: ties go to the earlier key.

Scores are compared as integers: a float32's bits, with the negative numbers turned around, have the order of the
numbers. The threshold is searched for between two bounds, five ways at a time so that one reduction of four packed
counts decides; the search ends as soon as exactly k keys are left. The four probes are evenly spaced as numbers, since
scores lie closer to that than their bits do; where that takes too long, as between 0.001 and 10^30, as integers.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
UNKNOWN = tl.constexpr(2**30)
"""A number of keys that none is."""

EVEN_ROUNDS = tl.constexpr(8)
"""Rounds with evenly spaced numbers: nearly always enough. Then at most 17 more leave a single integer."""


@triton.jit
def ordered_key(score):
    """int32 of the same order as the float32 score."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: a negative zero is a zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(key):
    """The float32 of an ``ordered_key``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(
    keys, offsets, groups, listed, start, n, limit, S: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Positions in ``keys`` and keys of elements ``[start, start + BLOCK)`` of the ``n`` that take part; where there is
    none, LOWEST, which no number has.

    If they are ``listed`` they are the members of these groups, GROUP neighbours each; ``limit`` keys exist. With the
    group rule ``share`` a key is made here, of float16 ``[group]`` and from ``mass.head_offsets``.
    """
    i = start + tl.arange(0, BLOCK)
    index = i
    if GROUP > 1:
        member = tl.load(groups + i // GROUP, mask=listed & (i < n), other=0) * GROUP + i % GROUP
        index = tl.where(listed, member, i)
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
    return index, x


@triton.jit
def bounds(x):
    """The smallest key, and one that all are below; ``x`` as from ``load_keys``."""
    smallest, largest = tl.split(tl.max(tl.join(tl.where(x == LOWEST, LOWEST, ~x), x), 0))
    return ~smallest, tl.minimum(largest, HIGHEST - 1) + 1


@triton.jit
def _middle(low, high):
    """Halfway between two integers whose difference may not be one."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _probes(low, high, turn):
    """Four integers of ``(low, high)``, not empty, in order; the same one again where there is no room for four."""
    if turn < EVEN_ROUNDS:
        a, b = _score(low), _score(high)
        first = ordered_key(a * 0.8 + b * 0.2)
        second = ordered_key(a * 0.6 + b * 0.4)
        third = ordered_key(a * 0.4 + b * 0.6)
        fourth = ordered_key(a * 0.2 + b * 0.8)
    else:
        second = _middle(low, high)
        first, third = _middle(low, second), _middle(second, high)
        fourth = _middle(third, high)
    last = high - 1
    first = tl.minimum(tl.maximum(first, low + 1), last)
    second = tl.minimum(tl.maximum(second, first), last)
    third = tl.minimum(tl.maximum(third, second), last)
    return first, second, third, tl.minimum(tl.maximum(fourth, third), last)


@triton.jit
def _counts(x, first, second, third, fourth):
    """How many keys (fewer than 2^15) reach each of four probes: four int32. They are counted in 16 bits each, and in
    one reduction of two sums."""
    lower = (x >= first).to(tl.int32) + ((x >= second).to(tl.int32) << 16)
    upper = (x >= third).to(tl.int32) + ((x >= fourth).to(tl.int32) << 16)
    lower, upper = tl.split(tl.sum(tl.join(lower, upper), 0))
    return lower & 0xFFFF, lower >> 16, upper & 0xFFFF, upper >> 16


@triton.jit
def _compare(low, high, reached, above, probe, count, k):
    """``_narrow`` by one probe; lower ones come first."""
    enough = count >= k
    lower = (not enough) & (probe < high)
    return (
        tl.where(enough, probe, low),
        tl.where(lower, probe, high),
        tl.where(enough, count, reached),
        tl.where(lower, count, above),
    )


@triton.jit
def _narrow(low, high, reached, above, first, second, third, fourth, one, two, three, four, k):
    """The bounds between which the threshold is left by four probes and their counts, and how many keys reach each."""
    low, high, reached, above = _compare(low, high, reached, above, first, one, k)
    low, high, reached, above = _compare(low, high, reached, above, second, two, k)
    low, high, reached, above = _compare(low, high, reached, above, third, three, k)
    return _compare(low, high, reached, above, fourth, four, k)


@triton.jit
def threshold(x, k, low, high, reached):
    """A t that at least k keys reach, and exactly k unless keys equal to t tie.

    Args:
        x: int32 keys in registers, fewer than 2^15.
        low, high: at least k keys are >= low, and none is >= high.
        reached: how many are >= low, or UNKNOWN.

    Returns:
        t, and how many keys equal to t, the first of them, make k with those above it; or a larger number where all do.
    """
    above, turn = 0, 0
    while (low + 1 < high) & (reached != k):
        first, second, third, fourth = _probes(low, high, turn)
        one, two, three, four = _counts(x, first, second, third, fourth)
        low, high, reached, above = _narrow(
            low, high, reached, above, first, second, third, fourth, one, two, three, four, k
        )
        turn += 1
    return low, k - above


@triton.jit
def bounds_in_memory(
    keys, offsets, groups, listed, n, limit, S: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """``bounds`` of keys that are read BLOCK at a time."""
    low, high = tl.full([], HIGHEST, tl.int32), tl.full([], LOWEST, tl.int32)
    for start in range(0, n, BLOCK):
        _, x = load_keys(keys, offsets, groups, listed, start, n, limit, S, GROUP, BLOCK)
        smallest, largest = bounds(x)
        low, high = tl.minimum(low, smallest), tl.maximum(high, largest)
    return low, high


@triton.jit
def threshold_in_memory(
    keys,
    offsets,
    groups,
    listed,
    n,
    limit,
    k,
    low,
    high,
    reached,
    S: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``threshold`` of keys that are read again and again, BLOCK at a time."""
    above, turn = 0, 0
    while (low + 1 < high) & (reached != k):
        first, second, third, fourth = _probes(low, high, turn)
        one = tl.full([], 0, tl.int32)
        two, three, four = one, one, one
        for start in range(0, n, BLOCK):
            _, x = load_keys(keys, offsets, groups, listed, start, n, limit, S, GROUP, BLOCK)
            more = _counts(x, first, second, third, fourth)
            one, two, three, four = one + more[0], two + more[1], three + more[2], four + more[3]
        low, high, reached, above = _narrow(
            low, high, reached, above, first, second, third, fourth, one, two, three, four, k
        )
        turn += 1
    return low, k - above


@triton.jit
def running_counts(x, t):
    """How many keys up to each are above t and how many equal it: two counts below 2^15 in one scan."""
    running = tl.cumsum((x > t).to(tl.int32) + ((x == t).to(tl.int32) << 16), 0)
    return running & 0xFFFF, running >> 16
