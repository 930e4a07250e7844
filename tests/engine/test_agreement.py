"""The evaluation's teacher-forced window gives the engine's own probabilities, for every way to complete."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from vllm_rc_backend.completion.feature_file import FeatureFile, fingerprint
from vllm_rc_backend.completion.features import Features
from vllm_rc_backend.evaluation.cli import main
from vllm_rc_backend.evaluation.grid import DENSE, Case, Journal, Shapes
from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.measure import measure, sparse_attention
from vllm_rc_backend.evaluation.samples import Sizes, draw, make_samples, predict
from vllm_rc_backend.evaluation.text import Corpus, text_files

from ..harness import MODEL, answers, engine, greedy
from .conftest import Audit

ROOT = Path(__file__).parents[2]
PROMPT, NEW, BUDGET = 900, 24, 192


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(Path(MODEL), "cpu", torch.float32)


@pytest.fixture
def maps(model: Llama, tmp_path: Path) -> Path:
    """A file of untrained maps: 32 features around random centres."""
    path = tmp_path / "maps.safetensors"
    shape = (model.heads, 32, model.head_size)
    layers = []
    for _ in range(model.layers):
        centres = torch.randn(shape)
        layers.append(Features(centres / 4, torch.zeros(shape[:2]), centres, torch.full(shape[:2], -8.0)))
    FeatureFile(layers, fingerprint(model.config)).save(path)
    return path


@pytest.mark.parametrize("completion", ["none", "linear", "paged", "features"])
def test_window_and_engine_agree(completion: str, model: Llama, maps: Path, audit: Audit) -> None:
    corpus = Corpus(Path(MODEL), text_files(ROOT / "kernels"))
    prompts = [corpus.passage(PROMPT, random.Random(seed)) for seed in range(2)]
    options = {"budget": BUDGET, "completion": completion}
    if completion == "features":
        options["features_file"] = str(maps)
    with engine("rc_topk", options) as llm:
        found = answers(
            llm.generate([{"prompt_token_ids": p} for p in prompts], [greedy(NEW)] * 2, use_tqdm=False)
        )
    audit.assert_right(summaries=completion != "none")

    features = FeatureFile.load(maps, fingerprint(model.config)).layers
    shapes = Shapes(model.layers, model.heads, model.head_size, features)
    settings = shapes.settings(Case(PROMPT, "held_out", BUDGET / PROMPT + 1e-6, "runs", completion))
    assert settings[0].geometry.budget == BUDGET
    for prompt, answer in zip(prompts, found, strict=True):
        cache, window = model.prefill(torch.tensor([prompt])), torch.tensor([answer.tokens])
        log_p = predict(model, cache, window, sparse_attention(settings, cache))[0]
        expected = log_p.gather(-1, window[0, 1:, None]).squeeze(-1)
        # The first token comes from the prefill, which is dense.
        assert torch.allclose(torch.tensor(answer.logprobs[1:]), expected, atol=5e-3)


def test_rows_measured_by_the_engine_are_the_references(model: Llama, tmp_path: Path) -> None:
    """``rc-topk eval --engine``: text and answers, dense, selected and completed, each position a decode step."""
    sizes, context = Sizes(sequences=2, positions=24, prompts=2, seed=3, batch=4), 1024
    engine_args = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
    arguments = [
        *("--model", MODEL, "--data", str(ROOT / "kernels"), "--format", "comments", "--out", str(tmp_path)),
        *("--contexts", str(context), "--budgets", "1/8", "--tasks", "held_out,multi_query"),
        *("--sequences", "2", "--positions", "24", "--prompts", "2", "--seed", "3", "--batch", "4"),
        *("--engine", "--engine-args", json.dumps(engine_args)),
    ]
    assert main(arguments) == 0
    rows = Journal.open(tmp_path / "rows.jsonl").rows
    assert len(rows) == 6

    corpus = Corpus(Path(MODEL), text_files(ROOT / "kernels"), sizes.seed)
    shapes = Shapes(model.layers, model.heads, model.head_size, None)
    for task in ("held_out", "multi_query"):
        samples = make_samples(model, draw(corpus, task, "comments", context, sizes), task, sizes.batch)
        for case in (case for case in rows if case.task == task):
            dense = case.selection == DENSE
            expected, found = measure(model, samples, None if dense else shapes.settings(case)), rows[case]
            assert found["positions"] == expected.positions
            assert found["loss"] == pytest.approx(expected.loss.mean, abs=5e-3)
            assert found["kl"] == pytest.approx(expected.kl.mean, rel=0.02, abs=1e-4)
            assert found["kl"] > 1e-3 or dense or task == "multi_query"
            score = expected.accuracy if task == "held_out" else expected.exact
            assert found["score"] == pytest.approx(score.mean, abs=1e-4)

    before = (tmp_path / "rows.jsonl").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "rows.jsonl").read_text() == before, "nothing was left to measure"
