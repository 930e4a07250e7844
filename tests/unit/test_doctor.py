"""``rc-topk doctor``: what will be refused is refused there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rc_backend.doctor import main

MODEL = Path(__file__).parents[2] / "examples" / "model"


def doctor(options: dict[str, Any], *more: str) -> int:
    return main(["--model", str(MODEL), "--options", json.dumps(options), *more])


@pytest.mark.parametrize(
    ("options", "more", "words"),
    [
        ({"group_rule": "softmax"}, (), "group_rule=softmax has no GPU kernel"),
        ({"statistics_bits": 8}, (), "statistics_bits=8 has no GPU kernel with selection=runs"),
        ({"selection": "oracle"}, (), "selection=oracle has no GPU kernel"),
        (
            {"kv_residency": "host", "host_kv_gib": 0.1},
            ("--kv-cache-bytes", "1"),
            "kv_residency=host has no 8-bit KV cache on GPUs",
        ),
    ],
    ids=str,
)
def test_what_only_a_cpu_can_do(
    options: dict[str, Any],
    more: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor(options, *more) == 0
    assert "refused" not in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert doctor(options, *more) == 1
    assert words in " ".join(capsys.readouterr().out.split())
    assert doctor({}) == 0
