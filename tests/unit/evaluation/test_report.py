"""Intervals, matched reads, and a run that was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_rc_backend.evaluation.cli import main
from vllm_rc_backend.evaluation.grid import Case, Journal, Selection, Shapes, published
from vllm_rc_backend.evaluation.measure import Estimate
from vllm_rc_backend.evaluation.report import matched_reads

ROOT = Path(__file__).parents[3]


def test_wilson_interval() -> None:
    share = Estimate.of_share(10, 10)
    assert share.mean == 1
    assert (share.low, share.high) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_interval_of_a_mean_covers_it() -> None:
    covered = 0
    for _ in range(300):
        estimate = Estimate.of_means(torch.randn(30) + 2, torch.ones(30))
        covered += estimate.low <= 2 <= estimate.high
    assert 265 <= covered <= 299


@pytest.mark.parametrize("text", ["box", "box:1@8", "runs@2/32", "runs+share", "box:1@8/32+sum", "snapkv"])
def test_a_selection_is_read_as_it_is_written(text: str) -> None:
    assert str(Selection.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("box@2", "statistics_bits"),
        ("box+share", "group_rule"),
        ("snapkv@8", "keeps no statistics"),
        ("snapkv:1", "weight"),
        ("snapkv+sum", "group rule"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Selection.parse(text)


def test_a_group_rule_is_part_of_a_selection() -> None:
    shapes = Shapes(layers=1, heads=2, head_size=128, features=None)
    assert shapes.settings(Case(8192, "held_out", 1 / 32, "runs+share", "none"))[0].group_rule == "share"
    assert Case(8192, "held_out", 1 / 32, "runs+share", "paged").options().group_rule == "share"
    assert str(Selection.parse("runs+max")) == "runs"
    entry = {"selection": "runs+share", "completion": "paged"}
    assert published(entry) == {
        "selection": "runs+share",
        "completion": "default",
        "estimator": "paged",
        "default_selection": False,
    }


def test_snapkv_reads_what_was_decoded_since_the_prompt() -> None:
    shapes = Shapes(layers=1, heads=2, head_size=128, features=None)
    case = Case(8192, "held_out", 1 / 32, "snapkv", "none")
    budget = shapes.settings(case)[0].geometry.tokens_read(8192 - 512)
    assert shapes.reads(case, window=512) == {"tokens": budget + 256, "statistics": 0, "summary": 0}


def test_matched_reads_interpolate_on_logarithms() -> None:
    def row(completion: str, tokens: float, kl: float) -> dict[str, object]:
        fixed = {"context": 8192, "task": "held_out", "budget": 0.1, "selection": "box"}
        return {**fixed, "completion": completion, "token_equivalents": tokens, "kl": kl}

    rows = [row("none", 100, 0.4), row("none", 400, 0.1), row("linear", 110, 0.2), row("linear", 200, 0.05)]
    inside, beyond = matched_reads(rows)
    assert inside["needed"] == pytest.approx(200)
    assert inside["ratio"] == pytest.approx(200 / 110)
    assert beyond["needed"] is None


def test_a_journal_of_other_arguments_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "rows.jsonl", {"seed": 0})
    with pytest.raises(ValueError, match="other arguments"):
        Journal(tmp_path / "rows.jsonl", {"seed": 1})


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    arguments = [
        *("--model", str(ROOT / "examples" / "model"), "--data", str(ROOT / "vllm_rc_backend")),
        *("--out", str(tmp_path), "--contexts", "512", "--budgets", "1/4", "--format", "comments"),
        *("--sequences", "2", "--positions", "8", "--prompts", "2", "--batch", "2", "--device", "cpu"),
    ]
    assert main([*arguments, "--tasks", "held_out", "--diagnostics"]) == 0
    before = (tmp_path / "rows.jsonl").read_text()
    assert main([*arguments, "--tasks", "held_out,multi_key"]) == 0
    assert (tmp_path / "rows.jsonl").read_text().startswith(before)
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert len(rows) == 6
    dense, none, default = (r for r in rows if r["task"] == "held_out")
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert none["kl"] > 0
    assert default["default_selection"]
    assert default["completion"] == "default"
    assert default["token_equivalents"] > none["token_equivalents"] > 512 / 4
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    diagnosis = json.loads((tmp_path / "diagnostics-512.json").read_text())
    assert {r["completion"] for r in diagnosis["rows"]} == {"none", default["estimator"]}
    report = (tmp_path / "accuracy.md").read_text()
    assert report.count("\n| 4 | ") == 2, "a row for each completion in the last quartile"
    assert report.count("\n| 5, 3 | ") == 1, "a row for the last head of the last layer"
