"""``rc-topk bench`` from end to end on one small row: everything that it times is captured, replayed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools import compare_tunings
from vllm_rc_backend.evaluation.bench import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("completion", ["paged", "features", "none"])
def test_one_row(completion: str, tmp_path: Path) -> None:
    results, plot = tmp_path / "performance.json", tmp_path / "decode.png"
    arguments = ["--rows", "8Kx2", "--repeats", "1", "--completion", completion]
    assert main([*arguments, "--output", str(results), "--plot", str(plot)]) == 0
    (row,) = json.loads(results.read_text())["decode"]
    assert row["rc_topk_us"] > 0
    assert row["first_step_us"] > 0
    assert (row["checkpoint_us"] is None) == (completion == "none")
    assert plot.stat().st_size > 0


def test_tunings_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--rows",
        "8Kx2",
        "4Kx1",
        "--repeats",
        "1",
        "--tuning",
        "two:joint_programs=[2];select_few=256",
    ]
    assert compare_tunings.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("8K x 2", "4K x 1", compare_tunings.SHIPPED, "two"))
