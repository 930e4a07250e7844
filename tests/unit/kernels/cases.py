"""Options that kernel tests have in common, for ``kernel_check.Case``."""

from __future__ import annotations

from typing import Any

RUNS: dict[str, Any] = {"selection": "runs", "statistics_bits": 2}
SHARE: dict[str, Any] = {**RUNS, "group_rule": "share"}
FEATURES: dict[str, Any] = {**RUNS, "completion": "features"}
LARGE_POOL: dict[str, Any] = {
    **RUNS,
    "completion": "paged",
    "head_size": 128,
    "page_size": 64,
    "sink_tokens": 0,
    "budget": 320,
    "seq_lens": (728, 0),  # the decode adds a page to the summary
    "other_blocks": 2**16,
}
"""Blocks that lie beyond 2^31 elements of the pool: an address in 32 bits is another block's."""
