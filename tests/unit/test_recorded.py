"""Output error on a trained model's queries, keys and values: selection alone must lose to completion."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_rc_backend.completion import make_completion
from vllm_rc_backend.config import RCTopKConfig
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import (
    PagedKV,
    decode_dense,
    decode_sparse,
    score_pages,
    select_pages,
)
from vllm_rc_backend.selection import POLICIES, make_policy

FILE = Path(__file__).parent.parent / "fixtures" / "recorded_attention.safetensors"
PAGE = 16


@functools.cache
def errors(selection: str, completion: str, budget: int, weight: float | None = None) -> Tensor:
    """Relative error of the attention output, ``[queries, heads]`` of the recording."""
    recorded = load_file(FILE)
    keys, values = recorded["key"].float().unsqueeze(0), recorded["value"].float().unsqueeze(0)
    cache = torch.cat((recorded["key"], recorded["value"]), dim=-1).view(-1, 1, PAGE, 2 * keys.shape[-1])
    kv, table = PagedKV.packed(cache, PAGE), torch.arange(len(cache))
    policy, estimator = make_policy(selection, weight), make_completion(completion)
    geometry = Geometry(PAGE, PAGE, sink_tokens=16, tail_tokens=64, budget=budget, dense_threshold=0)

    found = []
    for recorded_query, seq_len in zip(recorded["query"], recorded["seq_len"].tolist(), strict=True):
        query = recorded_query.float().unsqueeze(0) * keys.shape[-1] ** -0.5
        mid = slice(PAGE * geometry.sink_pages, PAGE * geometry.mid_end(seq_len))
        mid_pages = keys[:, mid].unflatten(1, (-1, PAGE))
        statistics = mid_pages if policy.reads_keys else policy.statistics(mid_pages)
        scores = score_pages(query, statistics, policy, "max")
        pages = select_pages(scores, geometry.retrieved_pages(seq_len)) + geometry.sink_pages
        state = estimator.contribution(keys[:, mid], values[:, mid])
        output, _ = decode_sparse(query, kv, table, seq_len, geometry, pages, estimator, state)
        dense = decode_dense(query, keys[:, :seq_len], values[:, :seq_len])
        found.append(((output - dense).norm(dim=-1) / dense.norm(dim=-1))[0])
    return torch.stack(found)


def error(selection: str, completion: str, budget: int, weight: float | None = None) -> float:
    """Mean of ``errors``."""
    return float(errors(selection, completion, budget, weight).mean())


@pytest.mark.parametrize("budget", [128, 256, 512])
@pytest.mark.parametrize("selection", sorted(POLICIES))
def test_completion_lowers_the_error_of_every_policy(selection: str, budget: int) -> None:
    assert error(selection, "linear", budget) < 0.9 * error(selection, "none", budget)


@pytest.mark.parametrize("budget", [128, 256, 512])
@pytest.mark.parametrize("selection", sorted(POLICIES))
def test_completion_hurts_no_head(selection: str, budget: int) -> None:
    completed, alone = (errors(selection, name, budget) for name in ("linear", "none"))
    assert (completed.mean(dim=0) <= alone.mean(dim=0)).all()
    if selection == RCTopKConfig.selection:
        assert (completed <= alone).all(), "nor a single query"


def test_completion_is_worth_more_than_half_the_budget_again() -> None:
    assert error("box", "linear", 128) < error("box", "none", 192)
    assert error("box", "linear", 256) < error("box", "none", 384)


@pytest.mark.parametrize("completion", ["none", "linear"])
def test_the_error_falls_with_the_budget(completion: str) -> None:
    errors = [error("box", completion, budget) for budget in (128, 256, 512, 1024)]
    assert errors == sorted(errors, reverse=True)
    assert error("box", completion, 2048) < 1e-5, "everything is read"


def test_the_oracle_is_the_ceiling_and_half_the_spread_beats_all_of_it() -> None:
    for budget in (128, 256, 512):
        ceiling = error("oracle", "linear", budget)
        assert all(ceiling < error(name, "linear", budget) for name in POLICIES if name != "oracle")
        assert error("box", "linear", budget) < error("box", "linear", budget, weight=1.0)
