"""Files that are generated and committed: written, or with ``--check`` compared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def write_or_check(file: Path, generate: Callable[[], str], description: str | None) -> int:
    """The command line of a script that writes one file.

    Args:
        file: what is written.
        generate: makes its whole text.
        description: of the script, for ``--help``.

    Returns:
        The exit status: 1 if ``--check`` was given and the file is not current.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the file is not current"
    )
    check, text = parser.parse_args().check, generate()
    if not check:
        file.write_text(text)
    elif not file.exists() or file.read_text() != text:
        print(f"{file} is not current: run `make docs`", file=sys.stderr)
        return 1
    return 0
