"""Group rules and Top-K."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_rc_backend.kernels.reference import reduce_group, select_pages


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
    with pytest.raises(ValueError, match="'min' is not max, mean, sum or softmax"):
        reduce_group(scores, "min")


@given(st.permutations(range(4)))
def test_group_rules_do_not_depend_on_the_order_of_heads(order: list[int]) -> None:
    scores = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
    for rule in ("max", "mean", "sum", "softmax"):
        assert torch.allclose(reduce_group(scores[:, order], rule), reduce_group(scores, rule))
