"""The page cache against the pool that it stands in front of: whatever happens, it returns what the pool holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_rc_backend.kernels.reference import CachedKV, PageCache, decode_sparse, written_pages

from ..paging import HEAD_SIZE, HEADS, Cache, as_table, geometry, random_query, random_tokens


class Bench:
    """A pool that sequences are written to, and a cache of it."""

    def __init__(self, slots: int, blocks: int = 8, dtype: torch.dtype = torch.float32) -> None:
        self.pool = Cache.empty(blocks, geometry())
        kv = self.pool.kv
        self.pages = PageCache.empty(2 * blocks, HEADS, slots, kv.page_size, HEAD_SIZE, dtype)
        self.pages.content.fill_(torch.nan)
        self.kv = CachedKV.over(kv, self.pages)

    def write(self, table: list[int], first: int, count: int) -> None:
        """A step of one sequence: the pool is written, and the cache is told."""
        self.pool.write(table, first, *random_tokens(count))
        pages, kept = written_pages(first + count, count, self.kv.page_size)
        self.pages.truncate(self.kv.page_ids(as_table(table), pages), kept)

    def check(self) -> None:
        """The directory and the slots agree, and each entry is a copy of the pool's tokens."""
        pages = self.pages
        for slot, key in enumerate(pages.slot_key.tolist()):
            if key < 0:
                continue
            page, head = divmod(key, HEADS)
            assert pages.page_slot[page, head] == slot
            filled = int(pages.filled[slot])
            held = torch.cat(self.pool.kv.gather(torch.tensor(page), torch.tensor(head)), dim=-1)
            written = ~held[:filled].isnan()  # a reused block's later pages hold nothing yet
            assert torch.equal(pages.content[slot, :filled][written], held[:filled][written])
        present = pages.page_slot[pages.page_slot >= 0]
        assert len(present.unique()) == len(present) == int((pages.slot_key >= 0).sum())

    def same(self, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        for mine, pools in zip(got, expected, strict=True):
            assert torch.equal(mine, pools)
            assert not mine.isnan().any()


@settings(phases=[Phase.generate])  # shrinking a failure of this many draws takes minutes
@given(data=st.data(), slots=st.integers(0, 30))
def test_never_returns_anything_but_the_pools_content(data: st.DataObject, slots: int) -> None:
    """Sequences start, grow by steps of any size, are read in any order, end, and give their blocks to others."""
    torch.manual_seed(0)
    bench = Bench(slots, blocks=5)
    sequences: list[tuple[list[int], int]] = []
    for _ in range(data.draw(st.integers(20, 60), label="steps")):
        event = data.draw(st.sampled_from(["write", "write", "read", "read", "end"]), label="event")
        if not sequences or (event == "write" and data.draw(st.booleans(), label="new")):
            sequences.append(([], 0))
        i = data.draw(st.integers(0, len(sequences) - 1), label="sequence")
        table, length = sequences[i]
        if event == "write":
            room = (len(table) + len(bench.pool.free)) * bench.kv.block_size - length
            count = data.draw(st.integers(0, min(room, 14)), label="tokens")
            bench.write(table, length, count)
            sequences[i] = table, length + count
        elif event == "end":
            bench.pool.free[:0] = table
            del sequences[i]
        elif length:
            first = data.draw(st.integers(0, (length - 1) // 4), label="first page") * 4
            span = as_table(table), first, data.draw(st.integers(first + 1, length), label="last")
            bench.same(bench.kv.read_range(*span), bench.pool.kv.read_range(*span))
            if length >= 4:
                full = st.lists(st.integers(0, length // 4 - 1), min_size=1, max_size=6, unique=True)
                pages = data.draw(full, label="pages")
                ids = bench.kv.page_ids(as_table(table), torch.tensor([pages, pages[::-1]]))
                bench.same(bench.kv.read(ids), bench.pool.kv.read(ids))
        bench.check()


def test_a_decoding_sequence_fetches_one_token_a_step() -> None:
    bench = Bench(slots=8)
    table: list[int] = []
    bench.write(table, 0, 5)
    bench.kv.read_range(as_table(table), 0, 5)
    for length in range(5, 12):
        before = bench.pages.traffic.tokens_fetched
        bench.write(table, length, 1)
        bench.kv.read_range(as_table(table), 0, length + 1)
        assert bench.pages.traffic.tokens_fetched == before + HEADS


def test_a_block_that_changes_hands_is_fetched_anew() -> None:
    bench = Bench(slots=8, blocks=1)
    table: list[int] = []
    bench.write(table, 0, 8)
    before = bench.kv.read_range(as_table(table), 0, 8)
    bench.pool.free[:] = table
    again: list[int] = []
    bench.write(again, 0, 8)
    assert again == table
    after = bench.kv.read_range(as_table(again), 0, 8)
    assert not torch.equal(before[0], after[0])
    assert bench.pages.traffic.tokens_fetched == 2 * 8 * HEADS


def test_what_was_not_used_for_longest_goes_first() -> None:
    bench = Bench(slots=3 * HEADS)
    table: list[int] = []
    bench.write(table, 0, 16)

    def read(page: int) -> int:
        before = bench.pages.traffic.hits
        bench.kv.read_range(as_table(table), 4 * page, 4 * page + 4)
        return bench.pages.traffic.hits - before

    assert [read(p) for p in (0, 1, 2, 0, 3)] == [0, 0, 0, HEADS, 0]
    assert [read(p) for p in (0, 2, 3)] == [HEADS] * 3
    assert bench.pages.traffic.evictions == HEADS
    assert read(1) == 0


@pytest.mark.parametrize("slots", [0, 1, 5])
def test_a_request_larger_than_the_cache(slots: int) -> None:
    bench = Bench(slots)
    table: list[int] = []
    bench.write(table, 0, 30)
    for _ in range(2):
        bench.same(
            bench.kv.read_range(as_table(table), 0, 30), bench.pool.kv.read_range(as_table(table), 0, 30)
        )
        bench.check()
    assert bench.pages.traffic.wanted == 2 * 8 * HEADS
    assert bench.pages.traffic.hits == slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_pools_dtype_and_scales(dtype: torch.dtype) -> None:
    bench = Bench(6, dtype=dtype)
    pool = Cache(
        type(bench.pool.kv)(
            torch.randn(8, HEADS, 2 * 8 * HEAD_SIZE).to(dtype),
            bench.kv.key_index,
            bench.kv.value_index,
            4,
            key_scale=0.5,
            value_scale=3.0,
        )
    )
    kv = CachedKV.over(pool.kv, bench.pages)
    ids = torch.tensor([[0, 3, 5], [1, 3, 4]])
    bench.same(kv.read(ids), pool.kv.read(ids))
    bench.same(kv.read(ids), pool.kv.read(ids))
    assert bench.pages.traffic.hits == 6


def test_decoding_through_a_cache_is_decoding() -> None:
    from vllm_rc_backend.completion import make_completion

    torch.manual_seed(1)
    shape = geometry()
    bench = Bench(slots=7, blocks=12)
    table: list[int] = []
    bench.write(table, 0, 61)
    query, pages = random_query(), torch.tensor([[2, 5, 7], [3, 5, 11]])
    arguments = (as_table(table), 61, shape, pages, make_completion("none"), None)
    expected, _ = decode_sparse(query, bench.pool.kv, *arguments)
    for _ in range(3):
        output, _ = decode_sparse(query, bench.kv, *arguments)
        assert torch.equal(output, expected)
    assert bench.pages.traffic.hits > 0
