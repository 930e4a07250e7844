"""A decode step: page scores, then attention over what is read, joined with the estimate of what is not. Twin of
``reference.score_pages``, ``reference.select_pages`` and ``reference.decode_sparse``.

Two phases. First the programs of a (row, KV head) score its pages between them (``score.py``). Then they share out its
tokens: those of the retrieved pages, of which each finds its own share (``choose.py``), and the anchors; a row that is
not sparse has only "anchors", all of its tokens. Each writes a partial result, what the summary says of the query is
one more, and they are merged and divided once (``merge.py``).

In a small batch both phases are one launch, and programs wait in between until the scores of their (row, KV head) are
there, and before they merge until the partial results are; it must be small enough for all programs to run at the same
time. Otherwise each phase is a launch. A page that this step completes gets its statistics on the side: as part of the
tail it is read whole now, and no other row has it.

The retrieved tokens' sum of values is wanted too, and comes out of the same matrix product: a query row that scores 0
on retrieved tokens and minus infinity on all others has it as its unnormalised output.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.choose import choose_pages
from vllm_rc_backend.kernels.triton.launched import launched
from vllm_rc_backend.kernels.triton.linear import LOG2_E, damping, tilt
from vllm_rc_backend.kernels.triton.mass import finite, page_scores, retrieved_mass
from vllm_rc_backend.kernels.triton.matmul import INTERPRETED, as_operand, dot
from vllm_rc_backend.kernels.triton.merge import PARTIAL_STATS, merge_columns
from vllm_rc_backend.kernels.triton.overlap import (
    ARRIVAL,
    clear_after,
    count_up,
    let_next_start,
    wait_for_count,
    wait_for_previous,
)
from vllm_rc_backend.kernels.triton.page_cache import cached_rows
from vllm_rc_backend.kernels.triton.paged import block_rows, page_of, token_blocks
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end, retrieved_pages
from vllm_rc_backend.kernels.triton.runs import hadamard, query_places
from vllm_rc_backend.kernels.triton.score import score_pages
from vllm_rc_backend.kernels.triton.statistics import finish_page


@triton.constexpr_function
def _piece(tile, page_size):
    """Tokens of a tile that are looked up as one: neighbours in a page, whose address all threads find out. Where there
    is a thread for every token each finds out one, which is quicker."""
    return min(tile, page_size) if tile < 128 else 1


ADD_NOTHING = tl.constexpr("""
{
    .reg .u32 nothing;
    mov.u32 nothing, %lanemask_lt;
    shr.u32 nothing, nothing, 31;
    add.u32 $0, $1, nothing;
}
""")


@triton.jit
def _pieces(start, TILE: tl.constexpr, PIECE: tl.constexpr):
    """First positions of the pieces of ``[start, start + TILE)`` of the reading order (see ``_attend``)."""
    j = start + tl.arange(0, TILE // PIECE) * PIECE
    if PIECE > 1 and not INTERPRETED:
        # What it knows to be the same in all threads the compiler moves to other registers as soon as it is asked for,
        # and waits for it there.
        j = tl.inline_asm_elementwise(ADD_NOTHING, "=r,r", [j], dtype=tl.int32, is_pure=True, pack=1)
    return j


@triton.jit
def _places(chosen, j, end, n_retrieved, g: tl.constexpr):
    """Places of the pages of positions j."""
    return tl.load(chosen + j // g.page_size, mask=j < tl.minimum(end, n_retrieved), other=0)


@triton.jit
def _tokens(places, j, n_retrieved, resume, g: tl.constexpr):
    """The sequence's tokens at positions j."""
    anchor = j - n_retrieved
    token = tl.where(anchor < g.sink_tokens, anchor, anchor - g.sink_tokens + resume)
    return tl.where(anchor < 0, places * g.page_size + g.sink_tokens + j % g.page_size, token)


@triton.jit
def _attend(
    q,
    kv,
    content,
    reading,
    block_table,
    chosen,
    begin,
    end,
    n_retrieved,
    resume,
    scale,
    stride_block,
    stride_token,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Exact attention over positions ``[begin, end)`` of the reading order.

    Position j is token j of the chosen pages while ``j < n_retrieved``, then the sink's tokens, then those from
    ``resume`` on. With the KV pages in host memory ``reading`` says where each page of this order is.

    Returns:
        Output not normalised ``[block_m, block_d]``, maximum and sum of weights, and for ``linear`` the sum of the
        retrieved tokens' scores; in base 2.
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
    if reading is None:
        # Where a tile is, is asked for a tile ahead, and for its pages two: each is a trip to the second-level cache.
        PIECE: tl.constexpr = _piece(TILE, g.page_size)
        within = tl.arange(0, PIECE)[None, :] * stride_token
        piece = _pieces(begin, TILE, PIECE)
        tokens = _tokens(_places(chosen, piece, end, n_retrieved, g), piece, n_retrieved, resume, g)
        blocks = token_blocks(block_table, tokens, piece < end, g)
        places = _places(chosen, piece + TILE, end, n_retrieved, g)
    for start in range(begin, end, TILE):
        j = start + tl.arange(0, TILE)
        real = j < end
        retrieved = j < n_retrieved
        if reading is None:
            rows = block_rows(blocks, tokens, stride_block, stride_token, g)
            if PIECE > 1:
                # Multiples as all strides are, which the compiler does not see through a change of shape.
                rows = tl.multiple_of(tl.reshape(rows[:, None] + within, [TILE]), 16)
            at = kv + rows[:, None] + cols[None, :]
            piece += TILE
            tokens = _tokens(places, piece, n_retrieved, resume, g)
            blocks = token_blocks(block_table, tokens, piece < end, g)
            places = _places(chosen, piece + TILE, end, n_retrieved, g)
        else:
            at = cached_rows(kv, content, reading, j, real, stride_block, stride_token, S)
            at = at[:, None] + cols[None, :]
        mask = real[:, None] & real_cols
        keys = as_operand(tl.load(at, mask=mask, other=0.0))
        values = as_operand(tl.load(at + S.head_size, mask=mask, other=0.0))
        scores = dot(q, tl.trans(keys.to(q.dtype)), tl.zeros([M, TILE], tl.float32)) * scale
        if S.completion == "linear":
            scores_sum += tl.sum(tl.where((retrieved & real)[None, :], scores, 0.0), 1)
        if S.first_order:
            scores = tl.where(ones[:, None], tl.where(retrieved, 0.0, float("-inf"))[None, :], scores)
        scores = tl.where(real[None, :], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - finite(new_m)[:, None])
        decay = tl.exp2(m - finite(new_m))
        total = total * decay + tl.sum(weights, 1)
        out = dot(weights.to(q.dtype), values.to(q.dtype), out * decay[:, None])
        m = new_m
    return out, m, total, scores_sum


# The same kernel for all batches of which the constants are the same, see ``attention_triton.launch_rows``.
@launched
def decode_kernel(
    query,
    kv,
    content,
    reading,
    codes,
    scales,
    states,
    block_table,
    seq_lens,
    slots,
    keys,
    maxima,
    head_scores,
    masses,
    groups,
    chosen,
    partial_out,
    partial_stats,
    scored,
    attended,
    merged,
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
    max_pages,
    max_groups,
    max_selected,
    max_read,
    scorers,
    attenders,
    SCORES: tl.constexpr,
    ATTENDS: tl.constexpr,
    S: tl.constexpr,
    SCORE_TILE: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    MASSES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
    PAGES: tl.constexpr,
    MERGE: tl.constexpr,
    MERGE_ALL: tl.constexpr,
    COLS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (heads, splits, rows): heads first, whose statistics of a page are neighbours in memory. A launch that only
    ATTENDS has one split more than attenders, which takes the summary and a page that is complete now; in one launch
    the last that has tokens does.

    Args:
        query: ``[rows, heads * group, head_size]``, unscaled.
        kv: the cache ``[block, head, token, K then V]``.
        content, reading: with the KV pages in host memory the page cache, see ``page_cache.cached_rows``, and the pages
            are chosen already; otherwise None.
        codes, scales, states: the side store.
        slots: int32 ``[rows]``, the slot of each row's summary or -1.
        keys, maxima, head_scores: ``[rows, heads, max_pages or max_groups]`` scratch, see ``score.score_pages``; with
            the group rule ``share`` keys are head_scores.
        masses: float32 ``[rows, heads, scorers, 2, block_n]`` scratch, see there.
        groups: int32 ``[rows, heads, splits, max_selected]`` scratch, see ``choose.choose_pages``.
        chosen: int32 ``[rows, heads, max_selected]`` out, see there.
        partial_out: float32 ``[rows, heads, splits + 1, merge_rows, block_d]`` scratch.
        partial_stats: float32 ``[rows, heads, splits + 1, PARTIAL_STATS, merge_rows]`` scratch.
        scored, attended, merged: int32 ``[rows, heads, ARRIVAL]``, of which the first is the number of programs that
            have done so; zero between launches.
        out: ``[rows, heads * group, head_size]``.
        counters: int64, see ``attention_triton.COUNTERS``.
        scorers, attenders: programs of each (row, head) that take part in the phases.
    """
    g: tl.constexpr = S.geometry
    R: tl.constexpr = S.merge_rows
    D: tl.constexpr = S.block_d
    if not ATTENDS:
        let_next_start(OVERLAP)
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + row)
    query += row.to(tl.int64) * stride_row + head * S.group * stride_query_head
    matrix, places = None, None
    if SCORES:
        if S.query_map == "runs":
            # Before it is known whether the row is sparse, so that the answers come together. The matrix first: the
            # compiler waits for the query at once, and has made the matrix by then.
            matrix = hadamard(S)
            places = query_places(query, stride_query_head, S)
    sparse = is_sparse(seq_len, g)
    end_of_mid = mid_end(seq_len, g)
    pages = end_of_mid - g.sink_pages
    n_retrieved = tl.where(sparse, retrieved_pages(seq_len, g) * g.page_size, 0)
    resume = tl.where(sparse, end_of_mid * g.page_size, g.sink_tokens)
    n_mid = pages * g.page_size
    n_read = n_retrieved + g.sink_tokens + seq_len - resume
    slot = -1
    if S.completion != "none":
        slot = tl.where(sparse, tl.load(slots + row), -1)

    lane = row.to(tl.int64) * S.heads + head
    keys += lane * max_pages * S.key_width
    maxima += lane * max_groups * S.key_width
    head_scores += lane * max_pages * S.group
    masses += lane * scorers * (2 * S.block_n)
    scored += lane * ARRIVAL
    attended += lane * ARRIVAL
    merged += lane * ARRIVAL
    chosen += lane * max_selected
    partial_out += lane * (attenders + 1) * R * D
    partial_stats += lane * (attenders + 1) * PARTIAL_STATS * R
    block_table += row.to(tl.int64) * stride_table
    if reading is not None:
        reading += lane * max_read
    state = states + (tl.maximum(slot, 0).to(tl.int64) * S.heads + head) * (2 * S.state_rows * S.head_size)

    if SCORES:
        if sparse & (split < scorers):
            score_pages(
                query,
                stride_query_head,
                matrix,
                places,
                codes,
                scales,
                block_table,
                head,
                pages,
                split,
                scorers,
                keys,
                maxima,
                head_scores,
                masses + split * (2 * S.block_n),
                scale,
                S,
                SCORE_TILE,
                GROUP,
                SCORE_STAGES,
            )
    wait_for_previous(OVERLAP)
    if ATTENDS:
        # Each split takes whole pages, as even as they come; splits without any do not take part.
        share = tl.maximum(tl.cdiv(tl.cdiv(n_read, attenders), g.page_size), 1) * g.page_size
        splits = tl.maximum(tl.cdiv(n_read, share), 1)
        summarises = (slot >= 0) & (split == attenders)
        if SCORES:
            summarises = (slot >= 0) & (split == splits - 1)
            if sparse & (split < scorers):
                tl.debug_barrier()  # all of this program's keys are written before it arrives
                tl.atomic_add(scored, 1, sem="release")
        # Now, since the compiler waits for it at once: later it would hold up the first keys.
        q = _query_heads(query, stride_query_head, S)
        if S.first_order:
            if summarises:
                _summarise(
                    query,
                    stride_query_head,
                    state,
                    n_mid,
                    scale,
                    partial_out + attenders * R * D,
                    partial_stats + attenders * PARTIAL_STATS * R,
                    S,
                )
        else:
            summarises = False  # of ``features`` the residual is there already
        if (split < splits) | summarises:
            if split < splits:
                first = split * share // g.page_size
                last = tl.minimum((split + 1) * share, n_retrieved) // g.page_size
                if reading is not None or S.completion == "features":
                    last = first  # all are chosen already
                if first < last:
                    if SCORES:
                        wait_for_count(scored, scorers)
                    choose_pages(
                        keys,
                        maxima,
                        masses,
                        scorers,
                        groups + (lane * attenders + split) * max_selected,
                        chosen,
                        pages,
                        n_retrieved // g.page_size,
                        first,
                        last,
                        S,
                        MASSES,
                        GROUP,
                        BLOCK,
                        SINGLE,
                    )
                _attend_split(
                    q,
                    kv + head.to(tl.int64) * stride_head,
                    content,
                    reading,
                    block_table,
                    chosen,
                    head_scores,
                    split * share,
                    tl.minimum((split + 1) * share, n_read),
                    n_retrieved,
                    resume,
                    scale * key_scale * LOG2_E,
                    value_scale,
                    stride_block,
                    stride_token,
                    partial_out + split * R * D,
                    partial_stats + split * PARTIAL_STATS * R,
                    S,
                    TILE,
                    PAGES,
                )
            arriving = splits
            if S.first_order and not SCORES:
                arriving += (slot >= 0).to(tl.int32)
            tl.debug_barrier()  # all of this program's partial is written before it arrives
            # Of the programs that run at the same time some merge some columns each, otherwise the last all of them.
            if SCORES:
                tl.atomic_add(attended, 1, sem="release")  # what it was is nothing to wait for
                mergers, merger = tl.minimum(splits, D // COLS), split
            else:
                arrived = tl.atomic_add(attended, 1, sem="acq_rel") + 1
                mergers, merger = 1, tl.where(arrived == arriving, 0, 1)
            if merger < mergers:
                if SCORES:
                    wait_for_count(attended, arriving)
                    # Who has passed waits for nobody any more, and split 0 of a sparse row has waited for all scores:
                    # the last to pass may clear the counters. The merge hides the way of the answer.
                    passed = count_up(merged)
                for part in range(merger, D // COLS, mergers):
                    merge_columns(
                        partial_out,
                        partial_stats,
                        masses,
                        scorers,
                        splits,
                        slot,
                        n_mid,
                        n_retrieved,
                        part * COLS,
                        out + row.to(tl.int64) * stride_out + head * S.group * stride_out_head,
                        stride_out_head,
                        counters,
                        head,
                        attenders,
                        S,
                        MERGE,
                        MERGE_ALL,
                        COLS,
                        MASSES,
                    )
                if SCORES:
                    clear_after(passed, mergers - 1, scored, attended, merged)
                else:
                    tl.store(attended, 0)
                if (head == 0) & (merger == 0):
                    _count(counters, sparse, slot, seq_len, n_read, pages, S)
        # Last, so that nobody waits for it; and in one launch by a program that, of many, has no part in the merge.
        finisher = attenders
        if SCORES:
            finisher = splits - 1
        if (seq_len > 0) & (seq_len % g.page_size == 0) & (split == finisher):
            finish_page(
                kv + head.to(tl.int64) * stride_head,
                codes,
                scales,
                page_of(block_table, seq_len // g.page_size - 1, seq_len > 0, g),
                head,
                key_scale,
                stride_block,
                stride_token,
                S,
            )


@triton.jit
def _count(counters, sparse, slot, seq_len, n_read, pages, S: tl.constexpr):
    """One row's part of ``attention_triton.COUNTERS``, the residual's share aside."""
    tl.atomic_add(counters + tl.where(sparse, 0, 1), (seq_len > 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 3, seq_len.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 4, n_read.to(tl.int64), sem="relaxed")
    if S.completion != "none":
        tl.atomic_add(counters + 2, (sparse & (slot < 0)).to(tl.int64), sem="relaxed")
    if sparse:
        tl.atomic_add(counters + 5, pages.to(tl.int64), sem="relaxed")


@triton.jit
def _summarise(query, stride_query_head, state, n_mid, scale, partial_out, partial_stats, S: tl.constexpr):
    """Write what the summary says of the query before it is known what was retrieved, as one more partial."""
    heads = tl.arange(0, S.block_m)
    cols = tl.arange(0, S.block_d)
    counted = heads <= S.group
    n = n_mid.to(tl.float32)
    rows, q_K1 = tilt(query, stride_query_head, state, n, scale, S)
    tl.store(
        partial_out + heads[:, None] * S.block_d + cols[None, :],
        rows,
        mask=counted[:, None] & (cols < S.head_size)[None, :],
    )
    if S.completion == "paged":
        tl.store(partial_stats + heads, damping(rows, n, S), mask=counted)
    else:
        tl.store(partial_stats + heads, q_K1, mask=counted)


@triton.jit
def _query_heads(query, stride_query_head, S: tl.constexpr):
    """The query heads of a KV head: ``[block_m, block_d]``, zeros beyond."""
    heads, cols = tl.arange(0, S.block_m), tl.arange(0, S.block_d)
    return tl.load(
        query + heads[:, None] * stride_query_head + cols[None, :],
        mask=(heads < S.group)[:, None] & (cols < S.head_size)[None, :],
        other=0.0,
    )


@triton.jit
def _attend_split(
    q,
    kv,
    content,
    reading,
    block_table,
    chosen,
    head_scores,
    begin,
    end,
    n_retrieved,
    resume,
    scale,
    value_scale,
    stride_block,
    stride_token,
    partial_out,
    partial_stats,
    S: tl.constexpr,
    TILE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Write the partial result of positions ``[begin, end)`` of the reading order; arguments as ``_attend``."""
    g: tl.constexpr = S.geometry
    R: tl.constexpr = S.merge_rows
    heads = tl.arange(0, S.block_m)
    cols = tl.arange(0, S.block_d)
    counted = heads <= S.group
    if S.completion == "paged":
        first, last = begin // g.page_size, tl.minimum(end, n_retrieved) // g.page_size
        # Asked for before the attention, needed after it.
        scores = page_scores(chosen, head_scores, first, last, S, PAGES)
    out, m, total, scores_sum = _attend(
        q,
        kv,
        content,
        reading,
        block_table,
        chosen,
        begin,
        end,
        n_retrieved,
        resume,
        scale,
        stride_block,
        stride_token,
        S,
        TILE,
    )
    tl.store(
        partial_out + heads[:, None] * S.block_d + cols[None, :],
        out * value_scale,
        mask=counted[:, None] & (cols < S.head_size)[None, :],
    )
    tl.store(partial_stats + heads, m, mask=counted)
    tl.store(partial_stats + R + heads, total, mask=counted)
    if S.completion == "linear":
        tl.store(partial_stats + 2 * R + heads, scores_sum, mask=counted)
    if S.completion == "paged":
        m, total = retrieved_mass(scores, chosen, head_scores, first, last, S, PAGES)
        heads = tl.arange(0, R)
        tl.store(partial_stats + 2 * R + heads, m)
        tl.store(partial_stats + 3 * R + heads, total)
