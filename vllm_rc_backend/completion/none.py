"""No completion: attention renormalises over what was read (selection only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rc_backend.completion.base import Completion, Residual, Retrieved


@dataclass(frozen=True)
class NoCompletion(Completion):
    """The residual has no mass."""

    name: ClassVar[str] = "none"

    def state_rows(self, head_size: int) -> int:
        return 0

    def contribution(self, keys: Tensor, values: Tensor) -> Tensor:
        return keys[..., :0, :]

    def residual(self, query: Tensor, state: Tensor, count: int, retrieved: Retrieved) -> Residual:
        return Residual(torch.full_like(query[..., 0], -torch.inf), torch.zeros_like(query))
