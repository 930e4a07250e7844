"""One row of the table: a task, a context, a setting, and how far it is from dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from vllm_rc_backend.evaluation.llama import Attention, KVCache, Llama
from vllm_rc_backend.evaluation.samples import Samples, predict
from vllm_rc_backend.evaluation.sparse import Setting, sparse_window

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of_means(cls, values: Tensor, weights: Tensor) -> Estimate:
        """Weighted mean of one value per sample; the interval is the ratio estimator's over samples, by Student's t.

        Positions of one passage depend on each other, so samples, not positions, are what is independent.
        """
        n, mean = len(values), float((values * weights).sum() / weights.sum())
        if n < 2:
            return cls(mean, math.nan, math.nan)
        spread = weights * (values - mean) / weights.mean()
        half = float(stats.t.ppf(0.975, n - 1)) * float(spread.square().sum().sqrt()) / math.sqrt(n * (n - 1))
        return cls(mean, mean - half, mean + half)

    @classmethod
    def of_share(cls, hits: int, n: int) -> Estimate:
        """A share of n trials, with Wilson's interval."""
        share, z2 = hits / n, Z95**2 / n
        centre = (share + z2 / 2) / (1 + z2)
        half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
        return cls(share, centre - half, centre + half)


@dataclass(frozen=True)
class Result:
    """What one run over the samples gave.

    Attributes:
        kl: KL(dense || sparse) of the next token's distribution, nats, over the counted positions.
        loss: cross-entropy of the true tokens, nats, over the counted positions.
        exact: share of samples whose counted tokens are all the most likely ones (an exact match of the answer).
        accuracy: share of counted tokens that are the most likely ones.
        samples, positions: how many.
    """

    kl: Estimate
    loss: Estimate
    exact: Estimate
    accuracy: Estimate
    samples: int
    positions: int


def measure(model: Llama, samples: Samples, settings: Sequence[Setting] | None) -> Result:
    """Decode the samples' windows with one setting per layer; None: the dense run itself."""
    parts = []
    for cache, window, counted, dense in zip(
        samples.caches, samples.windows, samples.counted, samples.dense, strict=True
    ):
        log_p = (
            dense if settings is None else predict(model, cache, window, sparse_attention(settings, cache))
        )
        parts.append(compare(dense, log_p, window[:, 1:], counted))
    return summarise(parts)


class PerSample(NamedTuple):
    """Means over the counted positions of each sample, and how many there are; ``[samples]`` each, on the host."""

    kl: Tensor
    loss: Tensor
    hits: Tensor
    counts: Tensor


def compare(dense: Tensor, log_p: Tensor, targets: Tensor, counted: Tensor) -> PerSample:
    """One batch of samples.

    Args:
        dense, log_p: log-probabilities ``[samples, positions, vocabulary]`` under dense and under this attention.
        targets: the true tokens, int64 ``[samples, positions]``.
        counted: bool, like ``targets``.
    """

    def mean(values: Tensor) -> Tensor:
        return ((values * counted).sum(dim=1) / counted.sum(dim=1)).cpu()

    return PerSample(
        kl=mean((dense.exp() * (dense - log_p)).sum(dim=-1)),
        loss=mean(-log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)),
        hits=mean((log_p.argmax(dim=-1) == targets).float()),
        counts=counted.sum(dim=1).float().cpu(),
    )


def summarise(parts: Sequence[PerSample]) -> Result:
    """All batches as one row."""
    kl, loss, hit, weights = (torch.cat(values) for values in zip(*parts, strict=True))
    return Result(
        kl=Estimate.of_means(kl, weights),
        loss=Estimate.of_means(loss, weights),
        exact=Estimate.of_share(int((hit == 1).sum()), len(hit)),
        accuracy=Estimate.of_means(hit, weights),
        samples=len(hit),
        positions=int(weights.sum()),
    )


def sparse_attention(settings: Sequence[Setting], cache: KVCache) -> Attention:
    """The model's attention after that cache, layer by layer as set."""

    def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        return sparse_window(query, keys, values, settings[layer], cache.queries[layer])

    return attend
