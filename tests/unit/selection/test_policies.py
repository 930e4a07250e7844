"""What each page score promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_rc_backend.selection import POLICIES, make_policy
from vllm_rc_backend.selection.box import Box
from vllm_rc_backend.selection.mean_var import MeanVar
from vllm_rc_backend.selection.moba import MoBA
from vllm_rc_backend.selection.oracle import Oracle
from vllm_rc_backend.selection.runs import Runs, rotate

seeds = st.integers(0, 10_000)


def keys_and_query(seed: int, spread: float = 1.0, head_size: int = 32) -> tuple[Tensor, Tensor]:
    """Keys ``[heads, pages, page_size, head_size]`` and a query ``[heads, group, head_size]``."""
    generator = torch.Generator().manual_seed(seed)
    return (
        spread * torch.randn(2, 6, 16, head_size, generator=generator),
        torch.randn(2, 3, head_size, generator=generator) / head_size**0.5,
    )


def token_scores(keys: Tensor, query: Tensor) -> Tensor:
    """``[heads, group, pages, page_size]``."""
    return torch.einsum("hgd,hpid->hgpi", query, keys)


@given(seeds, st.floats(0.01, 30))
def test_box_with_weight_one_is_quests_upper_bound(seed: int, spread: float) -> None:
    keys, query = keys_and_query(seed, spread)
    policy = Box(weight=1.0)
    bound = policy.score(query, policy.statistics(keys))
    best = token_scores(keys, query).amax(dim=-1)
    assert (bound >= best - 1e-4 * spread).all()
    quest = torch.maximum(
        query.unsqueeze(2) * keys.amin(dim=2).unsqueeze(1), query.unsqueeze(2) * keys.amax(dim=2).unsqueeze(1)
    ).sum(dim=-1)
    assert torch.allclose(bound, quest, rtol=1e-4, atol=1e-4 * spread)


@given(seeds)
def test_box_with_weight_zero_is_the_centre(seed: int) -> None:
    keys, query = keys_and_query(seed)
    policy = Box(weight=0.0)
    centre = (keys.amin(dim=2) + keys.amax(dim=2)) / 2
    assert torch.allclose(policy.score(query, policy.statistics(keys)), query @ centre.mT, atol=1e-5)


@given(seeds)
def test_moba_is_the_mean_score(seed: int) -> None:
    keys, query = keys_and_query(seed)
    score = MoBA().score(query, MoBA().statistics(keys))
    assert torch.allclose(score, token_scores(keys, query).mean(dim=-1), atol=1e-5)


@given(seeds)
def test_oracle_is_the_log_mass(seed: int) -> None:
    keys, query = keys_and_query(seed)
    exact = token_scores(keys, query).exp().mean(dim=-1).log()
    assert torch.allclose(Oracle().score(query, keys), exact, atol=1e-5)


def test_mean_var_is_the_log_mass_of_normal_keys() -> None:
    keys = torch.randn(1, 1, 200_000, 8) * torch.linspace(0.2, 1.0, 8) + torch.linspace(-1, 1, 8)
    query = torch.randn(1, 4, 8) * 0.5
    exact = Oracle().score(query, keys)
    assert torch.allclose(MeanVar().score(query, MeanVar().statistics(keys)), exact, atol=0.03)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"runs"}))
def test_the_order_of_tokens_in_a_page_does_not_matter(name: str) -> None:
    policy = make_policy(name)
    keys, query = keys_and_query(3)
    shuffled = keys[:, :, torch.randperm(16)]

    def score(page_keys: Tensor) -> Tensor:
        return policy.score(query, page_keys if policy.reads_keys else policy.statistics(page_keys))

    assert torch.allclose(score(keys), score(shuffled), atol=1e-5)


@pytest.mark.parametrize("name", sorted(n for n, p in POLICIES.items() if p.estimates_mass))
def test_what_estimates_mass_is_a_lower_bound_of_it(name: str) -> None:
    policy = make_policy(name)
    keys, query = keys_and_query(7)
    score = policy.score(query, keys if policy.reads_keys else policy.statistics(keys))
    exact = token_scores(keys, query).logsumexp(dim=-1) - math.log(16)
    assert (score <= exact + 1e-4).all()
    same = keys[:, :, :1].expand_as(keys)  # nothing is left out where all keys are the same
    score = policy.score(query, same if policy.reads_keys else policy.statistics(same))
    assert torch.allclose(score, token_scores(same, query).mean(dim=-1), atol=1e-4)


@given(seeds, st.sampled_from([32, 64, 80, 128]))
def test_runs_are_between_the_mean_and_the_oracle(seed: int, head_size: int) -> None:
    """Jensen twice: of the keys in a run, and of the runs in a page."""
    keys, query = keys_and_query(seed, head_size=head_size)
    statistics = Runs().statistics(keys)
    score = Runs().score(query, statistics)
    assert (score <= Oracle().score(query, keys) + 1e-4).all()
    assert (score >= token_scores(keys, query).mean(dim=-1) - 1e-4).all()


@pytest.mark.parametrize(("head_size", "vectors"), [(32, 16), (64, 16), (80, 8), (128, 8), (256, 8)])
def test_small_heads_keep_a_vector_for_every_key(head_size: int, vectors: int) -> None:
    """Of a page of 16; docs/accuracy.md, "The example model", is why."""
    keys, query = keys_and_query(1, head_size=head_size)
    statistics = Runs().statistics(keys)
    assert statistics.shape[-2] == vectors
    by_run = token_scores(keys.unflatten(2, (vectors, -1)).mean(dim=3), query)
    expected = by_run.logsumexp(dim=-1) - math.log(vectors)
    assert torch.allclose(Runs().score(query, statistics), expected, atol=1e-4)


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_the_rotation_keeps_dot_products_and_spreads_a_spike(size: int) -> None:
    x, y = torch.randn(2, 5, size)
    assert torch.allclose((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), atol=1e-4)
    spike = torch.zeros(size)
    spike[3] = 1
    assert rotate(spike).abs().max() <= 0.25 + 1e-6


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_shape_and_cost_are_as_declared(name: str) -> None:
    policy = make_policy(name)
    keys, query = keys_and_query(0)
    statistics = policy.statistics(keys)
    assert statistics.shape == (2, 6, policy.vectors(32), 32)
    assert policy.score(query, keys if policy.reads_keys else statistics).shape == (2, 3, 6)
    assert POLICIES[name].name == name


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_weight_only_where_there_is_one(name: str) -> None:
    if POLICIES[name].takes_weight:
        assert make_policy(name, 0.25).weight == 0.25  # type: ignore[attr-defined]
        assert make_policy(name).weight == 0.5  # type: ignore[attr-defined]
    else:
        with pytest.raises(ValueError, match=f"{name} takes no weight, got 0.25"):
            make_policy(name, 0.25)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"moba"}))
def test_a_needle_wins(name: str) -> None:
    """One key that points at the query among fifteen that do not is enough for its page to come first."""
    keys, query = keys_and_query(5, spread=0.3)
    keys[:, 4, 7] = 6 * query.mean(dim=1) / query.mean(dim=1).norm(dim=-1, keepdim=True)
    policy = make_policy(name)
    group_score = policy.score(query, keys if policy.reads_keys else policy.statistics(keys)).amax(dim=1)
    assert (group_score.argmax(dim=-1) == 4).all()
