"""The page cache on the device, without a word to the host: twin of ``reference.page_cache``.

Five launches, all of fixed size. ``truncate_pages_kernel`` once a step, for all layers: entries are cut off before the
tokens that the step writes. Then in each layer, between the page scores and attention: ``choose_kernel`` selects the
pages, ``find_pages_kernel`` looks up what each (row, KV head) reads, ``take_slots_kernel`` makes entries for what has
none, ``fetch_pages_kernel`` copies the missing tokens. That order keeps it right: when slots are taken, all entries
that this step reads are marked, and none of them is.

Which entry goes is decided by second chance (the "clock" algorithm; Corbató, "A Paging Experiment with the Multics
System", 1968): a hand goes round the slots and takes those that were not used since it last passed. ``used`` has the
step of a slot's last use, negative once the hand has passed it.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.choose import choose_pages
from vllm_rc_backend.kernels.triton.launched import launched
from vllm_rc_backend.kernels.triton.paged import page_of, page_rows
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end, retrieved_pages

LARGEST_STEP = tl.constexpr(2**31 - 1)
ABSENT = tl.constexpr(-2)
CLAIMED = tl.constexpr(-1)
SPAN = tl.constexpr(256)
"""A page's tokens to fetch are kept as ``begin + SPAN * end``."""


@launched
def truncate_pages_kernel(
    page_slot,
    filled,
    now,
    block_table,
    seq_lens,
    query_start,
    stride_table,
    stride_layer,
    stride_slots,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    g: tl.constexpr,
):
    """Grid (pages that a row may write to, rows): twin of ``PageCache.truncate``. Also begins the step.

    Args:
        page_slot: int32 ``[layers, pages, heads]``, the slot of an entry, ABSENT if there is none.
        filled: int32 ``[layers, slots]``, tokens that an entry holds.
        now: int32 ``[1]``, the step's number, from 1 on; begins anew after months.
        seq_lens: int32 ``[rows]``, 0 in padding rows.
        query_start: int32 ``[rows + 1]``.
    """
    nth, row = tl.program_id(0), tl.program_id(1)
    if (nth == 0) & (row == 0):
        tl.store(now, tl.load(now) % LARGEST_STEP + 1)
    seq_len = tl.load(seq_lens + row)
    first = seq_len - (tl.load(query_start + row + 1) - tl.load(query_start + row))
    logical = tl.maximum(first, 0) // g.page_size + nth
    if logical * g.page_size < seq_len:
        page = page_of(block_table + row.to(tl.int64) * stride_table, logical, seq_len > 0, g)
        kept = tl.maximum(first - logical * g.page_size, 0)
        for start in tl.static_range(0, LAYERS * HEADS, BLOCK):
            i = start + tl.arange(0, BLOCK)
            layer = (i // HEADS).to(tl.int64)
            real = i < LAYERS * HEADS
            at = page_slot + layer * stride_layer + page.to(tl.int64) * HEADS + i % HEADS
            slot = tl.load(at, mask=real, other=ABSENT)
            there = real & (slot >= 0)
            held = filled + layer * stride_slots + slot
            tl.store(held, kept, mask=there & (tl.load(held, mask=there, other=0) > kept))


@triton.jit
def _reading_order(chosen, block_table, seq_len, i, real, g: tl.constexpr):
    """Physical pages at places ``i`` of the reading order, and how many of their tokens there are.

    First the chosen pages, then the sink's, then those from the tail on; of a row that is not sparse, all pages.
    """
    sparse = is_sparse(seq_len, g)
    n_retrieved = tl.where(sparse, retrieved_pages(seq_len, g), 0)
    resume = tl.where(sparse, mid_end(seq_len, g), g.sink_pages)
    retrieved = i < n_retrieved
    anchor = i - n_retrieved
    logical = tl.where(anchor < g.sink_pages, anchor, anchor - g.sink_pages + resume)
    place = tl.load(chosen + i, mask=real & retrieved, other=0)
    logical = tl.where(retrieved, place + g.sink_pages, logical)
    return page_of(block_table, logical, real, g), tl.minimum(seq_len - logical * g.page_size, g.page_size)


@triton.jit
def pages_read(seq_len, g: tl.constexpr):
    """Pages in a row's reading order."""
    sparse = is_sparse(seq_len, g)
    tail = tl.cdiv(seq_len, g.page_size) - mid_end(seq_len, g)
    return tl.where(sparse, retrieved_pages(seq_len, g) + g.sink_pages + tail, tl.cdiv(seq_len, g.page_size))


@triton.jit
def cached_rows(pool, content, reading, j, real, stride_block, stride_token, S: tl.constexpr):
    """Addresses of the tokens at positions ``j`` of the reading order: in the page cache, or else in the pool.

    Args:
        pool: of this KV head.
        reading: int32 ``[max_read]`` of this (row, head), from the kernels below.
    """
    g: tl.constexpr = S.geometry
    where = tl.load(reading + j // g.page_size, mask=real, other=0)
    token = j % g.page_size
    copy = content + (where.to(tl.int64) * g.page_size + token) * (2 * S.head_size)
    page = pool + page_rows(tl.maximum(-1 - where, 0), token, stride_block, stride_token, g)
    return tl.where(where >= 0, copy, page)


@launched
def choose_kernel(
    keys,
    maxima,
    masses,
    groups,
    chosen,
    seq_lens,
    max_pages,
    max_groups,
    max_selected,
    scorers,
    S: tl.constexpr,
    MASSES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Grid (heads, rows): all pages of a (row, head), before they are looked up. Arguments as ``decode_kernel``;
    ``groups`` is int32 ``[rows, heads, max_selected]``.
    """
    g: tl.constexpr = S.geometry
    head, row = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    lane = row.to(tl.int64) * S.heads + head
    if is_sparse(seq_len, g):
        k = retrieved_pages(seq_len, g)
        choose_pages(
            keys + lane * max_pages * S.key_width,
            maxima + lane * max_groups * S.key_width,
            masses + lane * scorers * (2 * S.block_n),
            scorers,
            groups + lane * max_selected,
            chosen + lane * max_selected,
            mid_end(seq_len, g) - g.sink_pages,
            k,
            0,
            k,
            S,
            MASSES,
            GROUP,
            BLOCK,
            SINGLE,
        )


@launched
def find_pages_kernel(
    chosen,
    block_table,
    seq_lens,
    page_slot,
    filled,
    used,
    now,
    reading,
    spans,
    counters,
    stride_table,
    max_selected,
    max_read,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    g: tl.constexpr,
):
    """Grid (heads, rows): look up what is read and mark it as used.

    Args:
        chosen: int32 ``[rows, heads, max_selected]``, places in the mid region, from ``choose_kernel``.
        page_slot: int32 ``[pages, heads]`` of this layer.
        filled, used: int32 ``[slots]`` of this layer.
        reading: int32 ``[rows, heads, max_read]``, out: for each place of the reading order the slot of its entry, or
            -1 - page where there is none.
        spans: int32 ``[rows, heads, max_read]``, out: tokens that the place lacks, ``begin + SPAN * end``.
        counters: int64 ``[4]``: pages wanted, found, evicted, tokens of a KV head fetched.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    step = tl.load(now)
    count = tl.minimum(pages_read(seq_len, g), max_read)
    lane = row.to(tl.int64) * HEADS + head
    found = 0
    lacking = 0
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        real = i < count
        page, tokens = _reading_order(
            chosen + lane * max_selected,
            block_table + row.to(tl.int64) * stride_table,
            seq_len,
            i,
            real,
            g,
        )
        slot = tl.load(page_slot + page.to(tl.int64) * HEADS + head, mask=real, other=ABSENT)
        there = real & (slot >= 0)
        held = tl.load(filled + slot, mask=there, other=0)
        tl.store(used + slot, step, mask=there)
        tl.store(filled + slot, tokens, mask=there & (held < tokens))
        tl.store(reading + lane * max_read + i, tl.where(there, slot, -1 - page), mask=real)
        begin = tl.minimum(held, tokens)
        tl.store(spans + lane * max_read + i, begin + SPAN * tokens, mask=real)
        found += tl.sum(there.to(tl.int32), 0)
        lacking += tl.sum(tl.where(real, tokens - begin, 0), 0)
    tl.atomic_add(counters, count.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 1, found.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 3, lacking.to(tl.int64), sem="relaxed")


@launched
def take_slots_kernel(
    seq_lens,
    page_slot,
    slot_key,
    filled,
    used,
    hand,
    now,
    reading,
    spans,
    taken,
    counters,
    slots,
    max_read,
    most_windows,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    g: tl.constexpr,
):
    """Grid (heads, rows): give slots to pages that have no entry. Where none is free, the page keeps having none.

    Args:
        slot_key: int32 ``[slots]``, page * heads + head, -1 if free.
        hand: int64 ``[1]``, where the next window of slots begins; never reset.
        reading, spans: from ``find_pages_kernel``; ``reading`` gets the slots.
        taken: int32 ``[rows, heads, TILE]`` scratch.
        slots: how many there are, more than 0.
        most_windows: windows of slots that a program looks at before it gives up.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    count = tl.minimum(pages_read(tl.load(seq_lens + row), g), max_read)
    step = tl.load(now)
    lane = row.to(tl.int64) * HEADS + head
    reading += lane * max_read
    spans += lane * max_read
    taken += lane * TILE
    windows = 0
    evicted = 0
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        at = tl.load(reading + i, mask=i < count, other=0)
        key = (-1 - at) * HEADS + head
        # Another row may miss the same page: one of them makes the entry, the others read the pool this time.
        state = tl.atomic_max(page_slot + key, CLAIMED, mask=at < 0)
        mine = (at < 0) & (state == ABSENT)
        wanted = tl.sum(mine.to(tl.int32), 0)
        served = 0
        while (served < wanted) & (windows < most_windows):
            windows += 1
            slot = ((tl.atomic_add(hand, WINDOW, sem="relaxed") + tl.arange(0, WINDOW)) % slots).to(tl.int32)
            last = tl.load(used + slot, cache_modifier=".cg")
            # A second chance for what was used since the hand last passed. By exchange: others pass here, too.
            tl.atomic_cas(
                used + slot, last, tl.where((last > 0) & (last != step), -last, last), sem="relaxed"
            )
            idle = last <= 0
            rank = tl.cumsum(idle.to(tl.int32), 0) - 1
            before = tl.atomic_max(used + slot, step, mask=idle & (rank < wanted - served), sem="relaxed")
            ours = idle & (rank < wanted - served) & (before <= 0)
            tl.store(taken + served + tl.cumsum(ours.to(tl.int32), 0) - 1, slot, mask=ours)
            served += tl.sum(ours.to(tl.int32), 0)
        tl.debug_barrier()  # what other threads of this program have taken is read here
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        given = mine & (rank < served)
        slot = tl.load(taken + rank, mask=given, other=0)
        old = tl.load(slot_key + slot, mask=given, other=-1)
        tl.store(page_slot + old, ABSENT, mask=given & (old >= 0))
        tl.store(slot_key + slot, key, mask=given)
        tl.store(page_slot + key, tl.where(given, slot, ABSENT), mask=mine)
        tl.store(filled + slot, tl.load(spans + i, mask=given, other=0) // SPAN, mask=given)
        tl.store(reading + i, slot, mask=given)
        evicted += tl.sum((given & (old >= 0)).to(tl.int32), 0)
        tl.debug_barrier()  # before ``taken`` is used again
    tl.atomic_add(counters + 2, evicted.to(tl.int64), sem="relaxed")


@launched
def fetch_pages_kernel(
    pool,
    seq_lens,
    slot_key,
    content,
    reading,
    spans,
    stride_block,
    stride_head,
    stride_token,
    max_read,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLS: tl.constexpr,
    PAGES: tl.constexpr,
    g: tl.constexpr,
):
    """Grid (tiles of PAGES places, heads, rows): copy the tokens that entries lack from the pool.

    Args:
        pool: ``[blocks, heads, block_size, 2 * head_size]``, mapped host memory.
        content: ``[slots, page_size, 2 * head_size]``, on the device.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.minimum(pages_read(tl.load(seq_lens + row), g), max_read)
    lane = row.to(tl.int64) * HEADS + head
    token = tl.arange(0, g.page_size)
    cols = tl.arange(0, COLS)
    width = cols < 2 * HEAD_SIZE
    pool += head.to(tl.int64) * stride_head
    for nth in tl.static_range(PAGES):
        i = tile * PAGES + nth
        if i < count:
            slot = tl.load(reading + lane * max_read + i)
            span = tl.load(spans + lane * max_read + i)
            if (slot >= 0) & (span % SPAN < span // SPAN):
                page = tl.load(slot_key + slot) // HEADS
                rows = page_rows(page, token, stride_block, stride_token, g)
                lacks = (token >= span % SPAN) & (token < span // SPAN)
                mask = lacks[:, None] & width[None, :]
                tokens = tl.load(pool + rows[:, None] + cols[None, :], mask=mask, other=0.0)
                at = slot.to(tl.int64) * g.page_size + token
                tl.store(content + at[:, None] * (2 * HEAD_SIZE) + cols[None, :], tokens, mask=mask)
