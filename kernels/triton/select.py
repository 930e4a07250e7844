"""Page scores and the Top-K pages of each (row, KV head), in one launch: twin of ``reference.score_pages`` and
``reference.select_pages``.

Programs score the pages of a (row, head) between them; the last to arrive selects. For long contexts the selection is
exact in two levels: the k groups of neighbouring pages with the largest maxima contain the k best pages (a page outside
them is beaten by k pages), so it looks at the maxima and then only at the pages of k groups.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.matmul import dot
from vllm_rc_backend.kernels.triton.paged import page_of
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end, retrieved_pages
from vllm_rc_backend.kernels.triton.topk import LOWEST, _load, chosen, ordered_key, threshold

INT8_PLANE = tl.constexpr(16256.0)  # 127 * 128: the largest sum of two planes of 8 and 7 bits


@triton.jit
def _planes(x, dtype: tl.constexpr):
    """Two narrow planes that together keep the query to 14 bits or more, and the factor of their sum.

    Args:
        x: float32 ``[n, d]``.

    Returns:
        high, low ``[n, d]`` of the statistics' type, and float32 ``[n]``.
    """
    if dtype == tl.int8:
        scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-30) / INT8_PLANE
        whole = tl.floor(x / scale[:, None] + 0.5).to(tl.int32)
        high = (whole + 64) >> 7
        low = whole - (high << 7)
    else:
        scale = tl.full([x.shape[0]], 1.0, tl.float32)
        high = x.to(dtype)
        low = x - high.to(tl.float32)
    return high.to(dtype), low.to(dtype), scale


@triton.jit
def _products(codes, scales, index, high, low, factor, mask, S: tl.constexpr):
    """Dot products of one statistic of some pages with the query heads: float32 ``[pages, n]``."""
    cols = tl.arange(0, S.block_d)
    x = tl.load(
        codes + index[:, None] * S.head_size + cols[None, :],
        mask=mask[:, None] & (cols < S.head_size)[None, :],
        other=0,
    )
    if codes.dtype.element_ty == tl.int8:
        sums = tl.dot(x, tl.trans(high), out_dtype=tl.int32) * 128 + tl.dot(
            x, tl.trans(low), out_dtype=tl.int32
        )
        unit = tl.load(scales + index, mask=mask, other=0.0).to(tl.float32)
        result = sums.to(tl.float32) * unit[:, None] * factor[None, :]
    else:
        result = tl.zeros([index.shape[0], high.shape[0]], tl.float32)
        result = dot(x, tl.trans(low), dot(x, tl.trans(high), result))
    return result


@triton.jit
def _select(
    keys, maxima, selected, block_table, pages, k, S: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr
):
    """Physical ids of the k best of ``pages`` scored pages, ascending in the sequence, written to ``selected``."""
    g: tl.constexpr = S.geometry
    n = pages
    if GROUP > 1:
        n = tl.cdiv(pages, GROUP)
        if n > k:
            BLOCK: tl.constexpr = BLOCKS[0][0]
            t, above = threshold(maxima, maxima, n, n, k, 1, BLOCK, BLOCKS[0][1])
            ties, base = k - above, 0
            for start in range(0, n, BLOCK):
                index, x = _load(maxima, maxima, start, n, n, 1, BLOCK)
                take, place, new_above, new_ties = chosen(x, t, ties)
                # The list replaces the maxima: it never gets ahead of what is still to be read.
                tl.store(maxima + base + place, index, mask=take & (index < n))
                base += new_above + tl.minimum(new_ties, ties)
                ties -= tl.minimum(new_ties, ties)
        else:
            for start in range(0, n, BLOCKS[0][0]):
                i = start + tl.arange(0, BLOCKS[0][0])
                tl.store(maxima + i, i, mask=i < n)
        tl.debug_barrier()
        n = tl.minimum(n, k) * GROUP
    BLOCK_P: tl.constexpr = BLOCKS[1][0]
    t, above = threshold(keys, maxima, n, pages, k, GROUP, BLOCK_P, BLOCKS[1][1])
    ties, base = k - above, 0
    for start in range(0, n, BLOCK_P):
        index, x = _load(keys, maxima, start, n, pages, GROUP, BLOCK_P)
        take, place, new_above, new_ties = chosen(x, t, ties)
        take = take & (start + tl.arange(0, BLOCK_P) < n) & (index < pages)
        tl.store(selected + base + place, page_of(block_table, index + g.sink_pages, take, g), mask=take)
        base += new_above + tl.minimum(new_ties, ties)
        ties -= tl.minimum(new_ties, ties)


@triton.jit
def select_kernel(
    query,
    codes,
    scales,
    block_table,
    seq_lens,
    keys,
    maxima,
    selected,
    arrivals,
    counters,
    scale,
    stride_row,
    stride_query_head,
    stride_table,
    max_pages,
    max_groups,
    max_selected,
    S: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (splits, heads, rows). Rows that are not sparse end at once.

    Args:
        query: ``[rows, heads * group, head_size]``, unscaled.
        codes, scales: the side store.
        keys: int32 ``[rows, heads, max_pages]`` scratch: ordered scores of the mid region's pages.
        maxima: int32 ``[rows, heads, max_groups]`` scratch: their maxima over GROUP neighbours.
        selected: int32 ``[rows, heads, max_selected]`` out: physical page ids.
        arrivals: int32 ``[rows, heads]``, zero between launches.
        counters: int64, see ``attention_triton.COUNTERS``.
    """
    g: tl.constexpr = S.geometry
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + row)
    pages = mid_end(seq_len, g) - g.sink_pages
    splits = tl.minimum(tl.num_programs(0), tl.cdiv(pages, TILE))
    if is_sparse(seq_len, g) & (split < splits):
        lane = row.to(tl.int64) * S.heads + head
        keys += lane * max_pages
        maxima += lane * max_groups
        block_table += row.to(tl.int64) * stride_table

        heads = tl.arange(0, S.block_n)
        cols = tl.arange(0, S.block_d)
        member = heads < S.group
        q = tl.load(
            query
            + row.to(tl.int64) * stride_row
            + (head * S.group + heads)[:, None] * stride_query_head
            + cols[None, :],
            mask=member[:, None] & (cols < S.head_size)[None, :],
            other=0.0,
        )
        q = q.to(tl.float32) * scale
        high, low, factor = _planes(q, codes.dtype.element_ty)
        if S.vectors == 2:
            if S.query_map == "abs":
                mapped = tl.abs(q)
            else:
                mapped = q * q
            high2, low2, factor2 = _planes(mapped * S.spread_weight, codes.dtype.element_ty)

        for tile in range(split, tl.cdiv(pages, TILE), splits):
            i = tile * TILE + tl.arange(0, TILE)
            real = i < pages
            page = page_of(block_table, i + g.sink_pages, real, g).to(tl.int64)
            index = (page * S.heads + head) * S.vectors
            scores = _products(codes, scales, index, high, low, factor, real, S)
            if S.vectors == 2:
                scores += _products(codes, scales, index + 1, high2, low2, factor2, real, S)
            if S.group_rule == "max":
                best = tl.max(tl.where(member[None, :], scores, float("-inf")), 1)
            else:
                best = tl.sum(tl.where(member[None, :], scores, 0.0), 1) / S.group
            key = tl.where(real, ordered_key(best), LOWEST)
            tl.store(keys + i, key, mask=real)
            if GROUP > 1:
                top = tl.max(tl.reshape(key, [TILE // GROUP, GROUP]), 1)
                j = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
                tl.store(maxima + j, top, mask=j * GROUP < pages)

        tl.debug_barrier()  # all of this program's keys are written before it arrives
        if tl.atomic_add(arrivals + lane, 1, sem="acq_rel") == splits - 1:
            tl.store(arrivals + lane, 0)
            _select(
                keys,
                maxima,
                selected + lane * max_selected,
                block_table,
                pages,
                retrieved_pages(seq_len, g),
                S,
                GROUP,
                BLOCKS,
            )
            if head == 0:
                tl.atomic_add(counters + 5, pages.to(tl.int64))
