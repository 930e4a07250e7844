"""Summaries: which slot each row uses (once a step, for all layers), and adding pages to them (each layer).

Twins of ``reference.plan_summaries`` and ``reference.absorb_pages``; the tags and the plan are described there.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.reference.summary import LOOKBACK as PAGES
from vllm_rc_backend.kernels.triton.matmul import as_operand, dot
from vllm_rc_backend.kernels.triton.paged import page_of, token_rows
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end

LOOKBACK = tl.constexpr(PAGES)
BACK = tl.constexpr(16)
"""Of these pages, so many are looked up at a time."""


@triton.jit
def _find(slot_page, page_slot, page, mask):
    """The slots tagged with these pages, or -1."""
    slot = tl.load(page_slot + page, mask=mask, other=-1)
    known = slot >= 0
    tag = tl.load(slot_page + tl.maximum(slot, 0), mask=mask & known, other=-1)
    return tl.where(mask & known & (tag == page), slot, -1)


@triton.jit
def plan_kernel(
    slot_page,
    page_slot,
    next_slot,
    block_table,
    seq_lens,
    query_start,
    plan_slot,
    plan_source,
    plan_first,
    plan_last,
    users,
    free,
    rows,
    slots,
    stride_table,
    g: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program. ``users`` int32 ``[slots]`` and ``free`` int32 ``[slots]`` are scratch.

    Steps that hand data from thread to thread go through memory, with a barrier between.
    """
    row = tl.arange(0, ROWS)
    real = row < rows
    table = block_table + row.to(tl.int64) * stride_table
    seq_len = tl.load(seq_lens + row, mask=real, other=0)
    query_end = tl.load(query_start + row + 1, mask=real, other=0)
    query_len = query_end - tl.load(query_start + row, mask=real, other=0)

    slot_id = tl.arange(0, SLOTS)
    tl.store(users + slot_id, 0, mask=slot_id < slots)
    begin = (seq_len - query_len) // g.page_size
    count = tl.where(real, seq_len // g.page_size - begin, 0)
    for i in range(tl.max(count, 0)):
        stale = page_of(table, begin + i, i < count, g)
        tl.store(page_slot + stale, -1, mask=i < count)
    tl.debug_barrier()

    wants = real & (query_len == 1) & is_sparse(seq_len, g)
    last = mid_end(seq_len, g)
    before = mid_end(seq_len - 1, g)
    last_page = page_of(table, tl.maximum(last - 1, 0), wants, g)
    slot = _find(slot_page, page_slot, last_page, wants)
    held = slot >= 0
    grows = wants & (slot < 0) & (before > g.sink_pages)
    source = _find(slot_page, page_slot, page_of(table, tl.maximum(before - 1, 0), grows, g), grows)
    first = tl.where(source >= 0, before, g.sink_pages)
    seeks = (grows & (source < 0)).to(tl.int32)
    back = 1
    while (tl.max(seeks, 0) > 0) & (back < LOOKBACK):
        nth = back + tl.arange(0, BACK)[None, :]
        ends = before[:, None] - nth
        there = (seeks[:, None] > 0) & (ends > g.sink_pages) & (nth < LOOKBACK)
        known = _find(slot_page, page_slot, page_of(table[:, None], tl.maximum(ends - 1, 0), there, g), there)
        latest = tl.max(tl.where(known >= 0, ends, 0), 1)
        source = tl.maximum(source, tl.max(tl.where(ends == latest[:, None], known, -1), 1))
        first = tl.where(latest > 0, latest, first)
        seeks = tl.where((latest > 0) | (before - back - BACK < g.sink_pages), 0, seeks)
        back += BACK
    extends = source >= 0
    tl.atomic_add(users + tl.where(held, slot, tl.maximum(source, 0)), 1, mask=held | extends, sem="relaxed")
    tl.debug_barrier()

    alone = extends & (tl.load(users + tl.maximum(source, 0), mask=extends, other=0) == 1)
    start = tl.load(next_slot)
    turned = (start + slot_id) % slots  # the oldest states go first
    is_free = (slot_id < slots) & (tl.load(users + turned, mask=slot_id < slots, other=1) == 0)
    n_free = tl.sum(is_free.to(tl.int32), 0)
    tl.store(free + tl.cumsum(is_free.to(tl.int32), 0) - 1, turned, mask=is_free)
    tl.debug_barrier()

    needs = wants & (slot < 0) & (alone == 0)
    place = tl.cumsum(needs.to(tl.int32), 0) - 1
    gets = needs & (place < n_free)
    fresh = tl.load(free + place, mask=gets, other=-1)
    assigned = alone | gets
    slot = tl.where(held, slot, tl.where(alone, source, fresh))
    source = tl.where(assigned, source, -1)
    first = tl.where(held, last, first)
    planned = held | assigned
    tl.store(plan_slot + row, slot, mask=real)
    tl.store(plan_source + row, source, mask=real)
    tl.store(plan_first + row, tl.where(planned, first, 0), mask=real)
    tl.store(plan_last + row, tl.where(planned, last, 0), mask=real)

    tl.store(slot_page + slot, last_page, mask=assigned)
    tl.store(page_slot + last_page, slot, mask=assigned)
    taken = tl.sum(gets.to(tl.int32), 0)
    if taken > 0:
        tl.store(next_slot, (tl.load(free + taken - 1) + 1) % slots)


@triton.jit
def absorb_columns(
    kv,
    block_table,
    state,
    source,
    source_slot,
    begin,
    end,
    start,
    key_scale,
    value_scale,
    stride_block,
    stride_token,
    S: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Columns ``[start, start + COLS)`` of a state: tokens ``[begin, end)``, plus ``source`` if its slot is not -1.
    All pointers are to the head.
    """
    g: tl.constexpr = S.geometry
    d: tl.constexpr = S.head_size
    D: tl.constexpr = S.block_d
    rows = tl.arange(0, S.block_d)
    cols = start + tl.arange(0, COLS)
    real_rows = rows < d
    real_cols = cols < d
    C = tl.zeros([D, COLS], tl.float32)
    K1 = tl.zeros([COLS], tl.float32)
    V1 = tl.zeros([COLS], tl.float32)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        real = token < end
        at = kv + token_rows(block_table, token, real, stride_block, stride_token, g)
        keys = as_operand(
            tl.load(at[:, None] + rows[None, :], mask=real[:, None] & real_rows[None, :], other=0.0)
        )
        some = real[:, None] & real_cols[None, :]
        key_columns = tl.load(at[:, None] + cols[None, :], mask=some, other=0.0)
        values = as_operand(tl.load(at[:, None] + d + cols[None, :], mask=some, other=0.0))
        # Scaled before it is added, and so added in float32: matrix units truncate what they add up, always downwards.
        C += dot(tl.trans(keys), values, tl.zeros([D, COLS], tl.float32)) * (key_scale * value_scale)
        K1 += tl.sum(key_columns.to(tl.float32), 0)
        V1 += tl.sum(values.to(tl.float32), 0)
    K1 *= key_scale
    V1 *= value_scale

    LOW: tl.constexpr = S.state_rows * d  # from the high plane to the low one
    tile = rows[:, None] * d + cols[None, :]
    whole = real_rows[:, None] & real_cols[None, :]
    if source_slot >= 0:
        C += load_planes(source + tile, whole, LOW)
        K1 += load_planes(source + d * d + cols, real_cols, LOW)
        V1 += load_planes(source + d * d + d + cols, real_cols, LOW)
    store_planes(state + tile, C, whole, LOW)
    store_planes(state + d * d + cols, K1, real_cols, LOW)
    store_planes(state + d * d + d + cols, V1, real_cols, LOW)


@triton.jit
def load_planes(at, mask, LOW: tl.constexpr):
    """Both planes of a state, the low one ``LOW`` elements after the high one: float32."""
    high = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return high + tl.load(at + LOW, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_planes(at, x, mask, LOW: tl.constexpr):
    """Its inverse."""
    high = x.to(tl.bfloat16)
    tl.store(at, high, mask=mask)
    tl.store(at + LOW, (x - high.to(tl.float32)).to(tl.bfloat16), mask=mask)
