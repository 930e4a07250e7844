"""The comparison with and without a memory: its arithmetic, and a run at toy scale."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.rat_plus import EXAMPLE, write_rat_plus
from tools import memory_comparison
from tools.memory_comparison import Difference, differences, page, read_rows
from vllm_rc_backend.evaluation.grid import DENSE, Case
from vllm_rc_backend.evaluation.needles import NEEDLES


def entry(score: float, n: int = 100) -> dict[str, Any]:
    return {"score": score, "n": n}


def test_difference_and_verdict() -> None:
    found = Difference.of([entry(0.5), entry(0.7)], [entry(0.9), entry(0.9)])
    assert (found.without, found.with_it) == pytest.approx((0.6, 0.9))
    # Standard errors of 0.050, 0.046, 0.031 and 0.031: half of the root of their squares' sum, times 1.96.
    assert found.half == pytest.approx(0.079, abs=0.002)
    assert found.verdict == "higher"
    assert Difference.of([entry(0.9)], [entry(0.5)]).verdict == "lower"
    assert Difference.of([entry(1.0, 10)], [entry(0.9, 10)]).verdict == "undecided"
    assert Difference.of([entry(1.0)], [entry(1.0)]).half > 0


def test_a_setting_counts_when_all_tasks_are_there() -> None:
    rows = {Case(8192, task, 1 / 32, "moba", "none"): entry(0.5) for task in NEEDLES}
    (setting,) = (setting for setting, _ in differences(rows, rows))
    assert setting == Case(8192, "", 1 / 32, "moba", "none")
    fewer = dict(list(rows.items())[1:])
    assert not list(differences(rows, fewer))


def test_what_was_not_run_is_said() -> None:
    assert page({}).count("Not run.") == 2


def test_a_run_goes_on_and_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    for name in ("dense", "continued"):
        shutil.copytree(EXAMPLE, models / name)
    for name in ("memory", "converted"):
        write_rat_plus(models / name)
    monkeypatch.setattr(memory_comparison, "BUDGETS", (1 / 4,))
    monkeypatch.setattr(memory_comparison, "PAGE", tmp_path / "page.md")
    arguments = ["--models", str(models), "--rows", str(tmp_path / "rows"), "--device", "cpu"]
    arguments += ["--contexts", "640", "--prompts", "1"]
    assert memory_comparison.main(arguments) == 0
    rows = read_rows(tmp_path / "rows")
    assert set(rows) == {"dense", "memory", "continued", "converted"}
    # Four policies without and with completion, and dense.
    assert all(len(found) == 8 * 9 for found in rows.values())
    known = Case(640, "single_2", 1.0, DENSE, DENSE)
    assert rows["dense"][known]["score"] == 1.0
    assert rows["memory"][known]["loss"] > 2 * rows["dense"][known]["loss"], (
        "gates that it was not trained with"
    )
    text = (tmp_path / "page.md").read_text()
    assert "Not run." not in text
    assert text.count("of 4 settings the score with the memory is") == 4
    assert memory_comparison.main(["--rows", str(tmp_path / "rows"), "--check"]) == 0

    before = (tmp_path / "rows" / "dense.jsonl").read_text()
    assert memory_comparison.main(arguments) == 0
    assert (tmp_path / "rows" / "dense.jsonl").read_text() == before
