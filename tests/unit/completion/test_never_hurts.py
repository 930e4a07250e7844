"""A completion is no worse than selection alone wherever it knows the rest better than what was read does.

With o_R the output of what was read, v* and w* the residual's true mean value and share of the mass, and v_U and w the
estimates, selection alone errs by w* |v* - o_R| and the completion by

    |w (v_U - v*) - (w* - w) (v* - o_R)|  <=  w |v_U - v*| + (w* - w) |v* - o_R|      for w <= w*,

which Jensen's bound of the mass grants. So it is worse only if v_U is farther from v* than o_R is, and then by no more
than w times that distance.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_rc_backend.completion import Retrieved
from vllm_rc_backend.completion.linear import Linear
from vllm_rc_backend.completion.paged import Paged
from vllm_rc_backend.kernels.reference import complete_softmax, damp, unread_log_mass
from vllm_rc_backend.selection.moba import MoBA

HEADS, GROUP, SIZE, PAGE, PAGES, READ = 2, 3, 8, 4, 12, 3


@pytest.mark.parametrize("completion", [Linear(), Paged()], ids=lambda c: c.name)
@given(st.integers(0, 100_000), st.floats(0.0, 12.0), st.floats(0.0, 3.0))
def test_worse_only_where_the_value_is_unknown_and_by_no_more(
    completion: Linear, seed: int, spread: float, likeness: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pages = spread * torch.randn(HEADS, PAGES, PAGE, SIZE, generator=generator)
    keys, query = pages.flatten(1, 2), torch.randn(HEADS, GROUP, SIZE, generator=generator) / SIZE**0.5
    values = torch.randn(HEADS, PAGES * PAGE, SIZE, generator=generator) + likeness * keys
    read = torch.arange(READ * PAGE)
    scores = query @ keys.mT
    unread = scores[..., READ * PAGE :]

    mean_scores = MoBA().score(query, MoBA().statistics(pages))
    selected = torch.arange(READ).expand(HEADS, -1)
    retrieved = Retrieved(
        scores[..., read], keys[:, read], values[:, read], unread_log_mass(mean_scores, selected, PAGE)
    )
    estimate = completion.residual(query, completion.contribution(keys, values), PAGES * PAGE, retrieved)
    true_mass = unread.logsumexp(dim=-1)
    assert (estimate.log_mass <= true_mass + 1e-3 * (1 + spread)).all()

    dense = scores.softmax(dim=-1) @ values
    true_value = unread.softmax(dim=-1) @ values[:, READ * PAGE :]
    alone = retrieved.scores.softmax(dim=-1) @ retrieved.values
    estimate = damp(estimate, retrieved.scores.logsumexp(dim=-1))
    output, share = complete_softmax(retrieved.scores, retrieved.values, estimate)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x.norm(dim=-1)

    harm = norm(output - dense) - norm(alone - dense)
    ignorance = norm(estimate.value - true_value) - norm(alone - true_value)
    scale = 1 + norm(values).amax() + norm(estimate.value).amax()
    assert (harm <= share * ignorance.clamp(min=0) + 1e-4 * scale).all()


@given(st.integers(0, 100_000), st.floats(0.0, 12.0))
def test_the_mass_by_pages_is_between_linears_and_the_truth(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    pages = spread * torch.randn(HEADS, PAGES, PAGE, SIZE, generator=generator)
    query = torch.randn(HEADS, GROUP, SIZE, generator=generator) / SIZE**0.5
    unread = query @ pages[:, READ:].flatten(1, 2).mT
    selected = torch.arange(READ).expand(HEADS, -1)
    by_pages = unread_log_mass(MoBA().score(query, MoBA().statistics(pages)), selected, PAGE)
    slack = 1e-3 * (1 + spread)
    linear = torch.tensor(float(unread.shape[-1])).log() + unread.mean(dim=-1)
    assert (linear <= by_pages + slack).all()
    assert (by_pages <= unread.logsumexp(dim=-1) + slack).all()
