"""``rc-topk``: each command is a module of its own, loaded when it is asked for."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "doctor": ("vllm_rc_backend.doctor", "what a configuration costs and whether it will start"),
    "eval": ("vllm_rc_backend.evaluation.cli", "accuracy against tokens read, on your model"),
    "calibrate": ("vllm_rc_backend.calibrate.cli", "learns feature maps for completion=features"),
    "bench": (
        "vllm_rc_backend.evaluation.bench",
        "speed against FlashAttention and the bytes floor, on your GPU",
    ),
}

EXTRA = ("matplotlib", "scipy", "tokenizers", "transformers")
"""Modules that the extra `eval` brings."""


def usage() -> str:
    """What ``rc-topk`` prints without a command."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: rc-topk COMMAND [options]   (rc-topk COMMAND --help explains)", "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``rc-topk`` script."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"rc-topk: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        module = import_module(COMMANDS[command][0])
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(
            f"rc-topk {command}: {error.name} is not installed; it comes with the extra `eval`: pip install '.[eval]'",
            file=sys.stderr,
        )
        return 1
    return int(module.main(rest) or 0)
