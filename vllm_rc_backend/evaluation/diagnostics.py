"""Where sparse attention goes wrong: errors per layer and head, by how spread the attention is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.samples import Samples, predict
from vllm_rc_backend.evaluation.sparse import Run, Setting, sparse_window

MEASURES = ("output_error", "log_denominator_error", "captured_mass", "entropy")


@dataclass(frozen=True)
class Diagnosis:
    """One layer: a value per (position, query head), ``[positions, query_heads]``, of each of ``MEASURES``.

    output_error: norm of the difference to dense attention over the same queries, keys and values, divided by dense.
    log_denominator_error: log of the estimated over the true softmax denominator.
    captured_mass: share of the true softmax mass on tokens that were read.
    entropy: of the dense attention, nats.
    """

    values: dict[str, Tensor]

    def rows(self, layer: int) -> list[dict[str, float | int]]:
        """Means per head, and per quartile of entropy over all heads (``head`` -1)."""
        rows: list[dict[str, float | int]] = []
        for head in range(self.values["entropy"].shape[1]):
            means = {name: float(x[:, head].mean()) for name, x in self.values.items()}
            rows.append({"layer": layer, "head": head, "quartile": -1, **means})
        entropy = self.values["entropy"].flatten()
        quartile = torch.bucketize(entropy, entropy.quantile(torch.tensor([0.25, 0.5, 0.75])))
        for q in range(4):
            means = {name: float(x.flatten()[quartile == q].mean()) for name, x in self.values.items()}
            rows.append({"layer": layer, "head": -1, "quartile": q, **means})
        return rows


def diagnose(model: Llama, samples: Samples, settings: list[Setting]) -> list[Diagnosis]:
    """Every layer over the first batch of samples; each layer sees what the sparse layers below gave it."""
    found: list[Diagnosis] = []
    cache = samples.caches[0]

    def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        runs: list[Run] = []
        output = sparse_window(query, keys, values, settings[layer], cache.queries[layer], runs.append)
        parts = [_compare(run, keys, values, keys.shape[2] - query.shape[1]) for run in runs]
        found.append(Diagnosis({name: torch.cat([p[name] for p in parts]) for name in MEASURES}))
        return output

    predict(model, cache, samples.windows[0], attend)
    return found


def _compare(run: Run, keys: Tensor, values: Tensor, start: int) -> dict[str, Tensor]:
    """The measures of one run, each ``[rows * batch, query_heads]`` on the host."""
    rows = run.query.shape[0]
    end = start + run.last
    flat = run.query.permute(1, 2, 0, 3, 4).flatten(2, 3)
    scores = (flat @ keys[:, :, :end].float().mT).unflatten(
        2, (rows, -1)
    )  # [batch, heads, rows, group, tokens]
    future = (
        torch.arange(end, device=keys.device) > torch.arange(end - rows, end, device=keys.device)[:, None]
    )
    scores = scores.masked_fill(future[:, None], -torch.inf)
    weights = scores.softmax(dim=-1)
    dense = (weights.flatten(2, 3) @ values[:, :, :end].float()).unflatten(2, (rows, -1))
    total, read = scores.logsumexp(dim=-1), run.scores.permute(1, 2, 0, 3, 4).logsumexp(dim=-1)
    output, share = run.output.permute(1, 2, 0, 3, 4), run.share.permute(1, 2, 0, 3)
    measures = {
        "output_error": (output - dense).norm(dim=-1) / dense.norm(dim=-1),
        "log_denominator_error": read - (1 - share).log() - total,
        "captured_mass": (read - total).exp(),
        "entropy": torch.special.entr(weights).sum(dim=-1),
    }
    return {name: x.permute(2, 0, 1, 3).flatten(0, 1).flatten(1).cpu() for name, x in measures.items()}
