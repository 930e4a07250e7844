"""Distils feature maps: the completed output of sparse attention is to be that of dense attention.

All (layer, KV head) units of a chunk are learned at once, one sequence a step: some queries of its window, the pages
with the largest mass retrieved at a random budget, the rest estimated through the maps. The loss is the relative
squared error of the output plus a small weight on the error of the log-denominator, which keeps the mass honest where
values happen to cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vllm_rc_backend.calibrate.record import Recording

PAGE = 16
SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""Retrieved shares of the context that are trained on."""
QUERIES = 48
LOG_MASS_WEIGHT = 0.05
LEARNING_RATE = 3e-3
"""Of Adam, times the size of a parameter."""
WARM_UP = 20
CLUSTER_SAMPLE, CLUSTER_STEPS = 8192, 6


class Maps(NamedTuple):
    """W, b, A, a of some units: ``[units, features, head_size]`` and ``[units, features]`` in turn, float32."""

    key_weight: Tensor
    key_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor


@dataclass(frozen=True)
class Learned:
    """Maps and their validation loss before and after."""

    maps: Maps
    first_loss: float
    best_loss: float
    steps: int


Progress = Callable[[int, float], None]


def learn(
    training: list[Recording],
    validation: list[Recording],
    features: int,
    steps: int,
    patience: int,
    seed: int,
    progress: Progress,
) -> Learned:
    """Learn the maps of all units of the recordings.

    Args:
        steps: at most; learning stops once ``patience`` checks in a row, 50 steps apart, found no better maps. The last
            step is checked, too.
        progress: is told (step, best validation loss).
    """
    generator = torch.Generator().manual_seed(seed)
    maps = Maps(*(x.requires_grad_() for x in _clusters(training, features, generator)))
    groups = [
        {"params": [x], "lr": LEARNING_RATE * (0.3 + float(x.detach().square().mean().sqrt()))} for x in maps
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - step / steps)
    )

    def validate() -> float:
        fixed = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            return sum(float(loss(maps, r, share, fixed)) for r in validation for share in SHARES) / (
                len(validation) * len(SHARES)
            )

    first = best_loss = validate()
    best, waited, step = Maps(*(x.detach().clone() for x in maps)), 0, 0
    for step in range(1, steps + 1):
        recording = training[int(torch.randint(len(training), (1,), generator=generator))]
        share = SHARES[int(torch.randint(len(SHARES), (1,), generator=generator))]
        optimiser.zero_grad()
        loss(maps, recording, share, generator).backward()
        torch.nn.utils.clip_grad_norm_(maps, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            value = validate()
            waited += 1
            if value < best_loss:
                best_loss, best, waited = value, Maps(*(x.detach().clone() for x in maps)), 0
            if waited == patience:
                break
        progress(step, best_loss)
    return Learned(best, first, best_loss, step)


def loss(maps: Maps, recording: Recording, share: float, generator: torch.Generator) -> Tensor:
    """Mean over units and queries: relative squared output error + weighted squared log-denominator error."""
    keys, values = recording.keys.float(), recording.values.float()
    tokens, window = keys.shape[1], recording.query.shape[1]
    chosen = torch.randperm(window, generator=generator)[:QUERIES].sort().values.to(keys.device)
    query, position = recording.query[:, chosen], tokens - window + chosen

    def attend(x: Tensor, y: Tensor) -> Tensor:
        """``[units, queries, group, m] @ [units, m, n]``."""
        product: Tensor = (x.flatten(1, 2) @ y).unflatten(1, x.shape[1:3])
        return product

    future = torch.arange(tokens, device=keys.device) > position.unsqueeze(-1)
    scores = attend(query, keys.mT).masked_fill(future.unsqueeze(1), -torch.inf)
    first, last = PAGE, int(position[0]) // PAGE * PAGE  # the mid region
    residual = _residual_mask(scores[..., first:last], max(1, int(tokens * share) // PAGE))
    exact = torch.cat(
        (scores[..., :first], scores[..., first:last].masked_fill(residual, -torch.inf), scores[..., last:]),
        dim=-1,
    )
    M = exact.amax(dim=-1, keepdim=True)
    weights, read = (scores - M).exp(), (exact - M).exp()
    dense_mass = weights.sum(dim=-1, keepdim=True)
    dense = attend(weights, values) / dense_mass

    phi = (keys[:, first:last] @ maps.key_weight.mT + maps.key_bias.unsqueeze(1)).softmax(dim=-1)
    logits = attend(query, maps.query_weight.mT) + maps.query_bias[:, None, None]
    estimated = attend((logits - M).clamp(max=30).exp(), phi.mT) * residual
    mass = read.sum(dim=-1, keepdim=True) + estimated.sum(dim=-1, keepdim=True)
    output = (attend(read, values) + attend(estimated, values[:, first:last])) / mass

    scale = dense.square().sum(dim=-1).mean(dim=(1, 2), keepdim=True)
    error = ((output - dense).square().sum(dim=-1) / scale).mean()
    return error + LOG_MASS_WEIGHT * (mass.log() - dense_mass.log()).square().mean()


def _residual_mask(scores: Tensor, count: int) -> Tensor:
    """True where a mid token is not in its query's best pages (by exact mass, the best head of a group decides)."""
    mass = scores.unflatten(-1, (-1, PAGE)).logsumexp(dim=-1).amax(dim=2)  # [units, queries, pages]
    retrieved = torch.zeros_like(mass, dtype=torch.bool)
    retrieved.scatter_(-1, mass.topk(min(count, mass.shape[-1]), dim=-1).indices, True)
    return ~retrieved.repeat_interleave(PAGE, dim=-1).unsqueeze(2)


def _clusters(recordings: list[Recording], features: int, generator: torch.Generator) -> Maps:
    """k-means of the keys as a start: a feature is a cluster, its score the score of the cluster's centre."""
    stride = -(-sum(r.keys.shape[1] for r in recordings) // CLUSTER_SAMPLE)
    keys = torch.cat([r.keys[:, PAGE::stride].float() for r in recordings], dim=1)
    centres = keys[:, torch.randperm(keys.shape[1], generator=generator)[:features].to(keys.device)].clone()
    for _ in range(CLUSTER_STEPS):
        member = functional.one_hot(torch.cdist(keys, centres).argmin(dim=-1), features).float()
        size = member.sum(dim=1).unsqueeze(-1)
        centres = torch.where(size > 0, (member.mT @ keys) / size.clamp(min=1), centres)
    spread = torch.cdist(keys, centres).amin(dim=-1).square().mean(dim=-1).view(-1, 1, 1)
    sharpness = 16 / spread  # soft enough to learn from, hard enough to be the clusters
    return Maps(
        2 * sharpness * centres,
        -(sharpness * centres.square()).sum(dim=-1),
        centres.clone(),
        centres.new_zeros(centres.shape[:2]),
    )
