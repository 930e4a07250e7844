"""Summaries: which slot each row uses (once a step, for all layers), and what pages add to them (each layer).

Twins of ``reference.plan_summaries`` and ``reference.absorb_pages``; the tags and the plan are described there.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.reference.summary import LOOKBACK as PAGES
from vllm_rc_backend.kernels.triton.launched import launched
from vllm_rc_backend.kernels.triton.matmul import as_operand, dot
from vllm_rc_backend.kernels.triton.paged import page_of, token_rows
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end

LOOKBACK = tl.constexpr(PAGES)
BACK = tl.constexpr(16)
"""Pages of a row that are looked at at a time."""


@triton.jit
def _find(slot_page, page_slot, page, mask):
    """The slots tagged with these pages, or -1."""
    slot = tl.load(page_slot + page, mask=mask, other=-1)
    known = slot >= 0
    tag = tl.load(slot_page + tl.maximum(slot, 0), mask=mask & known, other=-1)
    return tl.where(mask & known & (tag == page), slot, -1)


@launched
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
    decodes,
    prefills,
    free,
    rows,
    slots,
    stride_table,
    g: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program. ``decodes``, ``prefills`` and ``free``, int32 ``[slots]``, are scratch.

    Steps that hand data from thread to thread go through memory, with a barrier between.
    """
    row = tl.arange(0, ROWS)
    real = row < rows
    table = block_table + row.to(tl.int64) * stride_table
    seq_len = tl.load(seq_lens + row, mask=real, other=0)
    query_end = tl.load(query_start + row + 1, mask=real, other=0)
    query_len = query_end - tl.load(query_start + row, mask=real, other=0)

    slot_id = tl.arange(0, SLOTS)
    tl.store(decodes + slot_id, 0, mask=slot_id < slots)
    tl.store(prefills + slot_id, 0, mask=slot_id < slots)
    begin = (seq_len - query_len) // g.page_size
    count = tl.where(real, seq_len // g.page_size - begin, 0)
    # Of a decode one page at most, of a prefill's chunk hundreds.
    tl.store(page_slot + page_of(table, begin, count > 0, g), -1, mask=count > 0)
    for start in range(1, tl.max(count, 0), BACK):
        i = start + tl.arange(0, BACK)[None, :]
        there = i < count[:, None]
        stale = page_of(table[:, None], begin[:, None] + i, there, g)
        tl.store(page_slot + stale, -1, mask=there)
    tl.debug_barrier()

    wants = real & (query_len > 0) & is_sparse(seq_len, g)
    decoding = wants & (query_len == 1)
    prefilling = wants & (query_len > 1)
    last = mid_end(seq_len, g)
    before = tl.minimum(last, begin)
    last_page = page_of(table, tl.maximum(last - 1, 0), wants, g)
    first = tl.where(wants, g.sink_pages, 0)
    source = tl.full([ROWS], -1, tl.int32)
    # Nearly every decode finds its state at the first place, all others that advance at the second.
    for back in tl.static_range(2):
        end = before - back
        asks = wants & (source < 0) & (end > g.sink_pages)
        found = _find(slot_page, page_slot, page_of(table, tl.maximum(end - 1, 0), asks, g), asks)
        source = tl.maximum(source, found)
        first = tl.where(found >= 0, end, first)
    seeks = (wants & (source < 0) & (before - 2 > g.sink_pages)).to(tl.int32)
    back = 2
    while (tl.max(seeks, 0) > 0) & (back < LOOKBACK):
        nth = back + tl.arange(0, BACK)[None, :]
        ends = before[:, None] - nth
        there = (seeks[:, None] > 0) & (ends > g.sink_pages) & (nth < LOOKBACK)
        known = _find(slot_page, page_slot, page_of(table[:, None], tl.maximum(ends - 1, 0), there, g), there)
        latest = tl.max(tl.where(known >= 0, ends, 0), 1)
        source = tl.maximum(source, tl.max(tl.where(ends == latest[:, None], known, -1), 1))
        first = tl.where(latest > 0, latest, first)
        seeks = tl.where((latest > 0) | (before - back - BACK <= g.sink_pages), 0, seeks)
        back += BACK
    looked = tl.maximum(source, 0)
    tl.atomic_add(decodes + looked, 1, mask=decoding & (source >= 0), sem="relaxed")
    tl.atomic_add(prefills + looked, 1, mask=prefilling & (source >= 0), sem="relaxed")
    tl.debug_barrier()

    start = tl.load(next_slot)
    turned = (start + slot_id) % slots  # the oldest states go first
    open_slot = (slot_id < slots) & (tl.load(decodes + turned, mask=slot_id < slots, other=1) == 0)
    lent = open_slot & (tl.load(prefills + turned, mask=open_slot, other=0) > 0)
    idle = open_slot & (lent == 0)
    n_idle = tl.sum(idle.to(tl.int32), 0)
    n_free = tl.sum(open_slot.to(tl.int32), 0)
    tl.store(free + tl.cumsum(idle.to(tl.int32), 0) - 1, turned, mask=idle)
    tl.store(free + n_idle + tl.cumsum(lent.to(tl.int32), 0) - 1, turned, mask=lent)
    others = tl.load(decodes + looked, mask=source >= 0, other=0)
    with_prefills = others + tl.load(prefills + looked, mask=source >= 0, other=0)
    tl.debug_barrier()

    held = decoding & (source >= 0) & (first == last)
    alone = decoding & (source >= 0) & (held == 0) & (others == 1)
    needs = decoding & (held == 0) & (alone == 0)
    place = tl.cumsum(needs.to(tl.int32), 0) - 1
    gets = needs & (place < n_free)
    slot = tl.where(held | alone, source, tl.load(free + place, mask=gets, other=-1))
    tl.store(slot_page + slot, last_page, mask=alone | gets)
    tl.store(page_slot + last_page, slot, mask=alone | gets)
    taken = tl.sum(gets.to(tl.int32), 0)
    planned = held | alone | gets
    tl.debug_barrier()

    extends = prefilling & (source >= 0)
    held_page = page_of(table, tl.maximum(first - 1, 0), extends, g)
    replaced = extends & (tl.load(slot_page + looked, mask=extends, other=-1) != held_page)
    source = tl.where(replaced, -1, source)
    first = tl.where(replaced, g.sink_pages, first)
    extends = extends & (replaced == 0)
    tl.debug_barrier()  # all of them have looked before any replaces

    held = extends & (first == last)
    alone = extends & (held == 0) & (with_prefills == 1)
    needs = prefilling & (held == 0) & (alone == 0)
    place = taken + tl.cumsum(needs.to(tl.int32), 0) - 1
    gets = needs & (place < n_idle)
    fresh = tl.load(free + place, mask=gets, other=-1)
    slot = tl.where(prefilling, tl.where(held | alone, source, fresh), slot)
    tl.store(slot_page + slot, last_page, mask=alone | gets)
    tl.store(page_slot + last_page, slot, mask=alone | gets)
    taken += tl.sum(gets.to(tl.int32), 0)
    planned = planned | held | alone | gets

    tl.store(plan_slot + row, slot, mask=real)
    tl.store(plan_source + row, tl.where(planned, source, -1), mask=real)
    tl.store(plan_first + row, tl.where(planned, first, 0), mask=real)
    tl.store(plan_last + row, tl.where(planned, last, 0), mask=real)
    if taken > 0:
        tl.store(next_slot, (tl.load(free + taken - 1) + 1) % slots)


@triton.jit
def sum_columns(
    kv,
    block_table,
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
    """Columns ``[start, start + COLS)`` of a state over tokens ``[begin, end)``. ``kv`` points to the head.

    Returns:
        C float32 ``[block_d, COLS]``, K1 and V1 ``[COLS]``.
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
    return C, K1 * key_scale, V1 * value_scale


@triton.jit
def add_columns(C, K1, V1, state, source, source_slot, start, S: tl.constexpr, COLS: tl.constexpr):
    """Write columns of a state: these sums, plus ``source`` if its slot is not -1. Pointers are to the head."""
    d: tl.constexpr = S.head_size
    rows = tl.arange(0, S.block_d)
    cols = start + tl.arange(0, COLS)
    real_cols = cols < d
    LOW: tl.constexpr = S.state_rows * d  # from the high plane to the low one
    tile = rows[:, None] * d + cols[None, :]
    whole = (rows < d)[:, None] & real_cols[None, :]
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
