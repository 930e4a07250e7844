"""Write ``docs/options.md`` from the options' own definitions."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.generated import write_or_check
from vllm_rc_backend.config import KEY, RCTopKConfig

PAGE = Path(__file__).parent.parent / "docs" / "options.md"

INTRODUCTION = f"""\
# Options

<!-- Written by `make docs` from vllm_rc_backend/config.py. Do not edit. -->

Given as JSON, or one by one:

    vllm serve MODEL --attention-backend rc_topk --additional-config '{{"{KEY}": {{"budget": 2048}}}}'
    vllm serve MODEL --attention-backend rc_topk --additional-config.{KEY}.budget 2048

and in Python `LLM(MODEL, attention_backend="rc_topk", additional_config={{"{KEY}": {{"budget": 2048}}}})`.
An unknown option, a value out of range or a contradiction stops the start with a message that names the option, the
value and what is allowed. `rc-topk doctor` prints what a configuration resolves to.
"""


def page() -> str:
    """The whole page: a section an option, in the order of their definition."""
    sections = [
        f"## `{name}`\n\n{documentation}\n\nDefault `{default}`; allowed: {allowed}.\n"
        for name, default, allowed, documentation in RCTopKConfig.table()
    ]
    return "\n".join([INTRODUCTION, *sections])


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page, __doc__))
