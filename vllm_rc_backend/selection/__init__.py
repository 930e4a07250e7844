"""Selection policies, one small file each, and their registry.

To add one: copy ``box.py``, change the statistic and the score, add it here. The test matrix and ``rc-topk eval`` pick
it up from the registry.
"""

from __future__ import annotations

from vllm_rc_backend.selection.base import PagePolicy
from vllm_rc_backend.selection.box import Box
from vllm_rc_backend.selection.mean_var import MeanVar
from vllm_rc_backend.selection.moba import MoBA
from vllm_rc_backend.selection.oracle import Oracle
from vllm_rc_backend.selection.runs import Runs

POLICIES: dict[str, type[PagePolicy]] = {policy.name: policy for policy in (Box, MeanVar, MoBA, Oracle, Runs)}


def make_policy(name: str, weight: float | None = None) -> PagePolicy:
    """The policy of that name; ``weight`` only where the policy takes one (None: its default)."""
    policy = POLICIES[name]
    if weight is None:
        return policy()
    if not policy.takes_weight:
        raise ValueError(f"selection policy {name} takes no weight, got {weight}")
    return policy(weight=weight)  # type: ignore[call-arg]


__all__ = ["POLICIES", "PagePolicy", "make_policy"]
