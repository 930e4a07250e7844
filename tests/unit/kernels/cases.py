"""Options that kernel tests have in common, for ``kernel_check.Case``."""

from __future__ import annotations

from typing import Any

RUNS: dict[str, Any] = {"selection": "runs", "statistics_bits": 2}
SHARE: dict[str, Any] = {**RUNS, "group_rule": "share"}
FEATURES: dict[str, Any] = {**RUNS, "completion": "features"}
