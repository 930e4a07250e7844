"""Mean and variance: the log of a page's mass if its keys were normally distributed.

For k ~ N(mean, diag(var)), log E[exp(q.k)] = q.mean + q^2.var / 2: the second-order cumulant expansion of the page's
log-mass, up to the common log of the page size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rc_backend.selection.base import PagePolicy


@dataclass(frozen=True)
class MeanVar(PagePolicy):
    """score = q.mean(k) + weight * q^2.var(k); weight 1/2 is the normal distribution's log-mass."""

    name: ClassVar[str] = "mean_var"
    takes_weight: ClassVar[bool] = True
    weight: float = 0.5

    def vectors(self, head_size: int) -> int:
        return 2

    def statistics(self, keys: Tensor) -> Tensor:
        return torch.stack((keys.mean(dim=-2), keys.var(dim=-2, correction=0)), dim=-2)

    def score(self, query: Tensor, statistics: Tensor) -> Tensor:
        mean, variance = statistics.unbind(dim=-2)
        return query @ mean.mT + self.weight * (query.square() @ variance.mT)
