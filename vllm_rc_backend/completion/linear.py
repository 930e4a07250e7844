"""First-order completion: linear attention with the feature map (1, k), tilted to the query.

Kept for the mid region: its count n, ``K1 = sum k``, ``V1 = sum v``, ``C = sum k v^T``. With r the retrieved tokens,

    n_U      = n - n_R
    mu       = (q.K1 - sum_R s_i) / n_U                 the residual's mean score, exact
    log_mass = log n_U + mu                             Jensen: a lower bound of its true log-mass
    v_U      = (V1 - sum_R v_i) / n_U                   the residual's mean value, exact
             + (q^T C)/n - (q.K1/n)(V1/n)               the tilt: covariance of score and value

The bound means that the completion can never drown a retrieved needle. The accounting of retrieved tokens follows
"Residual-Mass Accounting for Partial-KV Decoding" (arXiv 2604.05438), whose learned feature map this needs no training
to replace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_rc_backend.completion.base import Completion, Residual, Retrieved


class FirstOrder(NamedTuple):
    """``log_mass`` ``[..., heads, group]``; the residual's mean value ``[..., heads, 1, head_size]`` and its tilt
    ``[..., heads, group, head_size]``, which add up to v_U."""

    log_mass: Tensor
    mean_value: Tensor
    tilt: Tensor


@dataclass(frozen=True)
class Linear(Completion):
    """State rows: C ``[head_size, head_size]`` (row: key dimension), then K1, then V1."""

    name: ClassVar[str] = "linear"
    precise_rows: ClassVar[int] = 2

    def state_rows(self, head_size: int) -> int:
        return head_size + 2

    def contribution(self, keys: Tensor, values: Tensor) -> Tensor:
        return torch.cat(
            (keys.mT @ values, keys.sum(dim=-2, keepdim=True), values.sum(dim=-2, keepdim=True)), dim=-2
        )

    def residual(self, query: Tensor, state: Tensor, count: int, retrieved: Retrieved) -> Residual:
        if retrieved.scores.shape[-1] == count:
            return Residual(torch.full_like(query[..., 0], -torch.inf), torch.zeros_like(query))
        estimate = self.first_order(query, state, count, retrieved)
        return Residual(estimate.log_mass, estimate.mean_value + estimate.tilt)

    def first_order(self, query: Tensor, state: Tensor, count: int, retrieved: Retrieved) -> FirstOrder:
        """The estimate in its parts; arguments as ``residual``, with something left."""
        C, K1, V1 = state[..., :-2, :], state[..., -2, :], state[..., -1, :]
        n_U = count - retrieved.scores.shape[-1]
        q_K1 = (query @ K1.unsqueeze(-1)).squeeze(-1)  # [..., heads, group]
        mu = (q_K1 - retrieved.scores.sum(dim=-1)) / n_U
        mean_value = (V1 - retrieved.values.sum(dim=-2)).unsqueeze(-2) / n_U
        tilt = query @ C / count - (q_K1 / count).unsqueeze(-1) * (V1 / count).unsqueeze(-2)
        return FirstOrder(math.log(n_U) + mu, mean_value, tilt)
