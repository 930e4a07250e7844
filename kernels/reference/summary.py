"""Summaries: the completion's state over the mid region, kept per page prefix in a fixed number of slots.

A slot holds the state over ``[sink_pages, m)`` of some sequence and is tagged with the physical id of page ``m - 1``:
block tables are append-only, so that page identifies the whole prefix. Nothing is keyed by request or row. A step
looks its rows up by tag; a tag that is not there is rebuilt from the pages themselves. A page that is rewritten loses
its tag first, so a stale state cannot be found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.completion import Completion
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference.paged import PagedKV
from vllm_rc_backend.kernels.reference.statistics import finished_pages

LOOKBACK = 512
"""Pages that a row looks through, latest first, for a state to go on from: its own of the last step, an earlier turn of
the same chat."""


@dataclass
class SummaryTags:
    """Which page prefix each slot holds; shared by all layers of a KV-cache group.

    Attributes:
        slot_page: int32 ``[slots]``, the page a slot is tagged with, -1 if free.
        page_slot: int32 ``[pages]``, the slot that a page was last given, or -1; valid only if the slot agrees.
        next_slot: int32 ``[1]``, where the search for a free slot begins, so that the oldest states go first.
    """

    slot_page: Tensor
    page_slot: Tensor
    next_slot: Tensor

    @classmethod
    def empty(cls, slots: int, pages: int, device: torch.device | str = "cpu") -> SummaryTags:
        """All slots free."""

        def full(size: int, value: int) -> Tensor:
            return torch.full((size,), value, dtype=torch.int32, device=device)

        return cls(full(slots, -1), full(pages, -1), full(1, 0))

    def find(self, page: int) -> int:
        """The slot that holds the prefix ending with ``page``, or -1."""
        slot = int(self.page_slot[page])
        return slot if slot >= 0 and int(self.slot_page[slot]) == page else -1


@dataclass(frozen=True)
class SummaryPlan:
    """What each row does in this step, the same in every layer of the group.

    Row r copies slot ``source[r]`` (-1: starts from zero), adds logical pages ``[first[r], last[r])``, and stores the
    result in ``slot[r]``, which a decode reads. ``slot[r] == -1``: the row is dense, or has no summary. Nothing is
    added where ``first[r] == last[r]``.
    """

    slot: Tensor
    source: Tensor
    first: Tensor
    last: Tensor

    @property
    def built(self) -> Tensor:
        """bool ``[rows]``: rows whose summary is summed up from all pages of the mid region."""
        return (self.slot >= 0) & (self.source < 0) & (self.first < self.last)

    def from_row(self, row: int) -> SummaryPlan:
        """The plan of rows ``row`` and after."""
        return SummaryPlan(self.slot[row:], self.source[row:], self.first[row:], self.last[row:])


def plan_summaries(
    tags: SummaryTags,
    geometry: Geometry,
    block_table: Tensor,
    seq_lens: list[int],
    query_lens: list[int],
) -> SummaryPlan:
    """Find or assign a slot for every row that is, or would now be decoded sparsely, and update the tags.

    A row of a prefill gets the summary of its mid region so far, so that the next chunk and in the end the first decode
    find it. Decodes come first: no prefill ever keeps one from a slot.

    1. Pages that this step rewrites lose their tag.
    2. Each row looks through the pages that it had before this step, the last ``LOOKBACK`` of those in its mid region,
       for the latest that a slot is tagged with, and goes on from there. If that is the end of its mid region, it takes
       the state as it is; several rows may share one.
    3. A decode that has to advance does so in place if it is the only decode to look at that slot, in a new slot
       otherwise (sequences that share a prefix part here); new slots are those that no row looks at, the oldest first,
       and after these those that only prefills look at. No free slot: no summary in this step.
    4. Prefills follow, as decodes do, with two differences: a state that a decode has just replaced is no longer there
       and everything is summed up anew, and only slots that no row looks at are free. No free slot: what is missing is
       left to the next chunk or the first decode.

    Args:
        block_table: int ``[rows, max_blocks]``.
        seq_lens, query_lens: see ``finish_pages``. A row with ``query_len == 1`` is a decode, with more a prefill.
    """
    per_block, size = geometry.pages_per_block, geometry.page_size

    def page_id(row: int, page: int) -> int:
        return int(block_table[row, page // per_block]) * per_block + page % per_block

    for row in range(len(seq_lens)):
        for page in finished_pages(seq_lens[row], query_lens[row], size):
            tags.page_slot[page_id(row, page)] = -1

    plan = SummaryPlan(*(torch.full((len(seq_lens),), value, dtype=torch.int32) for value in (-1, -1, 0, 0)))
    rows = [r for r in range(len(seq_lens)) if query_lens[r] > 0 and geometry.is_sparse(seq_lens[r])]
    decodes, prefills = (torch.zeros_like(tags.slot_page) for _ in range(2))  # rows that look at a slot
    for row in rows:
        last = geometry.mid_end(seq_lens[row])
        before = min(last, (seq_lens[row] - query_lens[row]) // size)
        plan.first[row], plan.last[row] = geometry.sink_pages, last
        for held in range(before, max(before - LOOKBACK, geometry.sink_pages), -1):
            if (source := tags.find(page_id(row, held - 1))) >= 0:
                plan.source[row], plan.first[row] = source, held
                (decodes if query_lens[row] == 1 else prefills)[source] += 1
                break

    slots, start = len(tags.slot_page), int(tags.next_slot)
    oldest_first = [s % slots for s in range(start, start + slots)]
    idle = [s for s in oldest_first if not decodes[s] and not prefills[s]]
    free = idle + [s for s in oldest_first if not decodes[s] and prefills[s]]
    taken = 0
    for row in sorted(rows, key=lambda r: query_lens[r] > 1):
        decoding, source, first = query_lens[row] == 1, int(plan.source[row]), int(plan.first[row])
        if not decoding and source >= 0 and int(tags.slot_page[source]) != page_id(row, first - 1):
            source, first = -1, geometry.sink_pages
            plan.source[row], plan.first[row] = source, first
        if source >= 0 and first == int(plan.last[row]):
            plan.slot[row] = source
            continue
        others = -1 if source < 0 else int(decodes[source]) + (0 if decoding else int(prefills[source])) - 1
        if others == 0:
            slot = source
        elif taken < len(free if decoding else idle):
            slot = free[taken]
            taken += 1
        else:
            plan.source[row], plan.first[row], plan.last[row] = -1, 0, 0
            continue
        page = page_id(row, int(plan.last[row]) - 1)
        plan.slot[row] = slot
        tags.slot_page[slot] = page
        tags.page_slot[page] = slot
    if taken:
        tags.next_slot.fill_((free[taken - 1] + 1) % slots)
    return plan


def split_planes(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the sum of two bfloat16 planes.

    Together they keep about 16 bits, enough to accumulate in; the high plane alone is the rounding to bfloat16 that
    decoding reads, at half the bytes.
    """
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


def absorb_pages(
    kv: PagedKV, block_table: Tensor, plan: SummaryPlan, completion: Completion, states: Tensor
) -> None:
    """Carry out a plan for one layer.

    Args:
        kv: the cache.
        block_table: int ``[rows, max_blocks]``.
        plan: from ``plan_summaries``.
        completion: the estimator.
        states: bfloat16 ``[slots, heads, 2, state_rows, head_size]`` (high and low plane), written in place.
    """
    # Rows are independent: a slot that is copied is overwritten by nobody but its only user.
    for row, slot in enumerate(plan.slot.tolist()):
        first, last = int(plan.first[row]), int(plan.last[row])
        if slot < 0 or first == last:
            continue
        keys, values = kv.read_range(block_table[row], first * kv.page_size, last * kv.page_size)
        state = completion.contribution(keys, values)
        source = int(plan.source[row])
        if source >= 0:
            state = state + states[source].float().sum(dim=1)
        states[slot] = torch.stack(split_planes(state), dim=1)


def read_state(planes: Tensor, precise_rows: int) -> Tensor:
    """The state as decoding reads it: the high plane, and both planes of the last ``precise_rows`` rows.

    Args:
        planes: bfloat16 ``[..., heads, 2, state_rows, head_size]``.

    Returns:
        float32 ``[..., heads, state_rows, head_size]``.
    """
    high, low = planes.float().unbind(dim=-3)
    rows = high.shape[-2] - precise_rows
    return torch.cat((high[..., :rows, :], (high + low)[..., rows:, :]), dim=-2)
