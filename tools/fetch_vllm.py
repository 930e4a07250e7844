"""Fetch the Python sources of the vLLM releases that `make test-compat` runs against, into .cache/vllm-src."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RELEASES = ("0.26.0", "0.33.0")  # the oldest and the newest supported; 0.32.0 is installed in .venv
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_34_x86_64", "manylinux1_x86_64")
TARGET = Path(__file__).parent.parent / ".cache" / "vllm-src"


def fetch(release: str) -> None:
    """Download one wheel as for a GPU machine and keep its Python files and metadata only."""
    folder = TARGET / release
    if folder.exists():
        return
    print(
        f"vllm {release}: downloading the wheel (several hundred MB), keeping its Python sources", flush=True
    )
    with tempfile.TemporaryDirectory() as download:
        options = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--progress-bar",
            "off",
            "--quiet",
            "--dest",
            download,
        ]
        for platform in PLATFORMS:
            options += ["--platform", platform]
        command = [sys.executable, "-m", "pip", "download", f"vllm=={release}", *options]
        subprocess.run(command, check=True)
        (wheel,) = Path(download).glob("*.whl")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                top = name.split("/")[0]
                if name.endswith(".py") or (top.endswith(".dist-info") and not name.endswith("RECORD")):
                    archive.extract(name, partial)
        partial.rename(folder)


if __name__ == "__main__":
    for version in RELEASES:
        fetch(version)
