"""One engine in each process: a comparison starts its engines as modules that write what they found to a file.

Not to their standard output, where vLLM and its libraries write as they like.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_child(module: str, arguments: list[str]) -> Any:
    """Run a module in a process of its own.

    Args:
        module: takes ``--write FILE`` and leaves JSON there.
        arguments: all others.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        subprocess.run([sys.executable, "-m", module, *arguments, "--write", str(file)], check=True)
        return json.loads(file.read_text())
