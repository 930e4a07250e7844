"""Summaries follow sequences through everything that a scheduler does, by page identity alone."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.paging import HEAD_SIZE, HEADS, Cache, as_table, geometry
from vllm_rc_backend.completion import make_completion
from vllm_rc_backend.kernels.reference import (
    SummaryTags,
    absorb_pages,
    plan_summaries,
    read_state,
)
from vllm_rc_backend.kernels.reference.summary import LOOKBACK, split_planes

LINEAR = make_completion("linear")
BLOCKS = 60


@dataclass(eq=False)
class Sequence:
    """Tokens that belong to a request, and how many of them are in the cache."""

    keys: Tensor
    values: Tensor
    computed: int = 0
    table: list[int] = field(default_factory=list)


class Engine:
    """A scheduler that does at random what vLLM's does: nothing here is known to the code under test."""

    def __init__(self, seed: int, slots: int) -> None:
        self.random = random.Random(seed)
        self.geometry = geometry()
        self.cache = Cache.empty(BLOCKS, self.geometry)
        self.references: Counter[int] = Counter()
        self.sequences: list[Sequence] = []
        self.tags = SummaryTags.empty(slots, BLOCKS * self.geometry.pages_per_block)
        self.states = torch.full(
            (slots, HEADS, 2, LINEAR.state_rows(HEAD_SIZE), HEAD_SIZE), torch.nan, dtype=torch.bfloat16
        )
        self.checked = self.without_slot = 0

    def add(self) -> None:
        """A new request, sometimes with a prefix that is in the cache already (whole blocks, as in vLLM)."""
        count = self.random.randint(1, 50)
        sequence = Sequence(torch.randn(HEADS, count, HEAD_SIZE), torch.randn(HEADS, count, HEAD_SIZE))
        cached = [s for s in self.sequences if s.computed >= 16]
        if cached and self.random.random() < 0.6:
            parent = self.random.choice(cached)
            shared = self.random.randint(1, (parent.computed - 1) // 8)
            sequence.table = parent.table[:shared]
            sequence.computed = 8 * shared
            sequence.keys = torch.cat((parent.keys[:, : 8 * shared], sequence.keys), dim=1)
            sequence.values = torch.cat((parent.values[:, : 8 * shared], sequence.values), dim=1)
            self.references.update(sequence.table)
        self.sequences.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give its blocks back; they are reused soon, newest first or oldest first."""
        for block in sequence.table:
            self.references[block] -= 1
            if not self.references[block]:
                self.cache.free.insert(self.random.choice((0, len(self.cache.free))), block)
        sequence.table, sequence.computed = [], 0

    def run(self, sequence: Sequence) -> int:
        """Compute some of its tokens, or decode a new one; returns how many, 0 if blocks are short."""
        waiting = sequence.keys.shape[1] - sequence.computed
        if waiting == 0:
            sequence.keys = torch.cat((sequence.keys, torch.randn(HEADS, 1, HEAD_SIZE)), dim=1)
            sequence.values = torch.cat((sequence.values, torch.randn(HEADS, 1, HEAD_SIZE)), dim=1)
            waiting = 1
        count = min(waiting, self.random.choice((1, 7, 64)))
        first, last = sequence.computed, sequence.computed + count
        if -(-last // 8) - len(sequence.table) > len(self.cache.free):
            return 0
        before = len(sequence.table)
        self.cache.write(sequence.table, first, sequence.keys[:, first:last], sequence.values[:, first:last])
        self.references.update(sequence.table[before:])
        sequence.computed = last
        return count

    def step(self) -> None:
        """One engine step and the check of every summary that it would read."""
        while len(self.sequences) < 5:
            self.add()
        event = self.random.random()
        if event < 0.05:
            self.release(self.sequences.pop(self.random.randrange(5)))  # finished or aborted
        elif event < 0.1:
            self.release(self.random.choice(self.sequences))  # preempted: recomputed later
        batch = self.random.sample(self.sequences, self.random.randint(1, len(self.sequences)))
        rows = [(s, count) for s in batch if (count := self.run(s))]
        if len(rows) < len(batch):
            ran = [sequence for sequence, _ in rows]
            self.release(self.random.choice([s for s in batch if s not in ran]))
        tables = [as_table(s.table) for s, _ in rows] + [as_table([])]  # and a padding row
        seq_lens, query_lens = [s.computed for s, _ in rows] + [0], [count for _, count in rows] + [0]
        table = torch.stack(tables)
        held = [self.holds(s, s.computed - count) for s, count in rows]
        without = [
            [n if count == 1 else 0 for n, count in zip(x, query_lens, strict=True)]
            for x in (seq_lens, query_lens)
        ]
        undisturbed = plan_summaries(copy.deepcopy(self.tags), self.geometry, table, *without)
        plan = plan_summaries(self.tags, self.geometry, table, seq_lens, query_lens)
        absorb_pages(self.cache.kv, table, plan, LINEAR, self.states)
        assert plan.slot[-1] == -1
        for row, (sequence, count) in enumerate(rows):
            self.check(sequence, int(plan.slot[row]))
            if count == 1:
                assert (plan.slot[row] >= 0) == (undisturbed.slot[row] >= 0), (
                    "a prefill kept a decode from a slot"
                )
                assert not held[row] or plan.last[row] - plan.first[row] <= 1

    def holds(self, sequence: Sequence, seq_len: int) -> bool:
        """Whether a slot has the summary of its mid region at this length."""
        page, per_block = self.geometry.mid_end(seq_len) - 1, self.geometry.pages_per_block
        if page < self.geometry.sink_pages:
            return False
        return self.tags.find(sequence.table[page // per_block] * per_block + page % per_block) >= 0

    def check(self, sequence: Sequence, slot: int) -> None:
        seq_len = sequence.computed
        if not self.geometry.is_sparse(seq_len):
            assert slot == -1
            return
        if slot < 0:
            self.without_slot += 1
            return
        mid = slice(self.geometry.sink_tokens, self.geometry.mid_end(seq_len) * 4)
        expected = LINEAR.contribution(sequence.keys[:, mid], sequence.values[:, mid])
        state = self.states[slot].float().sum(dim=1)
        assert (state - expected).norm() <= 1e-3 * expected.norm()
        self.checked += 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 12))
def test_states_are_right_whatever_happens_in_whatever_order(seed: int, slots: int) -> None:
    torch.manual_seed(seed)
    engine = Engine(seed, slots)
    for _ in range(60):
        engine.step()


@pytest.mark.parametrize("seed", range(6))
def test_states_are_those_of_the_mid_region_through_every_event(seed: int) -> None:
    torch.manual_seed(seed)
    engine = Engine(seed, slots=10)
    for _ in range(400):
        engine.step()
    assert engine.checked > 300
    assert engine.without_slot == 0, "twice as many slots as sequences are enough even when all of them part"


def test_too_few_slots_lose_summaries_but_never_mix_them() -> None:
    engine = Engine(0, slots=2)
    for _ in range(400):
        engine.step()
    assert engine.checked > 100
    assert engine.without_slot > 10


def advance(tags: SummaryTags, tables: list[list[int]], seq_lens: list[int]) -> tuple[list[int], list[int]]:
    """Plan one decode step; the slots and the sources of its rows."""
    table = torch.stack([as_table(t) for t in tables])
    plan = plan_summaries(tags, geometry(), table, seq_lens, [1] * len(tables))
    return plan.slot.tolist(), plan.source.tolist()


def test_a_sequence_alone_keeps_its_slot() -> None:
    tags = SummaryTags.empty(4, 80)
    slots, sources = advance(tags, [[0, 1, 2, 3, 4, 5]], [40])
    assert sources == [-1], "rebuilt from the pages"
    for seq_len in range(41, 48):
        assert advance(tags, [[0, 1, 2, 3, 4, 5]], [seq_len])[0] == slots


def test_sequences_that_share_a_prefix_share_its_state_and_part_by_copying() -> None:
    tags = SummaryTags.empty(6, 80)
    tables = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]]
    # 37 tokens: the mid region ends at token 32, with block 3, which both have.
    (slot, *_), _ = advance(tags, tables[:1], [37])
    assert advance(tags, tables, [37, 37])[0] == [slot, slot]
    # 41 tokens: it ends inside blocks 4 and 6, which they do not share.
    slots, sources = advance(tags, tables, [41, 41])
    assert sources == [slot, slot]
    assert len({slot, *slots}) == 3


def test_a_later_turn_goes_on_from_the_state_of_an_earlier_one() -> None:
    tags = SummaryTags.empty(4, 2 * LOOKBACK)
    table = list(range(LOOKBACK))  # blocks of two pages
    slots, _ = advance(tags, [table], [40])
    for seq_len, source in (
        (40 + 4 * (LOOKBACK - 1), slots[0]),
        (40 + 4 * (2 * LOOKBACK - 12), -1),
    ):
        fresh = SummaryTags(*(x.clone() for x in (tags.slot_page, tags.page_slot, tags.next_slot)))
        assert advance(fresh, [table], [seq_len])[1] == [source]


def test_a_rewritten_page_is_not_found() -> None:
    tags = SummaryTags.empty(4, 80)
    table = [0, 1, 2, 3, 4, 5]
    advance(tags, [table], [40])
    assert tags.find(7) >= 0, "its mid region ends with page 7"
    # The same blocks, prefilled again by somebody else, to another length.
    plan_summaries(tags, geometry(), as_table(table).unsqueeze(0), [48], [48])
    assert tags.find(7) == -1


def test_a_prompt_in_chunks_leaves_a_page_to_its_first_decode() -> None:
    tags, table = SummaryTags.empty(4, 80), as_table([0, 1, 2, 3, 4, 5, 6, 7]).unsqueeze(0)
    absorbed, computed = [], 0
    for count in (13, 1, 18, 21, 3, 1):  # a chunk of one token is a decode to the plan
        computed += count
        plan = plan_summaries(tags, geometry(), table, [computed], [count])
        if plan.slot[0] >= 0:
            absorbed.append((int(plan.source[0]) >= 0, int(plan.first[0]), int(plan.last[0])))
    assert absorbed == [(False, 1, 6), (True, 6, 12), (True, 12, 12), (True, 12, 13)]


def test_prefills_wait_for_slots_and_lend_theirs() -> None:
    tags, tables = SummaryTags.empty(1, 80), torch.stack([as_table(list(range(i, i + 8))) for i in (0, 8)])

    def slots(seq_lens: list[int], query_lens: list[int]) -> list[int]:
        return plan_summaries(tags, geometry(), tables, seq_lens, query_lens).slot.tolist()

    assert slots([40, 0], [40, 0]) == [0, -1]
    assert slots([50, 0], [10, 0]) == [0, -1]
    assert slots([60, 41], [10, 1]) == [-1, 0], "a decode has none and takes the prefill's"
    assert slots([64, 42], [4, 1]) == [-1, 0], "a prefill takes none that a decode looks at"
    assert slots([65, 0], [1, 0]) == [0, -1]


def test_a_decode_advances_in_place_under_a_prefill_that_shares_its_state() -> None:
    tags = SummaryTags.empty(1, 80)
    tables = torch.stack([as_table([0, 1, 2, 3, 4, 5]), as_table([0, 1, 2, 3, 6, 7])])
    plan_summaries(tags, geometry(), tables, [40, 0], [40, 0])
    # The first decodes past its page; the second, with 32 tokens of it in the cache, prefills.
    plan = plan_summaries(tags, geometry(), tables, [41, 48], [1, 16])
    assert plan.slot.tolist() == [0, -1]
    assert plan.source.tolist() == [0, -1]


def test_two_planes_keep_sixteen_bits() -> None:
    x = torch.randn(1000) * 1000
    high, low = split_planes(x)
    assert (high.float() + low.float() - x).abs().max() <= 2**-16 * x.abs().max()
    assert ((high.float() + low.float() - x).abs() <= 2**-16 * x.abs()).all()


def test_reading_takes_both_planes_of_the_precise_rows_only() -> None:
    state = torch.randn(HEADS, 5, HEAD_SIZE)
    planes = torch.stack(split_planes(state), dim=1)
    read = read_state(planes, precise_rows=2)
    assert torch.equal(read[:, :3], state[:, :3].bfloat16().float())
    assert torch.allclose(read[:, 3:], state[:, 3:], rtol=2**-16, atol=0)
