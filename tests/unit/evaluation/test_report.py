"""Intervals, matched reads, and a run that was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_rc_backend.evaluation.cli import main
from vllm_rc_backend.evaluation.grid import Case, Journal, Selection, Shapes, cases, published
from vllm_rc_backend.evaluation.measure import Estimate
from vllm_rc_backend.evaluation.report import matched_reads

ROOT = Path(__file__).parents[3]


def test_wilson_interval() -> None:
    share = Estimate.of_share(10, 10)
    assert share.mean == 1
    assert (share.low, share.high) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize("samples", [3, 30])
def test_the_interval_of_a_mean_covers_it(samples: int) -> None:
    covered = 0
    for _ in range(2000):
        estimate = Estimate.of_means(torch.randn(samples) + 2, torch.ones(samples))
        covered += estimate.low <= 2 <= estimate.high
    assert 1860 <= covered <= 1940  # 1900, and four standard deviations


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


def test_a_journal_that_ends_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path, header = tmp_path / "rows.jsonl", {"seed": 0}
    entry = {"context": 8, "task": "t", "budget": 0.5, "selection": "s", "completion": "c", "kl": 0.1}
    Journal(path, header).add(entry)
    whole = path.read_text()
    for torn in (whole + '{"context": 8, "ta', whole + whole.splitlines()[1]):
        path.write_text(torn)
        assert list(Journal(path, header).rows.values()) == [entry]
        assert path.read_text() == whole
    for torn in ("", '{"se'):
        path.write_text(torn)
        assert not Journal(path, header).rows
        assert path.read_text() == '{"seed": 0}\n'


def test_each_selection_has_its_completions() -> None:
    found = {
        (case.selection, case.completion)
        for case in cases(1024, "held_out", [0.25], ["runs", "box", "snapkv"], None)
    }
    pairs = {("runs", "paged"), ("box", "linear"), ("snapkv", "linear")}
    assert found == {("dense", "dense"), *pairs, *((name, "none") for name, _ in pairs)}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--selections", "box", "--completions", "paged"), "completion: got 'paged'"),
        (
            ("--selections", "snapkv", "--completions", "paged"),
            "scores of this query, which snapkv has none of",
        ),
        (("--contexts", "512,1024", "--budgets", "1/32"), "budget: got 16"),
        (("--contexts", "65536"), "--contexts 65536; allowed: up to the model's"),
        (("--data", "/no/such/folder"), "/no/such/folder: no such file or folder"),
        (("--model", "/no/such/model"), "/no/such/model"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    more: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", str(ROOT / "examples" / "model"))
    assert main([*model, "--out", str(tmp_path / "out"), "--device", "cpu", *more]) == 1
    assert words in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_rows_of_other_weights_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(ROOT / "examples" / "model", tmp_path / "model")
    arguments = [
        *("--model", str(model), "--data", str(ROOT / "vllm_rc_backend"), "--out", str(tmp_path / "out")),
        *(
            "--contexts",
            "512",
            "--budgets",
            "1/4",
            "--tasks",
            "multi_key",
            "--prompts",
            "2",
            "--device",
            "cpu",
        ),
    ]
    assert main(arguments) == 0
    file = model / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor / 2 for name, tensor in weights.items()}, file, {"format": "pt"})
    assert main(arguments) == 1
    assert "was made with other arguments" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("budgets", ["2", "0", "1"])
def test_a_budget_is_a_share(budgets: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(ROOT / "examples" / "model"), "--budgets", budgets])
    assert "is not a share of the context between 0 and 1" in capsys.readouterr().err


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
