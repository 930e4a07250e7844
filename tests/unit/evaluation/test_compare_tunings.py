"""What of ``tools.compare_tunings`` needs no GPU."""

from __future__ import annotations

import argparse

import pytest
from rich.console import Console

pytest.importorskip("triton")

from tools.compare_tunings import DENSE, SHIPPED, main, make_table, parse_tuning
from vllm_rc_backend.attention_triton import Tuning


def test_a_tuning_changes_what_it_names() -> None:
    name, tuning = parse_tuning("other:select_few=2048;joint_programs=[2, 3];overlap=false;joint_filled=0.5")
    assert name == "other"
    assert tuning == Tuning(select_few=2048, joint_programs=(2, 3), overlap=False, joint_filled=0.5)


@pytest.mark.parametrize(
    "text", ["a", "a:", "a:warps=4", "a:select_few", "a:select_few=x", "a:select_few=1.5", "a:overlap=1"]
)
def test_others_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: "):
        parse_tuning(text)


def test_the_table_compares_with_the_shipped() -> None:
    times = {SHIPPED: [50.0, 52.0, 51.0], "other": [45.9, 45.8, 46.0], DENSE: [255.0, 255.0, 256.0]}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(make_table({"32K x 8": times}))
    text = captured.get()
    assert "51.0 ± 2.0" in text
    assert "45.9 ± 0.2 (-10.0%)" in text
    assert "255.0 ± 1.0 (+400.0%)" in text


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--tuning", "a:select_few=2048"]) == 1
    assert "CUDA" in capsys.readouterr().err
