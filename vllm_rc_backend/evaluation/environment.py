"""What measured times depend on, and the file that they are kept in."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from vllm_rc_backend import __version__

PATHS = ("--output", "--plot", "--write")


def command_line(program: str, arguments: list[str]) -> str:
    """A command with the options that its result depends on: all but where that is written to."""
    paths = [i for i, argument in enumerate(arguments) if argument in PATHS]
    kept = [argument for i, argument in enumerate(arguments) if not {i, i - 1} & set(paths)]
    return shlex.join([*program.split(), *kept])


def environment(device: torch.device, command: str) -> dict[str, str]:
    """Versions, the GPU, its clocks, the date and the command."""
    import triton

    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "gpu": torch.cuda.get_device_name(device),
        "vllm_rc_backend": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }
    try:
        import vllm

        found["vllm"] = vllm.__version__
    except ImportError:
        found["vllm"] = "not installed: no dense figures"
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        found["driver, SM clock, memory clock, highest SM clock"] = subprocess.run(
            smi, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        found["driver and clocks"] = f"unknown: {error}"
    return found


def update_results(path: Path, **entries: Any) -> None:
    """Set entries of a results file; what other commands wrote there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(results | entries, indent=2) + "\n")
