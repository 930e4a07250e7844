"""The completion that takes its mass from page scores: what it adds to the first-order estimate."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_rc_backend.completion import Retrieved
from vllm_rc_backend.completion.linear import Linear
from vllm_rc_backend.completion.paged import Paged

HEADS, GROUP, SIZE, COUNT = 2, 3, 8, 40


def retrieved(keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, count: int) -> Retrieved:
    unread = torch.randn(HEADS, GROUP)
    return Retrieved(query @ keys[:, :count].mT, keys[:, :count], values[:, :count], unread)


@given(st.floats(0.0, 30.0), st.floats(0.0, 30.0))
def test_the_longer_the_tilt_the_more_is_damped(spread: float, mean: float) -> None:
    keys, values = torch.randn(2, HEADS, COUNT, SIZE)
    values = values + mean
    query = spread * torch.randn(HEADS, GROUP, SIZE)
    state, read = Paged().contribution(keys, values), retrieved(keys, values, query, 16)
    estimate, linear = (c.residual(query, state, COUNT, read) for c in (Paged(), Linear()))
    assert torch.equal(estimate.value, linear.value)
    assert torch.equal(estimate.log_mass, read.unread_log_mass)
    assert linear.damping is None

    scores, centre = query @ keys.mT, values.mean(dim=1, keepdim=True)
    tilt = (scores - scores.mean(dim=-1, keepdim=True)) @ (values - centre) / COUNT
    squares = tilt.square().sum(dim=-1)
    expected = 0.6 * squares / (squares + centre.square().sum(dim=-1))
    assert torch.allclose(estimate.damping, expected, atol=1e-3)


def test_values_of_zero_are_not_damped() -> None:
    keys, values, query = (
        torch.randn(HEADS, COUNT, SIZE),
        torch.zeros(HEADS, COUNT, SIZE),
        torch.randn(HEADS, GROUP, SIZE),
    )
    estimate = Paged().residual(
        query, Paged().contribution(keys, values), COUNT, retrieved(keys, values, query, 16)
    )
    assert (estimate.damping == 0).all()


def test_everything_retrieved_leaves_nothing() -> None:
    keys, values, query = *torch.randn(2, HEADS, COUNT, SIZE), torch.randn(HEADS, GROUP, SIZE)
    read = retrieved(keys, values, query, COUNT)._replace(
        unread_log_mass=torch.full((HEADS, GROUP), -torch.inf)
    )
    assert (
        Paged().residual(query, Paged().contribution(keys, values), COUNT, read).log_mass == -torch.inf
    ).all()
