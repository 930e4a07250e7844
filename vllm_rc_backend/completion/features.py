"""Learned positive feature maps: linear attention with phi(k) = softmax(W k + b) and psi(q) = exp(A q + a).

"Top-K Retrieval with Fixed-Size Linear-Attention Completion" (arXiv 2604.05438): exp(q.k) is approximated by
psi(q).phi(k), so that the mid region is a state of fixed size, and what was retrieved is subtracted from it:

    u   = sum phi(k)        S   = sum phi(k) v^T
    D_U = psi(q).(u - sum_R phi(k_i))        N_U = psi(q)^T (S - sum_R phi(k_i) v_i^T)

Each feature is a soft cluster of keys whose common score is A q + a. ``rc-topk calibrate`` learns the maps of a model,
layer by layer and KV head by KV head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rc_backend.completion.base import Completion, Residual, Retrieved

SMALLEST_COUNT = 1e-6
"""Tokens that a feature keeps at least, so that rounding after the subtraction cannot make a mass negative."""


@dataclass(frozen=True, eq=False)
class Features(Completion):
    """State rows: S ``[features, head_size]``, then u, ``features / head_size`` rows of it, zero-padded.

    Attributes:
        key_weight, query_weight: W and A of one layer, float32 ``[heads, features, head_size]``.
        key_bias, query_bias: b and a, float32 ``[heads, features]``.
    """

    name: ClassVar[str] = "features"
    damping: ClassVar[float] = 0.3
    key_weight: Tensor = field(repr=False)
    key_bias: Tensor = field(repr=False)
    query_weight: Tensor = field(repr=False)
    query_bias: Tensor = field(repr=False)

    @property
    def features(self) -> int:
        """D_phi."""
        return self.key_weight.shape[-2]

    @property
    def precise_rows(self) -> int:  # type: ignore[override]
        return -(-self.features // self.key_weight.shape[-1])

    def to(self, device: torch.device | str) -> Features:
        return Features(
            *(x.to(device) for x in (self.key_weight, self.key_bias, self.query_weight, self.query_bias))
        )

    def state_rows(self, head_size: int) -> int:
        return self.features + self.precise_rows

    def map_keys(self, keys: Tensor) -> Tensor:
        """phi: ``[..., heads, tokens, head_size]`` -> ``[..., heads, tokens, features]``, rows sum to one."""
        return (keys @ self.key_weight.mT + self.key_bias.unsqueeze(-2)).softmax(dim=-1)

    def contribution(self, keys: Tensor, values: Tensor) -> Tensor:
        phi = self.map_keys(keys)
        u = phi.sum(dim=-2)
        padding = self.precise_rows * keys.shape[-1] - self.features
        rows = torch.nn.functional.pad(u, (0, padding)).unflatten(-1, (-1, keys.shape[-1]))
        return torch.cat((phi.mT @ values, rows), dim=-2)

    def residual(self, query: Tensor, state: Tensor, count: int, retrieved: Retrieved) -> Residual:
        if retrieved.scores.shape[-1] == count:
            return Residual(torch.full_like(query[..., 0], -torch.inf), torch.zeros_like(query))
        phi = self.map_keys(retrieved.keys)
        S = state[..., : self.features, :] - phi.mT @ retrieved.values
        u = state[..., self.features :, :].flatten(-2)[..., : self.features] - phi.sum(dim=-2)
        logits = query @ self.query_weight.mT + self.query_bias.unsqueeze(-2)  # [..., heads, group, features]
        scores = logits + u.clamp(min=SMALLEST_COUNT).log().unsqueeze(-2)
        log_mass = scores.logsumexp(dim=-1)
        value = (logits - log_mass.unsqueeze(-1)).exp() @ S
        return Residual(log_mass, value, torch.full_like(log_mass, self.damping))
