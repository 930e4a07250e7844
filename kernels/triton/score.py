"""Scores of the mid region's pages: twin of ``reference.score_pages`` and of the sum in ``reference.unread_log_mass``.

A program scores some of a (row, KV head)'s pages. It leaves an ordered key for each page and the maxima of neighbouring
keys; for the completion ``paged`` also each query head's score of the page, and their log-sum-exp over its pages. With
the group rule ``share`` these come in place of the keys, and maxima are of each head's scores. Scores are in base 2
here.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.linear import LOG2_E
from vllm_rc_backend.kernels.triton.mass import add_masses
from vllm_rc_backend.kernels.triton.matmul import INTERPRETED, dot
from vllm_rc_backend.kernels.triton.paged import page_in
from vllm_rc_backend.kernels.triton.runs import query_parts, run_scores
from vllm_rc_backend.kernels.triton.topk import ordered_key

INT8_PLANE = tl.constexpr(16256.0)  # 127 * 128: the largest sum of two planes of 8 and 7 bits
LARGEST = tl.constexpr(60000.0)  # a float16 holds it; beyond it nothing else has any weight


@triton.jit
def _planes(x, dtype: tl.constexpr):
    """Two narrow planes that together keep the query to 14 bits or more, and the factor of their sum.

    Args:
        x: float32 ``[d, n]``.

    Returns:
        high, low ``[d, n]`` of the statistics' type, and float32 ``[n]``.
    """
    if dtype == tl.int8:
        scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-30) / INT8_PLANE
        whole = tl.floor(x / scale[None, :] + 0.5).to(tl.int32)
        high = (whole + 64) >> 7
        low = whole - (high << 7)
    else:
        scale = tl.full([x.shape[1]], 1.0, tl.float32)
        high = x.to(dtype)
        low = x - high.to(tl.float32)
    return high.to(dtype), low.to(dtype), scale


@triton.jit
def _products(codes, index, unit, high, low, factor, S: tl.constexpr):
    """Dot products of one statistic of some pages with the query heads: float32 ``[pages, n]``."""
    cols = tl.arange(0, S.block_d)
    at = codes + index[:, None] * S.head_size + cols[None, :]
    if S.block_d == S.head_size:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(index >= 0)[:, None] & (cols < S.head_size)[None, :], other=0)
    if codes.dtype.element_ty == tl.int8:
        sums = tl.dot(x, high, out_dtype=tl.int32) * 128 + tl.dot(x, low, out_dtype=tl.int32)
        result = sums.to(tl.float32) * unit[:, None] * factor[None, :]
    else:
        result = tl.zeros([index.shape[0], high.shape[1]], tl.float32)
        result = dot(x, high, dot(x, low, result))
    return result


@triton.jit
def _units(scales, index, S: tl.constexpr):
    """The factors of a page's int8 vectors: float32 ``[pages]`` twice (the same one twice if there is one)."""
    if S.vectors == 2:
        # Neighbours in memory: one load of 32 bits, which can go to shared memory asynchronously.
        both = tl.load((scales + index).to(tl.pointer_type(tl.int32)))
        first = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = ((both >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = tl.load(scales + index).to(tl.float32)
        second = first
    return first, second


@triton.jit
def _tile_pages(block_table, start, pages, g: tl.constexpr, TILE: tl.constexpr):
    """Physical pages of ``[start, start + TILE)`` of the mid region's ``pages``: int32 ``[TILE]``, of every 16 first
    those at even places. A thread has rows 0 and 8, 1 and 9, ... of a matrix product, and so neighbours.

    Beyond the last page it is the last one again, so that no load of statistics needs a mask; nothing is stored there.
    """
    row = tl.arange(0, TILE)
    i = start + row // 16 * 16 + row % 8 * 2 + row % 16 // 8
    page = tl.minimum(i, pages - 1) + g.sink_pages
    return page_in(_constant(block_table + page // g.pages_per_block), page, g)


@triton.jit
def _constant(at):
    """int32 numbers that do not change while the kernel runs. In a loop that is pipelined it stays where it is; a load
    would be taken to where its answer is needed."""
    if INTERPRETED:
        result = tl.load(at)
    else:
        result = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _copy(x):
    """An int32 as an instruction gives it: a loop that passes something on as it is is not pipelined."""
    if INTERPRETED:
        result = x
    else:
        result = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _page_order(x, TILE: tl.constexpr):
    """Rows ``[TILE, n]`` in the order of ``_tile_pages`` to the order of pages."""
    N: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [TILE // 16, 2, 8, N]), (0, 2, 1, 3)), [TILE, N])


@triton.jit
def score_pages(
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
    splits,
    keys,
    maxima,
    head_scores,
    masses,
    scale,
    S: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Score every ``splits``-th tile of the mid region's ``pages``.

    Args:
        query: points to the first query head of the KV head.
        matrix, places: for ``runs``, from ``runs.hadamard`` and ``runs.query_places``; otherwise None.
        block_table: points to the row.
        keys, maxima, head_scores: point to the (row, head): int32 ``[pages]``, int32 ``[pages / GROUP]`` and float16
            ``[pages, group]`` out. With ``share`` there are no keys, and maxima are float16 ``[pages / GROUP, group]``.
        masses: points to the (row, head, split): float32 ``[2, block_n]`` out, maximum and sum.
        scale: the softmax scale.
    """
    g: tl.constexpr = S.geometry
    N: tl.constexpr = S.block_n  # Triton 3.6 takes no plain int in a shape
    heads = tl.arange(0, N)
    cols = tl.arange(0, S.block_d)
    member = heads < S.group
    step = splits * TILE
    # Of two tiles, underway while the query is rotated. Asked for one tile ahead only, the answer may be waited for at
    # the start of the next round by an instruction that the compiler has put there.
    page = _tile_pages(block_table, split * TILE, pages, g, TILE)
    next_page = _tile_pages(block_table, split * TILE + step, pages, g, TILE)
    if S.query_map == "runs":
        first, second, third, fourth, factor, begin = query_parts(matrix, places, S)
        factor *= scale * LOG2_E
    else:
        q = tl.load(
            query + heads[None, :] * stride_query_head + cols[:, None],
            mask=member[None, :] & (cols < S.head_size)[:, None],
            other=0.0,
        )
        q = q.to(tl.float32) * scale
        high, low, factor = _planes(q, codes.dtype.element_ty)
    if S.query_map == "abs":
        high2, low2, factor2 = _planes(tl.abs(q) * S.spread_weight, codes.dtype.element_ty)
    if S.query_map == "square":
        high2, low2, factor2 = _planes(q * q * S.spread_weight, codes.dtype.element_ty)

    m = tl.full([TILE // 2, N], -LARGEST, tl.float32)
    total = tl.zeros([TILE // 2, N], tl.float32)
    if not S.by_share:
        # Keys and maxima of the first tile, side by side: one store for both takes one barrier.
        row, is_top = tl.arange(0, TILE)[:, None], tl.arange(0, 2)[None, :] == 1
        key_at = tl.where(is_top, maxima + row // GROUP, keys + row)
        is_first = (row % GROUP == 0) | (is_top == 0)
    # num_stages on the loop: also the loads that feed no matrix product are issued ahead.
    for start in tl.range(split * TILE, pages, step, num_stages=STAGES):
        i = start + tl.arange(0, TILE)
        real = tl.arange(0, TILE) < pages - start
        index = (page.to(tl.int64) * S.heads + head) * S.vectors
        if S.query_map == "runs":
            scores = run_scores(codes, scales, index, first, second, third, fourth, factor, begin, S, TILE)
        else:
            unit, unit2 = factor, factor
            if codes.dtype.element_ty == tl.int8:
                unit, unit2 = _units(scales, index, S)
            scores = _products(codes, index, unit, high, low, factor, S)
            if S.vectors == 2:
                scores += _products(codes, index + 1, unit2, high2, low2, factor2, S)
            scores *= LOG2_E
        page = _copy(next_page)
        next_page = _tile_pages(block_table, start + 2 * step, pages, g, TILE)
        scores = _page_order(scores, TILE)
        if not S.by_share:
            if S.group_rule == "mean":
                group_score = tl.sum(tl.where(member[None, :], scores, 0.0), 1) / S.group
            else:
                counted = tl.where(member[None, :], scores, float("-inf"))
                group_score = tl.max(counted, 1)
                if S.group_rule == "sum":
                    group_score += tl.log2(tl.sum(tl.exp2(counted - group_score[:, None]), 1))
            key = ordered_key(group_score)
            if GROUP > 1:
                top = tl.max(tl.reshape(key, [TILE // GROUP, GROUP]), 1)
                top = tl.reshape(tl.broadcast_to(top[:, None], [TILE // GROUP, GROUP]), [TILE])
                at = key_at + tl.where(is_top, start // GROUP, start)
                tl.store(at, tl.join(key, top), mask=real[:, None] & is_first)
            else:
                tl.store(keys + i, key, mask=real)
        if S.keeps_scores:
            # Rounded before it is summed: what is subtracted for the retrieved pages later must be what was added.
            rounded = tl.minimum(tl.maximum(scores, -LARGEST), LARGEST).to(tl.float16)
            tl.store(
                head_scores + i[:, None] * S.group + heads[None, :],
                rounded,
                mask=real[:, None] & member[None, :],
            )
            x = tl.where(real[:, None], rounded.to(tl.float32), float("-inf"))
            pairs = tl.reshape(x, [TILE // 2, 2, N])  # of a thread, which then rescales its sum once for both
            new_m = tl.maximum(m, tl.max(pairs, 1))
            total = total * tl.exp2(m - new_m) + tl.sum(tl.exp2(pairs - new_m[:, None, :]), 1)
            m = new_m
            if S.by_share and GROUP > 1:
                top = tl.max(tl.reshape(x, [TILE // GROUP, GROUP, N]), 1)
                j = start // GROUP + tl.arange(0, TILE // GROUP)
                tl.store(
                    maxima + j[:, None] * S.group + heads[None, :],
                    top.to(tl.float16),
                    mask=(j * GROUP < pages)[:, None] & member[None, :],
                )
    if S.keeps_scores:
        m, total = tl.reduce((m, total), 0, add_masses)
        tl.store(masses + heads, m)
        tl.store(masses + N + heads, total)
