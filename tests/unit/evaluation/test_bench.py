"""The parts of ``rc-topk bench`` that need no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from vllm_rc_backend.evaluation.bench import TABLE, K, Row, bytes_read, fitting, main, markdown
from vllm_rc_backend.evaluation.environment import update_results
from vllm_rc_backend.evaluation.kernel_check import Case

LAYER = Case(heads=8, head_size=128, sink_tokens=16, tail_tokens=64, budget=2048, statistics_bits=8)
ROW = Row(
    context=32 * K,
    batch=8,
    dense_us=250.0,
    dense_spread_us=1.5,
    rc_topk_us=50.0,
    rc_topk_spread_us=0.8,
    usual_step_us=49.0,
    page_step_us=60.0,
    first_step_us=61.5,
    checkpoint_us=17.4,
    rebuild_us=1234.5,
    floor_us=25.0,
    bytes_read=1,
    layers=3,
)


def test_bytes_of_a_sparse_step_are_pages_statistics_and_summary() -> None:
    tokens, pages = 2048, 32 * K // 16 - 1 - 4
    summary = 8 * (128 * 128 + 4 * 128) * 2
    assert bytes_read(LAYER.layout, 32 * K, 3) == 3 * (tokens * 4096 + pages * 8 * 2 * (128 + 2) + summary)


def test_bytes_of_feature_maps_count_once_for_all_rows() -> None:
    layout = replace(LAYER, completion="features", features=64).layout
    tokens, pages = 2048, 32 * K // 16 - 1 - 4
    summary = 8 * (64 + 2) * 128 * 2  # S, and u in two planes
    maps = 8 * 2 * 64 * (128 + 1) * 4
    assert bytes_read(layout, 32 * K, 3) == 3 * (tokens * 4096 + pages * 8 * 2 * (128 + 2) + summary) + maps


def test_bytes_of_a_dense_step_are_the_context() -> None:
    assert bytes_read(replace(LAYER, budget=0.99, dense_threshold=4096).layout, 4096, 2) == 2 * 4096 * 4096


def test_table_states_ratio_and_multiple_of_the_floor() -> None:
    line = markdown([ROW]).splitlines()[-1]
    assert line == "| 32K x 8 | 250.0 ± 1.5 | 50.0 ± 0.8 | 5.00 | 25.0 | 2.00 | 62 | 17 | 1234 |"
    assert "| 62 | - | 1234 |" in markdown([replace(ROW, checkpoint_us=None)])
    assert "| - | 50.0 ± 0.8 | - |" in markdown([replace(ROW, dense_us=None, dense_spread_us=None)])


def test_results_of_other_commands_stay(tmp_path: Path) -> None:
    path = tmp_path / "results" / "performance.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"end_to_end": [1], "decode": ["old"]}))
    update_results(path, decode=["new"])
    assert json.loads(path.read_text()) == {"end_to_end": [1], "decode": ["new"]}


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 1
    assert "CUDA" in capsys.readouterr().err


def test_the_table_holds_the_shapes_of_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    assert all(f"| {context}K x {batch} |" in text for context, batch in TABLE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "32x8"], "'32x8'; allowed: tokens of context in Ki"),
        (["--rows", "0Kx8"], "'0Kx8'; allowed"),
        (["--query-heads", "30"], "--query-heads 30; allowed: a multiple of --kv-heads 8"),
        (["--kv-heads", "0"], "--query-heads 32; allowed: a multiple of --kv-heads 0, from 1 up"),
        (["--budget", "20"], "budget: got 20.0; allowed: 63 or more"),
        (["--page-size", "24"], "page_size: got 24; allowed: 16, 32, 64 or 128"),
        (["--group-rule", "share", "--selection", "box"], "share"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_what_cannot_be_timed_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_rows_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    pool = torch.empty(3 * 8 * K // 16, 0)  # blocks of 16 tokens
    assert fitting(LAYER, pool, [(8 * K, 2), (8 * K, 3), (4 * K, 1)]) == [(8 * K, 2), (4 * K, 1)]
    assert capsys.readouterr().err == "8K x 3 does not fit into this GPU's memory.\n"
