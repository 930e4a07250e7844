"""Partial results of a (row, KV head) become its output: twin of the end of ``reference.decode_sparse``.

A program does some columns of the head at a time. Where all programs of a launch run at the same time, several share
the columns out once the last partial is there; otherwise the last to arrive does all of them.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.linear import residual
from vllm_rc_backend.kernels.triton.mass import finite, scored_masses, unread_log_mass

SMALLEST = tl.constexpr(2.0**-126)

PARTIAL_STATS = tl.constexpr(5)
"""Rows of numbers beside a partial result: maximum, sum, sum of scores; of ``retrieved_mass`` maximum and sum."""


@triton.jit
def merge_columns(
    partial_out,
    partial_stats,
    masses,
    scorers,
    splits,
    slot,
    n_mid,
    n_retrieved,
    first,
    out,
    stride_out_head,
    counters,
    head,
    attenders,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    ALL: tl.constexpr,
    COLS: tl.constexpr,
    MASSES: tl.constexpr,
):
    """Add up columns ``[first, first + COLS)`` of the partials, the residual's among them, and divide.

    Args:
        partial_out, partial_stats, masses: see ``decode_kernel``; they point to the (row, head).
        SPLITS, ALL: partials that are looked at at a time, and whether that is all of them.
    """
    R: tl.constexpr = S.merge_rows
    D: tl.constexpr = S.block_d
    heads = tl.arange(0, R)
    cols = first + tl.arange(0, COLS)
    counted = heads <= S.group
    kept = counted[:, None] & (cols < S.head_size)[None, :]
    tile_at = heads[:, None] * D + cols[None, :]
    # .cg everywhere: written by other programs of this launch, so the first-level cache may not answer.
    # All is asked for before anything is added up: each answer is a trip to the second-level cache.
    if S.completion != "none":
        # Of ``features`` the row of ones has no residual.
        estimated = counted if S.first_order else heads < S.group
        summed = tl.where(estimated, slot, -1) >= 0
        q_K1 = tl.load(
            partial_stats + attenders * PARTIAL_STATS * R + heads,
            mask=summed,
            other=0.0,
            cache_modifier=".cg",
        )
    damping = S.damping
    if S.completion == "paged":
        damping = tl.load(
            partial_stats + (attenders * PARTIAL_STATS + 1) * R + heads,
            mask=summed,
            other=0.0,
            cache_modifier=".cg",
        )
        scored_m, scored = scored_masses(masses, tl.where(slot >= 0, scorers, 0), S, MASSES, R)
    m = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    scores_sum = tl.zeros([R], tl.float32)
    mass_m = tl.full([R], float("-inf"), tl.float32)
    mass = tl.zeros([R], tl.float32)
    o = tl.zeros([R, COLS], tl.float32)
    rows = o
    for start in range(0, 1 if ALL else splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = (split < splits)[:, None] & counted[None, :]
        at = partial_stats + split[:, None] * (PARTIAL_STATS * R) + heads[None, :]
        o_part = tl.load(
            partial_out + split[:, None, None] * (R * D) + tile_at[None, :, :],
            mask=there[:, :, None] & (cols < S.head_size)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        if S.completion != "none":
            # Here, although it is the same for each: its layout is changed at once, which waits for it.
            rows = tl.load(
                partial_out + attenders * R * D + tile_at,
                mask=kept & summed[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
        tl.debug_barrier()  # or the compiler asks for these only when it has got what follows
        m_part = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
        total_part = tl.load(at + R, mask=there, other=0.0, cache_modifier=".cg")
        if S.first_order:
            scores_part = tl.load(at + 2 * R, mask=there, other=0.0, cache_modifier=".cg")
        if S.completion == "paged":
            mass_m_part = tl.load(at + 3 * R, mask=there, other=float("-inf"), cache_modifier=".cg")
            mass_part = tl.load(at + 4 * R, mask=there, other=0.0, cache_modifier=".cg")
            # In one reduction what can be: each is a round through shared memory.
            best, best_mass, scores_part = tl.reduce((m_part, mass_m_part, scores_part), 0, _largest_and_sum)
            m, decay, weight = _rescaled(m, best, m_part)
            mass_m, mass_decay, mass_weight = _rescaled(mass_m, best_mass, mass_m_part)
            mass_part = _weighted(mass_part, mass_weight, there)
            total_part, mass_part = tl.reduce((_weighted(total_part, weight, there), mass_part), 0, _sums)
            mass = mass * mass_decay + mass_part
        else:
            if S.first_order:
                scores_part = tl.sum(scores_part, 0)
            m, decay, weight = _rescaled(m, tl.max(m_part, 0), m_part)
            total_part = tl.sum(_weighted(total_part, weight, there), 0)
        if S.first_order:
            scores_sum += scores_part
        total = total * decay + total_part
        o_part = _weighted(o_part, weight[:, :, None], there[:, :, None])
        o = o * decay[:, None] + tl.sum(o_part, 0)
    if S.completion == "none":
        o = _divided(o, total)
    elif slot >= 0:
        if S.first_order:
            log_mass, value = residual(rows, q_K1, scores_sum, o, n_mid, n_retrieved, S)
        else:
            log_mass, value = q_K1, rows  # as ``features.py`` left it
        if S.completion == "paged":
            log_mass = unread_log_mass(scored_m, scored, mass_m, mass, S)
        if S.damping > 0:
            log_mass = damp(log_mass, m + tl.log2(total), damping)
        M_all = finite(tl.maximum(m, log_mass))
        D_U = tl.exp2(log_mass - M_all)
        shrink = tl.exp2(m - M_all)
        total = total * shrink + D_U
        D_U /= total
        o = o * (shrink / total)[:, None] + D_U[:, None] * value
        if (head == 0) & (first == 0):
            share = tl.sum(tl.where(heads < S.group, D_U, 0.0), 0) / S.group
            tl.atomic_add(counters + 6, (share * 1e6).to(tl.int64), sem="relaxed")
    else:
        o = _divided(o, total)
    tl.store(
        out + heads[:, None] * stride_out_head + cols[None, :],
        o.to(out.dtype.element_ty),
        mask=(heads < S.group)[:, None] & (cols < S.head_size)[None, :],
    )


@triton.jit
def _divided(o, total):
    """A weighted sum of values ``[R, COLS]`` by that of its weights ``[R]``; zeros where nothing was read (padding)."""
    return o * (1 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def damp(log_mass, read_log_mass, damping):
    """A residual's log-mass ``[merge_rows]``, the lower the larger its share; base 2. Twin of ``reference.damp``."""
    share = 1 / (1 + tl.exp2(read_log_mass - log_mass))
    # Not one minus what is left of the share: that is zero where what was read has hardly any mass.
    rest = 1 / (1 + tl.exp2(log_mass - read_log_mass)) + damping * share * share
    return read_log_mass + tl.log2(share * (1 - damping * share) / tl.maximum(rest, SMALLEST))


@triton.jit
def _rescaled(m, best, parts):
    """The maximum ``[R]`` with more parts ``[n, R]`` of which ``best`` are the largest, and the factors of what was
    summed under the old ones."""
    new = tl.maximum(m, best)
    return new, tl.exp2(m - finite(new)), tl.exp2(parts - finite(new)[None, :])


@triton.jit
def _weighted(parts, weight, there):
    """``parts * weight`` of the partials that are there, rounded. Without the choice a compiler joins the product with
    the first addition of the sum over partials, and threads that hold the same sum round it differently (triton#7264).
    """
    return tl.where(there, parts * weight, 0.0)


@triton.jit
def _largest_and_sum(a, b, c, d, e, f):
    return tl.maximum(a, d), tl.maximum(b, e), c + f


@triton.jit
def _sums(a, b, c, d):
    return a + c, b + d
