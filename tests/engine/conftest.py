"""Real vLLM on the CPU, in this process, so that tests can look at the side store after any step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm_rc_backend.attention import Batch, ReferenceAttention
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import PagedKV

MODEL = str(Path(__file__).parents[2] / "examples" / "model")


@contextmanager
def engine(backend: str, options: dict[str, Any] | None = None, **kwargs: Any) -> Iterator[Any]:
    """A real ``LLM`` on the example model, float32 so that greedy outputs can be compared; torn down at the end."""
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "model": MODEL,
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 512 << 20,
        "enforce_eager": True,
        "seed": 0,
        "disable_log_stats": True,
    }
    if backend == "rc_topk":
        defaults["additional_config"] = {"rc_topk": {"log_interval": 0, **(options or {})}}
    llm = vllm.LLM(attention_backend=backend, **(defaults | kwargs))
    try:
        yield llm
    finally:
        shutdown = getattr(llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@dataclass
class Audit:
    """Compares the side store with a recomputation from the cache, at every layer of every fourth sparse decode."""

    checked_pages: int = 0
    checked_summaries: int = 0
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

        if batch.plan is None:
            return
        slot = int(batch.plan.slot[row])
        if slot < 0:
            return
        first, last = geometry.sink_tokens, geometry.mid_end(seq_len) * geometry.page_size
        expected = layout.completion.contribution(*kv.read_range(table, first, last))
        held = store.states[slot].float().sum(dim=1)
        self.checked_summaries += 1
        # Relative to each matrix: 16 bits per addition, at most a few hundred additions here.
        error = (held - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        if not bool((error < 1e-3).all()):
            self.problems.append(f"row {row} at {seq_len}: summary off by {error.tolist()}")

    def assert_right(self, summaries: bool = True) -> None:
        """Something was checked and nothing was wrong."""
        assert self.checked_pages > 0
        assert not summaries or self.checked_summaries > 0
        assert not self.problems, self.problems[:5]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Audit:
    """Audits every sparse decode of the test."""
    found = Audit()
    decode = ReferenceAttention.decode

    def audited(self: ReferenceAttention, query: Any, kv: PagedKV, batch: Batch, row: int) -> Any:
        found.check(self, kv, batch, row)
        return decode(self, query, kv, batch, row)

    monkeypatch.setattr(ReferenceAttention, "decode", audited)
    return found


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the sparse path although the budget covers the context, so that its result must equal dense attention."""

    def is_sparse(self: Geometry, seq_len: int) -> bool:
        return self.mid_end(seq_len) > self.sink_pages

    monkeypatch.setattr(Geometry, "is_sparse", is_sparse)


FULL = {"budget": 1_000_000}
"""A budget that covers every context."""

SMALL = {"budget": 192}
"""A budget that leaves most of a context of 1000 tokens unread."""


@dataclass(frozen=True)
class Answer:
    """One sequence's tokens and the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def answers(outputs: list[Any]) -> list[Answer]:
    """All sequences of ``LLM.generate``'s outputs, in order."""
    return [
        Answer(tuple(o.token_ids), tuple(lp[t].logprob for t, lp in zip(o.token_ids, o.logprobs, strict=True)))
        for output in outputs
        for o in output.outputs
    ]


def assert_same(got: list[Answer], expected: list[Answer], tolerance: float = 2e-3) -> None:
    """The same tokens with the same probabilities, up to rounding."""
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


@pytest.fixture(scope="session")
def corpus() -> list[int]:
    """Tokens of Python source, of any length a test may want: this interpreter's own library."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    library = Path(os.__file__).parent
    text = "".join((library / name).read_text() for name in ("argparse.py", "ast.py", "dis.py", "enum.py"))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="session")
def prompt(corpus: list[int]) -> Callable[..., dict[str, list[int]]]:
    """A prompt of ``length`` tokens, BOS included; ``seed`` chooses where in the corpus it begins."""

    def make(length: int, seed: int = 0) -> dict[str, list[int]]:
        start = seed * 1009 % (len(corpus) - length)
        return {"prompt_token_ids": [0, *corpus[start : start + length - 1]]}

    return make


def greedy(tokens: int = 24, **kwargs: Any) -> Any:
    """Deterministic sampling that runs on to the end."""
    return vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, **kwargs)
