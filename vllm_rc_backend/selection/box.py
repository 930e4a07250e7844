"""Box: the smallest axis-aligned box around a page's keys.

Quest (Tang et al., arXiv 2406.10774) scores a page by the largest dot product that any point of the box can reach,
``q.centre + |q|.extent``. That bound is loose in every dimension at once; half of the spread term ranks pages better
(docs/accuracy.md), so the weight is 0.5 by default and 1 gives Quest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rc_backend.selection.base import PagePolicy


@dataclass(frozen=True)
class Box(PagePolicy):
    """score = q.(max + min)/2 + weight * |q|.(max - min)/2."""

    name: ClassVar[str] = "box"
    takes_weight: ClassVar[bool] = True
    weight: float = 0.5

    def vectors(self, head_size: int) -> int:
        return 2

    def statistics(self, keys: Tensor) -> Tensor:
        low, high = keys.aminmax(dim=-2)
        return torch.stack(((high + low) / 2, (high - low) / 2), dim=-2)

    def score(self, query: Tensor, statistics: Tensor) -> Tensor:
        centre, extent = statistics.unbind(dim=-2)
        return query @ centre.mT + self.weight * (query.abs() @ extent.mT)
