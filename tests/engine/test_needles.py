"""The shipped defaults on the example model: what dense finds, sparse decode finds, at 1/16 of the context."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_rc_backend.evaluation.tasks import make_prompts
from vllm_rc_backend.evaluation.text import Corpus
from vllm_rc_backend.observability import meter

from ..harness import MODEL, engine, greedy

TASKS = {"single_needle": 2, "multi_key": 3, "multi_query": 1}
"""Prompts of each; one of multi_query asks four times, each time after the true answers so far."""


@pytest.fixture(scope="module")
def corpus_files() -> Corpus:
    corpus, packages = Corpus.installed(Path(MODEL))
    assert packages
    return corpus


@pytest.mark.parametrize("length", [4096, 8192])
def test_needles_at_a_sixteenth(length: int, corpus_files: Corpus) -> None:
    tasks = [
        (prompt.tokens[: span.start], prompt.tokens[span])
        for task, count in TASKS.items()
        for prompt in make_prompts(task, corpus_files, "comments", length, count, seed=length)
        for span in prompt.answers
    ]
    params = [greedy(len(answer)) for _, answer in tasks]
    prompts = [{"prompt_token_ids": question} for question, _ in tasks]
    settings = {"max_model_len": length + 64, "dtype": "bfloat16", "max_num_batched_tokens": 4096}
    with engine("CPU_ATTN", **settings) as llm:
        dense = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
    meter.get.cache_clear()
    with engine("rc_topk", {"budget": length // 16}, **settings) as llm:
        sparse = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
    counts = meter.get().counts

    assert sparse == dense
    assert sum(d == answer for d, (_, answer) in zip(dense, tasks, strict=True)) >= len(tasks) - 1
    assert counts.dense_rows == 0
    assert counts.tokens_read <= counts.tokens_held / 16
