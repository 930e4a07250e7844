"""Queries, keys and values of a model reading a text, as its own dense attention sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.sparse import dense_window


@dataclass(frozen=True)
class Recording:
    """One sequence. ``units`` are (layer, KV head) pairs, layer by layer.

    Attributes:
        query: the last positions' queries, scaled, float32 ``[units, window, group, head_size]``.
        keys, values: ``[units, tokens, head_size]`` in the cache's dtype.
    """

    query: Tensor
    keys: Tensor
    values: Tensor

    def units(self, first: int, last: int, device: torch.device) -> Recording:
        """Some of the units, on a device."""
        return Recording(*(x[first:last].to(device) for x in (self.query, self.keys, self.values)))


def record(model: Llama, tokens: list[int], window: int) -> Recording:
    """Read one sequence densely and keep what attention saw, in host memory."""
    rows = torch.tensor([tokens], device=model.device)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        seen.append((query[0].transpose(0, 1).cpu(), keys[0].cpu(), values[0].cpu()))
        return dense_window(query, keys, values)

    model.window(model.prefill(rows[:, :-window]), rows[:, -window:], attend)
    return Recording(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
