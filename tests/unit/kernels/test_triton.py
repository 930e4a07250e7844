"""The Triton kernels without a GPU: interpreted against the reference, and compiled for Hopper.

Both in processes of their own: Triton decides at import whether it interprets, for everything in a process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_rc_backend.attention_triton import JOINT_SHARED_BYTES, Tuning

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(arguments: list[str], **environment: str) -> str:
    """Run Python and return what it printed; fails with all of it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(5400)
def test_interpreted_kernels_agree_with_the_reference() -> None:
    """The longest of all, so by two processes."""
    plugin = ["-p", "no:cacheprovider", "-p", "tests.unit.kernels.every_other"]
    arguments = ["-m", "pytest", "-q", *plugin, str(HERE / "triton_interpreted.py")]
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(run, arguments, TRITON_INTERPRET="1", EVERY_OTHER=str(i)) for i in range(2)]
    for half in halves:
        assert re.search(r"[1-9]\d* passed", half.result())


def test_interpreted_top_k_agrees_with_a_sort() -> None:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "topk_interpreted.py")]
    run(arguments, TRITON_INTERPRET="1")


def test_interpreted_page_cache_returns_what_the_pool_holds() -> None:
    files = [str(HERE / name) for name in ("page_cache_interpreted.py", "staging_interpreted.py")]
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], TRITON_INTERPRET="1")


def test_kernels_compile_for_hopper_within_its_limits() -> None:
    for variant in json.loads(run(["-m", "tests.unit.kernels.triton_compiled"], TRITON_INTERPRET="0")):
        assert variant["local_bytes"] == 0, f"{variant} has an array that is not in registers"
        # Some registers spill in many variants. This many do in one, compiled by Triton 3.9 (docs/performance.md).
        assert variant["stack_bytes"] <= 2048, f"{variant} spills registers"
        assert variant["shared_bytes"] <= 227 * 1024, f"{variant} does not fit"
        if variant["shortest_wait"] is not None and variant["stack_bytes"] == 0:
            assert variant["shortest_wait"] >= 50, f"{variant} waits for memory in each round of scoring"
        # Two programs per multiprocessor at least, or nothing hides the memory's latency.
        assert variant["registers"] * variant["threads"] * 2 <= 65536, (
            f"{variant} leaves no room for a second"
        )
        if variant["scores"] and variant["attends"] and variant["runs"]:
            # Programs that wait for each other must fit into a multiprocessor at the same time.
            programs = 65536 // (variant["most_registers"] * variant["threads"])
            assert programs in Tuning.joint_programs
            assert variant["registers"] * variant["threads"] * programs <= 65536, variant
            shared = variant["shared_bytes"] + 1024  # the driver's
            assert shared * programs <= JOINT_SHARED_BYTES, variant
