"""What ``pip install vllm-rc-backend`` brings: wheel and source distribution, built here and installed elsewhere."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import vllm_rc_backend

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_rc_backend"
SOURCES = {
    str(Path(folder, name).relative_to(ROOT))
    for folder, _, names in os.walk(PACKAGE, followlinks=True)
    for name in names
    if name.endswith((".py", ".c"))
}
"""Every source of the package, those behind the link ``vllm_rc_backend/kernels`` among them."""


def build(kind: str, source: Path, target: Path) -> Path:
    """A distribution of a source tree, by the build backend that pip would call; offline, with this environment's."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return target / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files behind."""
    source = tmp_path_factory.mktemp("source") / "tree"
    unneeded = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "dist", "*.egg-info", "examples", "docs", "tests"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=unneeded)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which must hold all that it takes."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_source_the_types_and_the_licence(wheel: Path) -> None:
    assert {
        "vllm_rc_backend/plugin.py",
        "vllm_rc_backend/kernels/triton/decode.py",
        "vllm_rc_backend/kernels/csrc/host_pool.c",
    } < SOURCES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"vllm_rc_backend-{vllm_rc_backend.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        licence = archive.read(f"{info}/licenses/LICENSE")
    assert {name for name in names if not name.startswith(info)} == SOURCES | {"vllm_rc_backend/py.typed"}
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == vllm_rc_backend.__version__
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_wheel_runs_on_any_platform(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_it_works_in_a_fresh_environment_beside_vllm(wheel: Path, tmp_path: Path) -> None:
    """vLLM, torch and the few requirements are lent by this environment; the plugin comes from the wheel alone."""
    pytest.importorskip("vllm")
    fresh = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", fresh], check=True)
    python = fresh / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(command, check=True)
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
        "backend = E['RC_TOPK'].get_class();"
        "import vllm_rc_backend; print(backend.get_name(), vllm_rc_backend.__file__)"
    )
    assert run(python, "-c", code).split()[-2:] == ["RC_TOPK", str(site / "vllm_rc_backend" / "__init__.py")]
    report = run(fresh / "bin" / "rc-topk", "doctor", "--model", ROOT / "examples" / "model")
    assert vllm_rc_backend.__version__ in report


def test_the_requirements_are_few() -> None:
    """vLLM and torch are the user's choice; a version of either here would replace what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith(("vllm", "torch", "triton"))]
