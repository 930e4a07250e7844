"""Linear completion with its mass from the page statistics, which a query reads in full anyway.

The page scores hold q.mean(k) of every page. By Jensen, page by page,

    sum over unread pages p of page_size * exp(q.mean_p(k))

is a lower bound of the residual's mass, as linear's is, but never below it: the spread of scores between pages
counts, only the spread inside a page is left out. No byte more is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_rc_backend.completion.base import Residual, Retrieved
from vllm_rc_backend.completion.linear import Linear


@dataclass(frozen=True)
class Paged(Linear):
    """State and value as ``linear``; the mass is ``retrieved.unread_log_mass`` where it is known."""

    name: ClassVar[str] = "paged"
    needs_mean: ClassVar[bool] = True

    def residual(self, query: Tensor, state: Tensor, count: int, retrieved: Retrieved) -> Residual:
        estimate = super().residual(query, state, count, retrieved)
        if retrieved.unread_log_mass is None:
            return estimate
        return Residual(retrieved.unread_log_mass, estimate.value)
