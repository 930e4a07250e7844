"""First-order completion: sums, Jensen's bound, and no token counted twice."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_rc_backend.completion import Retrieved
from vllm_rc_backend.completion.linear import Linear

HEADS, GROUP, SIZE = 2, 3, 8
LINEAR = Linear()


def tokens(seed: int, count: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values ``[heads, count, size]`` and a scaled query ``[heads, group, size]``."""
    g = torch.Generator().manual_seed(seed)
    return (
        spread * torch.randn(HEADS, count, SIZE, generator=g),
        torch.randn(HEADS, count, SIZE, generator=g),
        torch.randn(HEADS, GROUP, SIZE, generator=g) / SIZE**0.5,
    )


def retrieve(keys: Tensor, values: Tensor, query: Tensor, index: Tensor) -> Retrieved:
    """The tokens at ``index`` as decode passes them."""
    return Retrieved(query @ keys[:, index].mT, keys[:, index], values[:, index])


@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.randoms())
def test_pages_may_be_added_in_any_order_and_any_chunks(seed: int, chunks: list[int], random: object) -> None:
    keys, values, _ = tokens(seed, sum(chunks))
    pieces = list(zip(keys.split(chunks, dim=1), values.split(chunks, dim=1), strict=True))
    random.shuffle(pieces)  # type: ignore[attr-defined]
    total = sum(LINEAR.contribution(*piece) for piece in pieces)
    assert torch.allclose(total, LINEAR.contribution(keys, values), atol=1e-4)


@given(st.integers(0, 1000), st.integers(2, 40), st.data())
def test_subtracting_what_was_retrieved_gives_the_residual(
    seed: int, count: int, data: st.DataObject
) -> None:
    keys, values, query = tokens(seed, count)
    taken = data.draw(st.integers(0, count - 1))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    retrieved, left = order[:taken], order[taken:]
    estimate = LINEAR.residual(
        query, LINEAR.contribution(keys, values), count, retrieve(keys, values, query, retrieved)
    )

    scores = query @ keys[:, left].mT
    assert torch.allclose(estimate.log_mass, math.log(len(left)) + scores.mean(dim=-1), atol=1e-3)
    all_scores = query @ keys.mT
    covariance = (all_scores - all_scores.mean(dim=-1, keepdim=True)) @ values / count
    expected = values[:, left].mean(dim=1).unsqueeze(1) + covariance
    assert torch.allclose(estimate.value, expected, atol=1e-3)


@given(st.integers(0, 1000), st.floats(0.0, 20.0))
def test_the_mass_is_a_lower_bound(seed: int, spread: float) -> None:
    keys, values, query = tokens(seed, 40, spread)
    retrieved = torch.arange(8)
    estimate = LINEAR.residual(
        query, LINEAR.contribution(keys, values), 40, retrieve(keys, values, query, retrieved)
    )
    exact = (query @ keys[:, 8:].mT).logsumexp(dim=-1)
    assert (estimate.log_mass <= exact + 1e-3 * max(1.0, spread)).all()
    assert estimate.log_mass.isfinite().all()
    assert estimate.value.isfinite().all()


def test_exact_where_scores_are_equal() -> None:
    keys, values, query = tokens(0, 30)
    keys = keys[:, :1].expand(-1, 30, -1)
    estimate = LINEAR.residual(
        query, LINEAR.contribution(keys, values), 30, retrieve(keys, values, query, torch.arange(10))
    )
    assert torch.allclose(estimate.log_mass, (query @ keys[:, 10:].mT).logsumexp(dim=-1), atol=1e-4)
    assert torch.allclose(estimate.value, values[:, 10:].mean(dim=1).unsqueeze(1).expand_as(query), atol=1e-4)


def test_the_tilt_is_first_order_exact() -> None:
    """For small scores the error of the value shrinks with their square; the mean value's with their size."""
    keys, values, query = tokens(1, 64)
    nothing = torch.arange(0)
    state = LINEAR.contribution(keys, values)

    def errors(size: float) -> tuple[float, float]:
        q = size * query
        exact = (q @ keys.mT).softmax(dim=-1) @ values
        tilted = LINEAR.residual(q, state, 64, retrieve(keys, values, q, nothing)).value
        mean = values.mean(dim=1).unsqueeze(1)
        return float((tilted - exact).norm()), float((mean - exact).norm())

    (tilted, mean), (tilted_10, mean_10) = errors(0.1), errors(0.01)
    assert tilted_10 < tilted / 50
    assert mean_10 > mean / 20


def test_nothing_left() -> None:
    keys, values, query = tokens(2, 12)
    estimate = LINEAR.residual(
        query, LINEAR.contribution(keys, values), 12, retrieve(keys, values, query, torch.arange(12))
    )
    assert (estimate.log_mass == -torch.inf).all()
    assert (estimate.value == 0).all()


def test_cost_is_as_declared() -> None:
    keys, values, _ = tokens(0, 5)
    assert LINEAR.contribution(keys, values).shape == (HEADS, LINEAR.state_rows(SIZE), SIZE)
    assert LINEAR.state_rows(128) == 130
    # C once at 16 bits, K1 and V1 twice: 132 rows, half a token each.
    assert LINEAR.tokens_read(128) == 66
