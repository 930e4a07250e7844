"""What a selection policy is: a statistic per page and a score per (query, page)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class PagePolicy(ABC):
    """Scores a page from a few vectors of head size that are kept for it.

    A policy is a pure function of the page's keys, so the side store needs no history: whoever finishes a page can
    (re)compute its statistics from the cache.
    """

    name: ClassVar[str]
    statistics_bits: ClassVar[tuple[int, ...]] = (16, 8)
    """Bits per element that the statistics may be stored at, the policy's default first."""
    estimates_mass: ClassVar[bool] = False
    """Whether a score estimates the log of the mean of exp(q.k) over the page, so that scores add up to a mass."""
    takes_weight: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False
    """True for evaluation-only policies that read the page's keys instead of a statistic."""

    @abstractmethod
    def vectors(self, head_size: int) -> int:
        """Vectors of head size kept per page and KV head: what one query reads for every page."""

    @abstractmethod
    def statistics(self, keys: Tensor) -> Tensor:
        """Statistics of finished pages.

        Args:
            keys: float32 ``[..., page_size, head_size]``.

        Returns:
            float32 ``[..., vectors, head_size]``.
        """

    @abstractmethod
    def score(self, query: Tensor, statistics: Tensor) -> Tensor:
        """Page scores, in units of a scaled attention score.

        Args:
            query: ``[..., group, head_size]``, already multiplied by the softmax scale.
            statistics: ``[..., pages, vectors, head_size]`` (the keys ``[..., pages, page_size, head_size]`` if
                ``reads_keys``).

        Returns:
            ``[..., group, pages]``.
        """
