"""Completions, one small file each, and their registry.

To add one: copy ``linear.py``, say what the state is and how the residual follows from it, add it here.
"""

from __future__ import annotations

from vllm_rc_backend.completion.base import Completion, Residual, Retrieved
from vllm_rc_backend.completion.linear import Linear
from vllm_rc_backend.completion.none import NoCompletion
from vllm_rc_backend.completion.paged import Paged

COMPLETIONS: dict[str, type[Completion]] = {
    completion.name: completion for completion in (Linear, NoCompletion, Paged)
}


def make_completion(name: str) -> Completion:
    """The completion of that name."""
    return COMPLETIONS[name]()


__all__ = ["COMPLETIONS", "Completion", "Residual", "Retrieved", "make_completion"]
