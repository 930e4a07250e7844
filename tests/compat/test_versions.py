"""The plugin against the Python sources of every supported vLLM: one fresh interpreter each, `checks.py` inside."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.checks import CHECKS

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / ".cache" / "vllm-src"
# The GPU platform is a stand-in (fake_gpu.py); 0.32.0 is the installed CPU build, on its own platform, too.
CASES = [("0.26.0", "cuda"), ("0.32.0", "cuda"), ("0.32.0", "cpu"), ("0.33.0", "cuda")]


@functools.cache
def results(version: str, platform: str, scratch: Path) -> dict[str, str | None]:
    """The outcome of all checks."""
    paths = []
    if version == "0.32.0":
        if importlib.util.find_spec("vllm") is None:
            pytest.skip("vLLM is not installed: make venv")
    elif (SOURCES / version).exists():
        paths.append(SOURCES / version)
    else:
        pytest.skip(f"the sources of vLLM {version} are not there: make test-compat fetches them")
    if platform == "cuda":
        metadata = scratch / "fake_gpu-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-gpu\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\nfake_gpu = fake_gpu:register\n")
        paths += [scratch, HERE]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, HERE.parents[1]])),
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CACHE_ROOT": str(scratch / "cache"),  # vLLM keeps there what it found out about a model
    }
    process = subprocess.run(
        [sys.executable, HERE / "checks.py", platform], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found: dict[str, str | None] = json.loads(process.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compat")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("version", "platform"), CASES, ids=["-".join(case) for case in CASES])
def test_compat(version: str, platform: str, check: str, scratch: Path) -> None:
    problem = results(version, platform, scratch / f"{version}-{platform}")[check]
    assert problem is None, problem
