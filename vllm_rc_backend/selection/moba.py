"""MoBA's page score (Lu et al., arXiv 2502.13189): the dot product with the page's mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_rc_backend.selection.base import PagePolicy


@dataclass(frozen=True)
class MoBA(PagePolicy):
    """score = q.mean(k)."""

    name: ClassVar[str] = "moba"
    estimates_mass: ClassVar[bool] = True

    def vectors(self, head_size: int) -> int:
        return 1

    def statistics(self, keys: Tensor) -> Tensor:
        return keys.mean(dim=-2, keepdim=True)

    def score(self, query: Tensor, statistics: Tensor) -> Tensor:
        return query @ statistics[..., 0, :].mT
