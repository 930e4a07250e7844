"""Oracle: the page's exact log-mass. Reads every key, so it is for evaluation only: the ceiling of any page score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_rc_backend.selection.base import PagePolicy


@dataclass(frozen=True)
class Oracle(PagePolicy):
    """score = log of the mean of exp(q.k_i) over the page."""

    name: ClassVar[str] = "oracle"
    reads_keys: ClassVar[bool] = True
    estimates_mass: ClassVar[bool] = True

    def vectors(self, head_size: int) -> int:
        return 0

    def statistics(self, keys: Tensor) -> Tensor:
        return keys[..., :0, :]

    def score(self, query: Tensor, statistics: Tensor) -> Tensor:
        scores = query.unsqueeze(-3) @ statistics.mT  # [..., pages, group, page_size]
        return (scores.logsumexp(dim=-1) - math.log(statistics.shape[-2])).mT
