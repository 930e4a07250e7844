"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: the page cache's kernels."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from vllm_rc_backend.host_kv.page_cache import DevicePages, LayerPages
from vllm_rc_backend.kernels.geometry import Geometry

LAYERS, HEADS, HEAD_SIZE, BLOCKS = 2, 2, 16, 40
GEOMETRY = Geometry(
    page_size=16, block_size=32, sink_tokens=16, tail_tokens=20, budget=112, dense_threshold=0
)


class Bench:
    """Sequences in a pool, decoded step by step through the cache with random selections."""

    def __init__(self, slots: int, geometry: Geometry = GEOMETRY, rows: int = 3) -> None:
        self.geometry, self.random = geometry, random.Random(1)
        pages = BLOCKS * geometry.pages_per_block
        self.cache = DevicePages(
            geometry, LAYERS, pages, HEADS, slots, HEAD_SIZE, torch.float32, "cpu", rows, 1024
        )
        shape = (BLOCKS, geometry.block_size, HEADS, 2 * HEAD_SIZE)  # token-major in memory
        self.pools = [torch.full(shape, torch.nan).transpose(1, 2) for _ in range(LAYERS)]
        for layer in self.cache.layers:
            layer.content.fill_(torch.nan)
        self.free = list(range(1, BLOCKS))
        self.table = torch.zeros(rows, 24, dtype=torch.int32)
        self.lengths = [0] * rows

    def write(self, new: list[int]) -> None:
        """A step that adds so many tokens to each row; a new length of -1 ends the row's sequence."""
        size = self.geometry.block_size
        for row, count in enumerate(new):
            used = -(-self.lengths[row] // size)
            if count < 0:
                self.free += self.table[row, :used].tolist()
                self.table[row], self.lengths[row] = 0, 0
                continue
            for position in range(self.lengths[row], self.lengths[row] + count):
                if position % size == 0:
                    self.table[row, position // size] = self.free.pop(0)
                for pool in self.pools:
                    pool[int(self.table[row, position // size]), :, position % size] = torch.randn(
                        HEADS, 2 * HEAD_SIZE
                    )
            self.lengths[row] += count
        query_lens = [max(count, 0) for count in new]
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        self.cache.begin_step(self.table, torch.tensor(self.lengths).int(), starts, max(query_lens))

    def read(self) -> None:
        """Every layer: random selections; what the attention would read is what the pool holds."""
        g, lengths = self.geometry, torch.tensor(self.lengths).int()
        for layer, pool in zip(self.cache.layers, self.pools, strict=True):
            places = torch.full((len(lengths), HEADS, self.cache.max_read), -7, dtype=torch.int32)
            orders: list[list[list[int]]] = []
            for row, length in enumerate(self.lengths):
                n, order = -(-length // g.page_size), []
                for head in range(HEADS):
                    if g.is_sparse(length):
                        mid = range(g.sink_pages, g.mid_end(length))
                        chosen = self.random.sample(mid, g.retrieved_pages(length))
                        places[row, head, : len(chosen)] = torch.tensor(chosen) - g.sink_pages
                        order.append([*chosen, *range(g.sink_pages), *range(g.mid_end(length), n)])
                    else:
                        order.append(list(range(n)))
                orders.append(order)
            self.cache.reading.fill_(-999_999)
            layer.fetch(places, pool, self.table, lengths)
            for row, order in enumerate(orders):
                for head, pages in enumerate(order):
                    self.check_read(layer, pool, row, head, pages)
            self.check_directory(layer, pool)

    def page(self, row: int, logical: int) -> int:
        per_block = self.geometry.pages_per_block
        return int(self.table[row, logical // per_block]) * per_block + logical % per_block

    def held(self, pool: torch.Tensor, page: int, head: int) -> torch.Tensor:
        block, place = divmod(page, self.geometry.pages_per_block)
        size = self.geometry.page_size
        return pool[block, head, place * size : (place + 1) * size]

    def check_read(
        self, layer: LayerPages, pool: torch.Tensor, row: int, head: int, pages: list[int]
    ) -> None:
        for at, logical in zip(self.cache.reading[row, head].tolist(), pages, strict=False):
            page = self.page(row, logical)
            tokens = min(self.lengths[row] - logical * self.geometry.page_size, self.geometry.page_size)
            if at >= 0:
                assert torch.equal(layer.content[at, :tokens], self.held(pool, page, head)[:tokens])
            else:
                assert at == -1 - page
        assert (self.cache.reading[row, head, len(pages) :] == -999_999).all()

    def check_directory(self, layer: LayerPages, pool: torch.Tensor) -> None:
        for slot, key in enumerate(layer.slot_key.tolist()):
            if key >= 0:
                page, head = divmod(key, HEADS)
                assert layer.page_slot[page, head] == slot
        present = layer.page_slot[layer.page_slot >= 0]
        assert len(present.unique()) == len(present) == int((layer.slot_key >= 0).sum())
        assert (layer.page_slot >= -2).all()
        assert not (layer.page_slot == -1).any()


CASES = {
    "no slots": (0, {}),
    "one slot": (1, {"dense_threshold": 230}),
    "less than a step reads": (30, {}),
    "less than all": (130, {"budget": 0.4}),
    "all": (600, {}),
}


def test_steps_are_counted_for_ever() -> None:
    bench = Bench(60)
    bench.write([400, 300, 37])
    bench.cache.now.fill_(2**31 - 4)
    numbers = []
    for _ in range(8):
        bench.write([1, 1, 1])
        bench.read()
        numbers.append(int(bench.cache.now))
    assert numbers == [2**31 - 3, 2**31 - 2, 2**31 - 1, 1, 2, 3, 4, 5]
    assert bench.cache.counters[2] > 0


@pytest.mark.parametrize("name", CASES)
def test_reads_are_the_pools_content(name: str) -> None:
    slots, changes = CASES[name]
    bench = Bench(slots, dataclasses.replace(GEOMETRY, **changes))  # type: ignore[arg-type]
    bench.write([200, 120, 37])
    for step in range(7):
        if step == 2:
            bench.write([-1, 1, 0])
            bench.write([300, 1, 1])
        elif step == 5:
            bench.write([1, -1, 1])
            bench.write([1, 90, 1])
        else:
            bench.write([1, 1, 1])
        bench.read()
    wanted, found, evicted, fetched = bench.cache.counters.tolist()
    assert 0 < fetched <= wanted * GEOMETRY.page_size
    assert found <= wanted
    if slots == 0:
        assert found == evicted == 0
    elif slots < 600:
        assert evicted > 0


def test_what_is_read_again_is_found() -> None:
    """With room for all, a step finds what the step before read, and fetches one token of each (row, head)."""
    bench = Bench(600)
    bench.write([70, 90, 0])
    bench.write([1, 1, 0])
    bench.read()
    before = bench.cache.counters.clone()
    for _ in range(3):
        bench.write([1, 1, 0])
        bench.read()
    wanted, found, evicted, fetched = (bench.cache.counters - before).tolist()
    assert wanted - found == 0
    assert evicted == 0
    assert fetched == 3 * 2 * LAYERS * HEADS


def test_a_hot_page_survives_a_stream_of_cold_ones() -> None:
    """Second chance: what each step reads stays, although more pages than the cache holds pass through it."""
    bench = Bench(60)
    bench.write([600, 0, 0])
    for _ in range(8):
        bench.write([1, 0, 0])
        bench.read()
    before = bench.cache.counters.clone()
    bench.write([1, 0, 0])
    bench.read()
    _, found, _, _ = (bench.cache.counters - before).tolist()
    assert found >= 3 * LAYERS * HEADS, "the sink and the tail are read at every step"


def test_rows_that_miss_the_same_page() -> None:
    bench = Bench(600)
    bench.write([96, 96, 96])
    bench.table[1:, :2] = bench.table[0, :2]
    bench.write([1, 1, 1])
    for _ in range(3):
        bench.read()
