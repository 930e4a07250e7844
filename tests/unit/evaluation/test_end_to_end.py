"""Whole-engine times: how what two processes found becomes one table, and is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_rc_backend.evaluation.end_to_end import join, keep, markdown
from vllm_rc_backend.evaluation.environment import command_line


def found(
    token_ms: float, prefill_ms: float | None, backend: str = "RC_TOPK", layers: int = 32
) -> dict[str, Any]:
    """What one backend's process leaves."""
    spread = None if prefill_ms is None else 1.0
    times = {
        "prefill_ms": prefill_ms,
        "prefill_ms_spread": spread,
        "token_ms": token_ms,
        "token_ms_spread": 0.5,
    }
    return {
        "backend": backend,
        "rows": [{"context": 4096, "batch": 64, **times}],
        "kv_tokens": 1000,
        "layers": layers,
        "options": {},
        "environment": {"command": "x"},
    }


def dense(token_ms: float, prefill_ms: float | None, layers: int = 32) -> dict[str, Any]:
    """What vLLM's own does."""
    return found(token_ms, prefill_ms, "FLASH_ATTN", layers)


def test_rows_state_ratios() -> None:
    (row,) = join(dense(12.0, 500.0), found(4.0, 505.0))
    assert join(found(4.0, 505.0), dense(12.0, 500.0)) == [row]
    assert (row["ratio"], row["prefill_ratio"]) == (3.0, 1.01)
    assert markdown([row]).endswith("| 4096 x 64 | 12.00 | 4.00 | 3.00 | 500 | 505 ± 1 | 1.010 |")
    (row,) = join(dense(12.0, None), found(4.0, None))
    assert row["prefill_ratio"] is None
    assert markdown([row]).endswith("| 4096 x 64 | 12.00 | 4.00 | 3.00 | - | - | - |")


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(
        ValueError, match="both are of RC_TOPK: one of FLASH_ATTN and one of RC_TOPK is needed"
    ):
        join(found(12.0, None), found(4.0, None))
    with pytest.raises(ValueError, match="of other loads: 4096x64 of 8 layers and 4096x64 of 32 layers"):
        join(dense(12.0, None, layers=8), found(4.0, None))


def test_what_is_no_time_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert join(dense(12.0, None), found(-71.7, None)) == []
    assert "4096x64 is left out: 12.00 and -71.70 ms" in capsys.readouterr().err


def test_rows_of_other_loads_and_commands_stay(tmp_path: Path) -> None:
    path = tmp_path / "performance.json"
    path.write_text(json.dumps({"decode": ["kept"]}))
    keep(path, join(dense(12.0, None), found(4.0, None)))
    keep(path, join(dense(3.0, None, layers=8), found(1.0, None, layers=8)))
    keep(path, join(dense(12.0, None), found(6.0, None)))
    kept = json.loads(path.read_text())
    assert kept["decode"] == ["kept"]
    assert [(r["layers"], r["ratio"]) for r in kept["end_to_end"]] == [(8, 3.0), (32, 2.0)]


def test_a_command_line_names_no_paths() -> None:
    assert command_line("rc-topk bench", ["--rows", "8Kx1", "--output", "/x", "--repeats", "5"]) == (
        "rc-topk bench --rows 8Kx1 --repeats 5"
    )
