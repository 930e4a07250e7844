"""Attention over what is read, joined with the estimate of what is not: twin of ``reference.decode_sparse``.

One launch. Splits of a (row, head) share out its tokens: first those of the retrieved pages, then the anchors; a row
that is not sparse has only "anchors", all of its tokens. One more program takes the summary. Each writes a partial
result; the last to arrive merges them and divides once.

The retrieved tokens' sum of values is wanted too, and comes out of the same matrix product: a query row that scores 0
on retrieved tokens and minus infinity on all others has it as its unnormalised output.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.linear import LOG2_E, residual, tilt
from vllm_rc_backend.kernels.triton.matmul import as_operand, dot
from vllm_rc_backend.kernels.triton.overlap import wait_for_previous
from vllm_rc_backend.kernels.triton.paged import page_rows, token_rows
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end, retrieved_pages


@triton.jit
def _finite(maximum):
    """A maximum to subtract: of nothing, zero."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _rows(
    block_table,
    selected,
    start,
    end,
    n_retrieved,
    resume,
    stride_block,
    stride_token,
    g: tl.constexpr,
    TILE: tl.constexpr,
):
    """Element offsets of positions ``[start, start + TILE)`` of the reading order (see ``_attend``)."""
    j = start + tl.arange(0, TILE)
    real = j < end
    retrieved = j < n_retrieved
    page = tl.load(selected + j // g.page_size, mask=real & retrieved, other=0)
    anchor = j - n_retrieved
    token = tl.where(anchor < g.sink_tokens, anchor, anchor - g.sink_tokens + resume)
    anchor_rows = token_rows(block_table, token, real & (anchor >= 0), stride_block, stride_token, g)
    return tl.where(retrieved, page_rows(page, j % g.page_size, stride_block, stride_token, g), anchor_rows)


@triton.jit
def _attend(
    q,
    kv,
    block_table,
    selected,
    begin,
    end,
    n_retrieved,
    resume,
    seq_len,
    scale,
    stride_block,
    stride_token,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Exact attention over positions ``[begin, end)`` of the reading order.

    Position j is token j of the selected pages while ``j < n_retrieved``, then the sink's tokens, then those from
    ``resume`` on.

    Returns:
        Output not normalised ``[block_m, block_d]``, maximum, sum and (retrieved tokens only) sum of scores, in base 2.
    """
    g: tl.constexpr = S.geometry
    M: tl.constexpr = S.block_m
    D: tl.constexpr = S.block_d
    cols = tl.arange(0, D)
    ones = tl.arange(0, M) == S.group
    real_cols = (cols < S.head_size)[None, :]
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    scores_sum = tl.zeros([M], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    for start in range(begin, end, TILE):
        j = start + tl.arange(0, TILE)
        real = j < end
        retrieved = j < n_retrieved
        rows = _rows(
            block_table, selected, start, end, n_retrieved, resume, stride_block, stride_token, g, TILE
        )
        at = kv + rows[:, None] + cols[None, :]
        mask = real[:, None] & real_cols
        keys = as_operand(tl.load(at, mask=mask, other=0.0))
        values = as_operand(tl.load(at + S.head_size, mask=mask, other=0.0))
        scores = dot(q, tl.trans(keys.to(q.dtype)), tl.zeros([M, TILE], tl.float32)) * scale
        if S.completion != "none":
            scores_sum += tl.sum(tl.where((retrieved & real)[None, :], scores, 0.0), 1)
            scores = tl.where(ones[:, None], tl.where(retrieved, 0.0, float("-inf"))[None, :], scores)
        scores = tl.where(real[None, :], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(new_m)[:, None])
        decay = tl.exp2(m - _finite(new_m))
        total = total * decay + tl.sum(weights, 1)
        out = dot(weights.to(q.dtype), values.to(q.dtype), out * decay[:, None])
        m = new_m
    return out, m, total, scores_sum


@triton.jit
def decode_kernel(
    query,
    kv,
    block_table,
    seq_lens,
    selected,
    states,
    slots,
    partial_out,
    partial_stats,
    arrivals,
    out,
    counters,
    scale,
    key_scale,
    value_scale,
    stride_row,
    stride_query_head,
    stride_block,
    stride_head,
    stride_token,
    stride_table,
    stride_out,
    stride_out_head,
    max_selected,
    S: tl.constexpr,
    TILE: tl.constexpr,
    MERGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (heads, most_splits + 1, rows); the last split takes the summary.

    Args:
        query: ``[rows, heads * group, head_size]``, unscaled.
        selected: int32 ``[rows, heads, max_selected]``, physical pages, from ``select_kernel``.
        states, slots: summaries, and the slot of each row or -1.
        partial_out: float32 ``[rows, heads, most_splits + 1, merge_rows, block_d]`` scratch.
        partial_stats: float32 ``[rows, heads, most_splits + 1, 3, merge_rows]`` scratch: maximum, sum, sum of scores.
        arrivals: int32 ``[rows, heads]``, zero between launches.
        out: ``[rows, heads * group, head_size]``.
        counters: int64, see ``attention_triton.COUNTERS``.
    """
    g: tl.constexpr = S.geometry
    M: tl.constexpr = S.block_m
    D: tl.constexpr = S.block_d
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    most_splits = tl.num_programs(1) - 1
    seq_len = tl.load(seq_lens + row)
    sparse = is_sparse(seq_len, g)
    end_of_mid = mid_end(seq_len, g)
    n_retrieved = tl.where(sparse, retrieved_pages(seq_len, g) * g.page_size, 0)
    resume = tl.where(sparse, end_of_mid * g.page_size, g.sink_tokens)
    n_mid = (end_of_mid - g.sink_pages) * g.page_size
    n_read = n_retrieved + g.sink_tokens + seq_len - resume
    # Each split takes whole pages, as even as they come; splits without any do not take part.
    share = tl.maximum(tl.cdiv(tl.cdiv(n_read, most_splits), g.page_size), 1) * g.page_size
    splits = tl.maximum(tl.cdiv(n_read, share), 1)
    slot = -1
    if S.completion != "none":
        slot = tl.where(sparse, tl.load(slots + row), -1)
    arriving = splits + (slot >= 0).to(tl.int32)

    wait_for_previous(OVERLAP)
    if (split < splits) | ((split == most_splits) & (slot >= 0)):
        lane = row.to(tl.int64) * S.heads + head
        heads = tl.arange(0, M)
        cols = tl.arange(0, D)
        member = heads < S.group
        R: tl.constexpr = S.merge_rows
        partial_out += lane * (most_splits + 1) * R * D
        partial_stats += lane * (most_splits + 1) * 3 * R
        query += row.to(tl.int64) * stride_row + head * S.group * stride_query_head
        counted = heads <= S.group
        kept = counted[:, None] & (cols < S.head_size)[None, :]
        tile_at = heads[:, None] * D + cols[None, :]

        state = states + (tl.maximum(slot, 0).to(tl.int64) * S.heads + head) * (
            2 * S.state_rows * S.head_size
        )
        if split < most_splits:
            q = tl.load(
                query + heads[:, None] * stride_query_head + cols[None, :],
                mask=member[:, None] & (cols < S.head_size)[None, :],
                other=0.0,
            )
            o, m, total, scores_sum = _attend(
                q,
                kv + head.to(tl.int64) * stride_head,
                block_table + row.to(tl.int64) * stride_table,
                selected + lane * max_selected,
                split * share,
                tl.minimum((split + 1) * share, n_read),
                n_retrieved,
                resume,
                seq_len,
                scale * key_scale * LOG2_E,
                stride_block,
                stride_token,
                S,
                TILE,
            )
            tl.store(partial_out + split * R * D + tile_at, o * value_scale, mask=kept)
            tl.store(partial_stats + split * 3 * R + heads, m, mask=counted)
            tl.store(partial_stats + split * 3 * R + R + heads, total, mask=counted)
            tl.store(partial_stats + split * 3 * R + 2 * R + heads, scores_sum, mask=counted)
        elif S.completion == "linear":
            rows, q_K1 = tilt(query, stride_query_head, state, n_mid.to(tl.float32), scale, S, 64)
            tl.store(partial_out + most_splits * R * D + tile_at, rows, mask=kept)
            tl.store(partial_stats + most_splits * 3 * R + heads, q_K1, mask=counted)

        tl.debug_barrier()  # all of this program's partial is written before it arrives
        if tl.atomic_add(arrivals + lane, 1, sem="acq_rel") == arriving - 1:
            tl.store(arrivals + lane, 0)
            _merge(
                partial_out,
                partial_stats,
                splits,
                slot,
                n_mid,
                n_retrieved,
                out + row.to(tl.int64) * stride_out + head * S.group * stride_out_head,
                stride_out_head,
                counters,
                head,
                most_splits,
                S,
                MERGE,
            )
            if head == 0:
                tl.atomic_add(counters + tl.where(sparse, 0, 1), (seq_len > 0).to(tl.int64), sem="relaxed")
                tl.atomic_add(counters + 3, seq_len.to(tl.int64), sem="relaxed")
                tl.atomic_add(counters + 4, n_read.to(tl.int64), sem="relaxed")
                if S.completion != "none":
                    tl.atomic_add(counters + 2, (sparse & (slot < 0)).to(tl.int64), sem="relaxed")


@triton.jit
def _merge(
    partial_out,
    partial_stats,
    splits,
    slot,
    n_mid,
    n_retrieved,
    out,
    stride_out_head,
    counters,
    head,
    most_splits,
    S: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Add up the partials of one (row, head), the residual's among them, and divide."""
    M: tl.constexpr = S.merge_rows
    D: tl.constexpr = S.block_d
    heads = tl.arange(0, M)
    cols = tl.arange(0, D)
    counted = heads <= S.group
    kept = counted[:, None] & (cols < S.head_size)[None, :]
    tile_at = heads[:, None] * D + cols[None, :]
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    scores_sum = tl.zeros([M], tl.float32)
    o = tl.zeros([M, D], tl.float32)
    for start in range(0, splits, MERGE):
        # Unrolled, so that many loads are under way at once: each is a trip to the second-level cache.
        for i in tl.static_range(MERGE):
            split = start + i
            there = heads <= tl.where(split < splits, S.group, -1)
            at = partial_stats + split * 3 * M + heads
            m_part = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
            total_part = tl.load(at + M, mask=there, other=0.0, cache_modifier=".cg")
            scores_sum += tl.load(at + 2 * M, mask=there, other=0.0, cache_modifier=".cg")
            o_part = tl.load(
                partial_out + split * M * D + tile_at,
                mask=there[:, None] & (cols < S.head_size)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_m = tl.maximum(m, m_part)
            decay, weight = tl.exp2(m - _finite(new_m)), tl.exp2(m_part - _finite(new_m))
            total = total * decay + total_part * weight
            o = o * decay[:, None] + o_part * weight[:, None]
            m = new_m
    if S.completion == "linear":
        if slot >= 0:
            rows = tl.load(
                partial_out + most_splits * M * D + tile_at, mask=kept, other=0.0, cache_modifier=".cg"
            )
            q_K1 = tl.load(
                partial_stats + most_splits * 3 * M + heads, mask=counted, other=0.0, cache_modifier=".cg"
            )
            log_mass, value = residual(rows, q_K1, scores_sum, o, n_mid, n_retrieved, S)
            M_all = tl.maximum(m, log_mass)
            D_U = tl.exp2(log_mass - M_all)
            shrink = tl.exp2(m - M_all)
            total = total * shrink + D_U
            o = o * shrink[:, None] + D_U[:, None] * value
            if head == 0:
                share = tl.sum(tl.where(heads < S.group, D_U / total, 0.0), 0) / S.group
                tl.atomic_add(counters + 6, (share * 1e6).to(tl.int64), sem="relaxed")
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]  # a padding row has read nothing: zeros
    tl.store(
        out + heads[:, None] * stride_out_head + cols[None, :],
        o.to(out.dtype.element_ty),
        mask=(heads < S.group)[:, None] & (cols < S.head_size)[None, :],
    )
