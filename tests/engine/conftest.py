"""Fixtures of the engine tests: an audit of the side store, and prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from vllm_rc_backend.attention import Batch, ReferenceAttention
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import PagedKV

from ..harness import Answer


@dataclass
class Audit:
    """Compares the side store with a recomputation from the cache, at every layer of every fourth sparse decode, and
    summaries after every step of a prefill, too."""

    checked_pages: int = 0
    checked_summaries: int = 0
    checked_prefills: int = 0
    problems: list[str] = field(default_factory=list)

    def check(self, attention: ReferenceAttention, kv: PagedKV, batch: Batch, row: int) -> None:
        """Statistics bit for bit; summaries to the rounding of the order in which pages were added."""
        store, layout = attention.store, attention.store.layout
        geometry, seq_len, table = layout.geometry, batch.seq_lens[row], batch.block_table[row]
        if seq_len % 4:  # recomputing everything at every token would take most of the suite's time
            return
        finished = torch.arange(seq_len // geometry.page_size)
        ids = kv.page_ids(table, finished)
        keys, _ = kv.read(ids.unsqueeze(0))
        codes, scales = reference.encode_statistics(
            layout.policy.statistics(keys).transpose(0, 1), store.codes.dtype
        )
        wrong = (store.codes[ids] != codes).flatten(1).any(dim=1)
        if scales is not None:
            assert store.scales is not None
            wrong |= (store.scales[ids] != scales).flatten(1).any(dim=1)
        self.checked_pages += len(ids)
        if wrong.any():
            self.problems.append(f"row {row} at {seq_len}: statistics of pages {finished[wrong].tolist()}")

        if batch.plan is not None and batch.plan.slot[row] >= 0:
            self.check_summary(attention, kv, batch, row)
            self.checked_summaries += 1

    def check_prefills(self, attention: ReferenceAttention, kv: PagedKV, batch: Batch) -> None:
        """The summaries that a step's prefills were given."""
        for row, count in enumerate(batch.query_lens):
            if count > 1 and batch.plan is not None and batch.plan.slot[row] >= 0:
                self.check_summary(attention, kv, batch, row)
                self.checked_prefills += 1

    def check_summary(self, attention: ReferenceAttention, kv: PagedKV, batch: Batch, row: int) -> None:
        """One row's summary, of its mid region so far."""
        assert batch.plan is not None
        store, layout, slot = attention.store, attention.store.layout, int(batch.plan.slot[row])
        geometry, seq_len, table = layout.geometry, batch.seq_lens[row], batch.block_table[row]
        first, last = geometry.sink_tokens, geometry.mid_end(seq_len) * geometry.page_size
        expected = layout.completion.contribution(*kv.read_range(table, first, last))
        held = store.states[slot].float().sum(dim=1)
        # Relative to each matrix: 16 bits per addition, at most a few hundred additions here.
        error = (held - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        if not bool((error < 1e-3).all()):
            self.problems.append(f"row {row} at {seq_len}: summary off by {error.tolist()}")

    def assert_right(self, summaries: bool = True) -> None:
        """Something was checked and nothing was wrong."""
        assert self.checked_pages > 0
        assert not summaries or (self.checked_summaries > 0 and self.checked_prefills > 0)
        assert not self.problems, self.problems[:5]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Audit:
    """Audits every sparse decode of the test, and every step of a prefill."""
    found = Audit()
    decode, update = ReferenceAttention.decode, ReferenceAttention.update

    def audited(self: ReferenceAttention, query: Any, kv: PagedKV, batch: Batch, row: int) -> Any:
        found.check(self, kv, batch, row)
        return decode(self, query, kv, batch, row)

    def updated(self: ReferenceAttention, kv: PagedKV, batch: Batch) -> None:
        update(self, kv, batch)
        found.check_prefills(self, kv, batch)

    monkeypatch.setattr(ReferenceAttention, "decode", audited)
    monkeypatch.setattr(ReferenceAttention, "update", updated)
    return found


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the sparse path although the budget covers the context, so that its result must equal dense attention."""

    def is_sparse(self: Geometry, seq_len: int) -> bool:
        return self.mid_end(seq_len) > self.sink_pages

    monkeypatch.setattr(Geometry, "is_sparse", is_sparse)


def assert_context_matters(one: Answer, other: Answer) -> None:
    """Unless two contexts give different answers, nothing can be learnt from comparing answers."""
    first, second = (sorted(answer.likeliest[0].values()) for answer in (one, other))
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.01, "what is read decides nothing"


@pytest.fixture
def strong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights so large that what attention reads decides the answer; vLLM's own (0.001 at most) leave it out."""
    from vllm.model_executor.model_loader import dummy_loader

    larger = partial(dummy_loader.initialize_single_dummy_weight, low=-0.5, high=0.5)
    monkeypatch.setattr(dummy_loader, "initialize_single_dummy_weight", larger)
