"""Group rules and Top-K."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_rc_backend.kernels.reference import check_group_rule, reduce_group, score_pages, select_pages
from vllm_rc_backend.kernels.reference.select import SHARE_WEIGHT
from vllm_rc_backend.selection import POLICIES, make_policy


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_top_k_ascending_with_ties_to_the_earlier_page(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda page: (-scores[page], page))[:count])
    assert select_pages(torch.tensor([scores], dtype=torch.float32), count).tolist() == [expected]


def test_each_head_has_its_own_list() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert select_pages(scores, 2).tolist() == [[1, 2], [0, 1]]


def test_group_rules() -> None:
    scores = torch.tensor([[[5.0, 0.0, 2.0], [-100.0, 0.0, 2.0]]])
    assert reduce_group(scores, "max").tolist() == [[5.0, 0.0, 2.0]]
    assert reduce_group(scores, "mean").tolist() == [[-47.5, 0.0, 2.0]]
    assert torch.allclose(reduce_group(scores, "sum"), scores.exp().sum(dim=1).log())
    shares = scores.softmax(dim=-1)
    assert torch.allclose(reduce_group(scores, "softmax"), shares[:, 0] + shares[:, 1])
    with pytest.raises(ValueError, match="'min' is not max, mean, sum, softmax or share"):
        reduce_group(scores, "min")


@given(st.permutations(range(4)))
def test_group_rules_do_not_depend_on_the_order_of_heads(order: list[int]) -> None:
    scores = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
    for rule in ("max", "mean", "sum", "softmax", "share"):
        assert torch.allclose(reduce_group(scores[:, order], rule), reduce_group(scores, rule))


def test_share_takes_part_of_the_mass_of_its_pages_off_a_head() -> None:
    scores = torch.tensor([[0.0, math.log(3.0)], [5.0, 4.0]])
    low, high = math.log(4.0), math.log(math.exp(5.0) + math.exp(4.0))
    expected = [max(0.0 - 0.7 * low, 5.0 - 0.7 * high), max(math.log(3.0) - 0.7 * low, 4.0 - 0.7 * high)]
    assert reduce_group(scores, "share").tolist() == pytest.approx(expected)
    assert SHARE_WEIGHT == 0.7


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_share_between_its_ends(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_rc_backend.kernels.reference.select.SHARE_WEIGHT", weight)
    scores = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2))
    best = reduce_group(scores, "share")
    if weight == 0:
        assert torch.equal(best, reduce_group(scores, "max"))
    if weight == 1:  # the largest share of a head's softmax, whatever lifts all scores of a head
        assert torch.allclose(best.exp(), scores.softmax(dim=-1).amax(dim=-2))
        lifted = scores + torch.tensor([0.0, 30.0, -7.0, 1.0]).view(4, 1)
        assert torch.allclose(reduce_group(lifted, "share"), best, atol=1e-4)
    # Lifted all alike, by what weight it may be, heads agree on the same pages.
    assert torch.equal(select_pages(reduce_group(scores + 3, "share"), 4), select_pages(best, 4))


def test_share_hears_a_quiet_head() -> None:
    """A head whose scores all lie high decides alone under ``max``; not here."""
    scores = torch.tensor([[10.0, 10.1, 10.2, 10.3], [9.0, 0.0, 0.0, 0.0]])
    assert select_pages(reduce_group(scores, "max"), 1).tolist() == [3]
    assert select_pages(reduce_group(scores, "share"), 1).tolist() == [0]


@pytest.mark.parametrize("selection", sorted(POLICIES))
def test_share_needs_scores_that_are_masses(selection: str) -> None:
    policy = make_policy(selection)
    for rule in ("max", "mean", "sum", "softmax"):
        check_group_rule(rule, policy)
    if policy.estimates_mass:
        check_group_rule("share", policy)
    else:
        with pytest.raises(ValueError, match=f"group_rule=share .* selection={selection} do not"):
            score_pages(torch.zeros(1, 2, 64), torch.zeros(1, 3, 2, 64), policy, "share")
