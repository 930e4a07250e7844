"""What a completion is: a fixed-size state per (sequence, KV head) and an estimate of the residual's softmax share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Retrieved(NamedTuple):
    """The retrieved tokens of one row, which the summary also holds and must not count twice (float32).

    ``scores`` ``[..., heads, group, tokens]`` (scaled), ``keys`` and ``values`` ``[..., heads, tokens, head_size]``.
    ``unread_log_mass`` ``[..., heads, group]``, for completions that need it: the log-mass of the mid region's other
    pages, as their scores estimate it.
    """

    scores: Tensor
    keys: Tensor
    values: Tensor
    unread_log_mass: Tensor | None = None


class Residual(NamedTuple):
    """The estimated residual: log of its softmax mass and its mean value.

    ``log_mass`` ``[..., heads, group]`` (-inf: nothing is left or known), ``value``
    ``[..., heads, group, head_size]``. ``damping``, like ``log_mass``, in [0, 1): how much less of a large share of the
    softmax is believed (see ``kernels.reference.damp``); None: all of it is.
    """

    log_mass: Tensor
    value: Tensor
    damping: Tensor | None = None


@dataclass(frozen=True)
class Completion(ABC):
    """Estimates what was not read. Every part of the state is a sum over tokens, so pages may be added in any order."""

    name: ClassVar[str]
    needs_mass: ClassVar[bool] = False
    """Whether it reads ``Retrieved.unread_log_mass``, and so goes only with policies that ``estimates_mass``."""
    damping: ClassVar[float] = 0.0
    """The most that ``Residual.damping`` can be."""
    precise_rows: ClassVar[int] = 0
    """Last rows of the state that decoding reads from both bfloat16 planes; the others from the high one."""

    @abstractmethod
    def state_rows(self, head_size: int) -> int:
        """Rows of length head_size in the state of one (sequence, KV head); 0 if there is none."""

    def to(self, device: torch.device | str) -> Completion:
        """The same on a device, where it has tensors."""
        return self

    def tokens_read(self, head_size: int) -> float:
        """What reading the state costs, in token-equivalents (one token is K and V at 16 bit)."""
        return (self.state_rows(head_size) + self.precise_rows) / 2

    @abstractmethod
    def contribution(self, keys: Tensor, values: Tensor) -> Tensor:
        """What a run of tokens adds to the state.

        Args:
            keys, values: float32 ``[..., tokens, head_size]``.

        Returns:
            float32 ``[..., state_rows, head_size]``.
        """

    @abstractmethod
    def residual(self, query: Tensor, state: Tensor, count: int, retrieved: Retrieved) -> Residual:
        """Estimate the residual: the mid region without what was retrieved. Leading dimensions are rows.

        Args:
            query: float32 ``[..., heads, group, head_size]``, multiplied by the softmax scale.
            state: float32 ``[..., heads, state_rows, head_size]`` over the mid region.
            count: tokens of the mid region.
            retrieved: the retrieved tokens, all of the mid region.
        """
