"""Completions, one small file each, and their registry.

To add one: copy ``linear.py``, say what the state is and how the residual follows from it, add it here.
"""

from __future__ import annotations

from vllm_rc_backend.completion.base import Completion, Residual, Retrieved
from vllm_rc_backend.completion.features import Features
from vllm_rc_backend.completion.linear import Linear
from vllm_rc_backend.completion.none import NoCompletion
from vllm_rc_backend.completion.paged import Paged

COMPLETIONS: dict[str, type[Completion]] = {
    completion.name: completion for completion in (Linear, NoCompletion, Paged)
}


LEARNED = Features.name
"""The completion that takes a file of ``rc-topk calibrate``; its objects come from ``feature_file``."""

KINDS: dict[str, type[Completion]] = {**COMPLETIONS, LEARNED: Features}
"""Every completion that an option may name."""


def make_completion(name: str) -> Completion:
    """The completion of that name, one of ``COMPLETIONS``."""
    return COMPLETIONS[name]()


__all__ = ["COMPLETIONS", "KINDS", "LEARNED", "Completion", "Residual", "Retrieved", "make_completion"]
