"""Page scores and the Top-K pages of each (row, KV head), in one launch: twin of ``reference.score_pages`` and
``reference.select_pages``.

Programs score the pages of a (row, head) between them; the last to arrive selects. For long contexts the selection is
exact in two levels: the k groups of neighbouring pages with the largest maxima contain the k best pages (a page outside
them is beaten by k pages), so it looks at the maxima and then only at the pages of k groups.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.matmul import dot
from vllm_rc_backend.kernels.triton.overlap import let_next_start, wait_for_previous
from vllm_rc_backend.kernels.triton.paged import page_of
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end, retrieved_pages
from vllm_rc_backend.kernels.triton.runs import query_parts, run_scores
from vllm_rc_backend.kernels.triton.topk import (
    HIGHEST,
    LOWEST,
    load_keys,
    ordered_key,
    running_counts,
    threshold,
    threshold_in_memory,
)

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
def _products(codes, index, unit, high, low, factor, mask, S: tl.constexpr):
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
        result = sums.to(tl.float32) * unit[:, None] * factor[None, :]
    else:
        result = tl.zeros([index.shape[0], high.shape[0]], tl.float32)
        result = dot(x, tl.trans(low), dot(x, tl.trans(high), result))
    return result


@triton.jit
def _units(scales, index, mask, S: tl.constexpr):
    """The factors of a page's int8 vectors: float32 ``[pages]`` twice (the same one twice if there is one)."""
    if S.vectors == 2:
        # Neighbours in memory: one load of 32 bits, which can go to shared memory asynchronously.
        both = tl.load((scales + index).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        first = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = ((both >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = tl.load(scales + index, mask=mask, other=0.0).to(tl.float32)
        second = first
    return first, second


@triton.jit
def _place(what, x, real, t, ties, base, out):
    """Write what is above t, and the first ``ties`` keys equal to it, to ``out`` from ``base`` on.

    Returns how many keys up to each are above t, and how many equal it.
    """
    above, equal = running_counts(x, t)
    place = base + above + tl.minimum(equal, ties) - 1
    take = real & ((x > t) | ((x == t) & (equal <= ties)))
    tl.store(out + place, what, mask=take)
    return above, equal


@triton.jit
def _top(
    keys,
    groups,
    n,
    limit,
    k,
    low,
    high,
    out,
    table,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    FINAL: tl.constexpr,
    S: tl.constexpr,
):
    """The k largest of n keys in order of position, to ``out``: positions, or if FINAL the physical ids of those pages.

    Returns bounds of the keys that may still be among the k best.
    """
    g: tl.constexpr = S.geometry
    if SINGLE:
        index, x, real = load_keys(keys, groups, 0, n, limit, GROUP, BLOCK)
        if FINAL:
            index = page_of(
                table, index + g.sink_pages, real, g
            )  # before the search, which hides its latency
        if not FINAL or GROUP == 1:
            low = tl.min(tl.where(real, x, HIGHEST), 0)
            high = tl.max(x, 0) + 1
        t = threshold(x, k, low, high)
        ties = k - tl.sum((x > t).to(tl.int32), 0)
        _place(index, x, real, t, ties, 0, out)
    else:
        t, all_above = threshold_in_memory(keys, groups, n, limit, k, low, high, GROUP, BLOCK)
        ties, base = k - all_above, 0
        for start in range(0, n, BLOCK):
            index, x, real = load_keys(keys, groups, start, n, limit, GROUP, BLOCK)
            if FINAL:
                index = page_of(table, index + g.sink_pages, real, g)
            above, equal = _place(index, x, real, t, ties, base, out)
            used = tl.minimum(tl.max(equal, 0), ties)
            base += tl.max(above, 0) + used
            ties -= used
    return t, high


@triton.jit
def _select(
    keys, maxima, selected, table, pages, k, S: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr
):
    """Physical ids of the k best of ``pages`` scored pages, ascending in the sequence, written to ``selected``."""
    low, high = tl.full([], LOWEST, tl.int32), tl.full([], HIGHEST, tl.int32)
    n = pages
    if GROUP > 1:
        groups = tl.cdiv(pages, GROUP)
        if groups > k:
            # The list of groups replaces the maxima: it never gets ahead of what is still to be read.
            low, high = _top(
                maxima,
                maxima,
                groups,
                groups,
                k,
                low,
                high,
                maxima,
                table,
                1,
                BLOCKS[0][0],
                BLOCKS[0][1],
                False,
                S,
            )
        else:
            for start in range(0, groups, BLOCKS[0][0]):
                i = start + tl.arange(0, BLOCKS[0][0])
                tl.store(maxima + i, i, mask=i < groups)
        tl.debug_barrier()
        n = tl.minimum(groups, k) * GROUP
    _top(keys, maxima, n, pages, k, low, high, selected, table, GROUP, BLOCKS[1][0], BLOCKS[1][1], True, S)


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
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (heads, splits, rows): heads first, whose statistics of a page are neighbours in memory. Rows that are
    not sparse end at once.

    Args:
        query: ``[rows, heads * group, head_size]``, unscaled.
        codes, scales: the side store.
        keys: int32 ``[rows, heads, max_pages]`` scratch: ordered scores of the mid region's pages.
        maxima: int32 ``[rows, heads, max_groups]`` scratch: their maxima over GROUP neighbours.
        selected: int32 ``[rows, heads, max_selected]`` out: physical page ids.
        arrivals: int32 ``[rows, heads]``, zero between launches.
        counters: int64, see ``attention_triton.COUNTERS``.
    """
    let_next_start(OVERLAP)
    g: tl.constexpr = S.geometry
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + row)
    pages = mid_end(seq_len, g) - g.sink_pages
    splits = tl.minimum(tl.num_programs(1), tl.cdiv(pages, TILE))
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
        if S.query_map == "runs":
            first, second, third, fourth, factor, offset = query_parts(q, S)
        else:
            high, low, factor = _planes(q, codes.dtype.element_ty)
        if S.vectors == 2:
            if S.query_map == "abs":
                mapped = tl.abs(q)
            else:
                mapped = q * q
            high2, low2, factor2 = _planes(mapped * S.spread_weight, codes.dtype.element_ty)

        # num_stages on the loop: also the loads that feed no matrix product are issued ahead.
        for tile in tl.range(split, tl.cdiv(pages, TILE), splits, num_stages=STAGES):
            i = tile * TILE + tl.arange(0, TILE)
            real = i < pages
            page = page_of(block_table, i + g.sink_pages, real, g).to(tl.int64)
            index = (page * S.heads + head) * S.vectors
            if S.query_map == "runs":
                scores = run_scores(
                    codes, scales, index, first, second, third, fourth, factor, offset, real, S, TILE
                )
            else:
                unit, unit2 = factor, factor
                if codes.dtype.element_ty == tl.int8:
                    unit, unit2 = _units(scales, index, real, S)
                scores = _products(codes, index, unit, high, low, factor, real, S)
            if S.vectors == 2:
                scores += _products(codes, index + 1, unit2, high2, low2, factor2, real, S)
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
                tl.atomic_add(counters + 5, pages.to(tl.int64), sem="relaxed")
    wait_for_previous(OVERLAP)  # what this kernel's end vouches for
