"""Linear completion with its mass from the page scores, which selection has computed anyway.

A policy that ``estimates_mass`` scores a page by the log of the mean of exp(q.k) over it, so

    sum over unread pages p of page_size * exp(score_p)

is the residual's mass without a further byte. For ``runs`` a score is Jensen's lower bound run by run but for rounding,
and so is the sum, never below that of ``linear``, which takes all of the residual for one run: the spread of scores
between runs counts, only the spread inside them is left out.

So near the truth a mass leaves the value to err, by its tilt, which extrapolates. The longer that is beside the mean
value, the less of a large share is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_rc_backend.completion.base import Residual, Retrieved
from vllm_rc_backend.completion.linear import Linear

SMALLEST = 1e-30
"""So that values of zero do not divide zero by zero."""


@dataclass(frozen=True)
class Paged(Linear):
    """State and value as ``linear``; the mass is ``retrieved.unread_log_mass`` where it is known."""

    name: ClassVar[str] = "paged"
    needs_mass: ClassVar[bool] = True
    damping: ClassVar[float] = 0.6

    def residual(self, query: Tensor, state: Tensor, count: int, retrieved: Retrieved) -> Residual:
        if retrieved.unread_log_mass is None or retrieved.scores.shape[-1] == count:
            return super().residual(query, state, count, retrieved)
        estimate = self.first_order(query, state, count, retrieved)
        tilt = estimate.tilt.square().sum(dim=-1)
        mean = (state[..., -1, :] / count).square().sum(dim=-1).unsqueeze(-1)
        damping = self.damping * tilt / (tilt + mean).clamp(min=SMALLEST)
        return Residual(retrieved.unread_log_mass, estimate.mean_value + estimate.tilt, damping)
