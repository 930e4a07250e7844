"""One row of sparse decode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.paging import GROUP, HEADS, Cache, as_table, geometry, random_query, random_tokens
from vllm_rc_backend.completion import COMPLETIONS, Residual, make_completion
from vllm_rc_backend.kernels.reference import complete_softmax, damp, decode_dense, decode_sparse


class Row:
    """A sequence in a poisoned cache, and a query."""

    def __init__(self, seq_len: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.geometry = geometry()
        self.seq_len = seq_len
        self.keys, self.values = random_tokens(seq_len)
        self.query = random_query()
        table: list[int] = []
        self.cache = Cache.empty(seq_len // 8 + 3, self.geometry)
        self.cache.write(table, 0, self.keys, self.values)
        self.table = as_table(table)
        self.mid = slice(self.geometry.sink_tokens, self.geometry.mid_end(seq_len) * 4)

    def state(self, name: str) -> Tensor:
        return make_completion(name).contribution(self.keys[:, self.mid], self.values[:, self.mid])

    def decode(self, pages: Tensor, name: str, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return decode_sparse(
            self.query,
            self.cache.kv,
            self.table,
            self.seq_len,
            self.geometry,
            pages,
            make_completion(name),
            state,
        )

    def all_pages(self) -> Tensor:
        return torch.arange(1, self.geometry.mid_end(self.seq_len)).expand(HEADS, -1)

    def dense(self) -> Tensor:
        return decode_dense(self.query, self.keys, self.values)


@pytest.mark.parametrize("name", sorted(COMPLETIONS))
@given(seq_len=st.integers(10, 90), seed=st.integers(0, 100))
def test_everything_retrieved_is_dense(name: str, seq_len: int, seed: int) -> None:
    row = Row(seq_len, seed)
    output, residual = row.decode(row.all_pages(), name, row.state(name))
    assert torch.allclose(output, row.dense(), atol=1e-5)
    assert (residual == 0).all()


@pytest.mark.parametrize("name", sorted(COMPLETIONS))
@given(seq_len=st.integers(30, 90), seed=st.integers(0, 100))
def test_finite_and_shares_are_shares(name: str, seq_len: int, seed: int) -> None:
    row = Row(seq_len, seed)
    pages = row.all_pages()[:, :2]
    output, residual = row.decode(pages, name, row.state(name))
    assert output.isfinite().all(), "NaN of the unused part of the cache leaked"
    assert (residual >= 0).all()
    assert (residual < 1).all()
    assert (residual > 0).any() == (name != "none")


def test_each_head_attends_to_its_own_pages() -> None:
    row = Row(60)
    pages = torch.tensor([[1, 5], [3, 9]])
    output, _ = row.decode(pages, "none", None)
    tail = row.geometry.mid_end(60) * 4
    for head in range(HEADS):
        read = [*range(4), *range(tail, 60)]
        read += [t for page in pages[head].tolist() for t in range(4 * page, 4 * page + 4)]
        expected = decode_dense(row.query[head], row.keys[head, read], row.values[head, read])
        assert torch.allclose(output[head], expected, atol=1e-5)


def test_the_order_of_retrieved_pages_does_not_matter() -> None:
    row = Row(60)
    state = row.state("linear")
    output, residual = row.decode(torch.tensor([[1, 5, 9]] * 2), "linear", state)
    other, other_residual = row.decode(torch.tensor([[9, 1, 5]] * 2), "linear", state)
    assert torch.allclose(output, other, atol=1e-6)
    assert torch.allclose(residual, other_residual, atol=1e-6)


def test_an_unknown_state_is_selection_only() -> None:
    row = Row(60)
    pages = torch.tensor([[1, 5]] * 2)
    assert torch.equal(row.decode(pages, "linear", None)[0], row.decode(pages, "none", None)[0])


def test_completion_beats_selection_where_attention_is_diffuse() -> None:
    """A flat softmax over many tokens: what was not read carries most of the mass."""
    without = with_completion = 0.0
    for seed in range(10):
        row = Row(400, seed)
        row.query = row.query / 4
        pages = row.all_pages()[:, :3]
        dense = row.dense()
        without += float((row.decode(pages, "none", None)[0] - dense).norm())
        with_completion += float((row.decode(pages, "linear", row.state("linear"))[0] - dense).norm())
    assert with_completion < 0.2 * without


@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_softmax_survives_large_scores(shift: float) -> None:
    scores = torch.randn(HEADS, GROUP, 7) + shift
    values = torch.randn(HEADS, 7, 8)
    missing = Residual(torch.full((HEADS, GROUP), -torch.inf), torch.zeros(HEADS, GROUP, 8))
    output, share = complete_softmax(scores, values, missing)
    assert torch.allclose(output, scores.softmax(dim=-1) @ values, atol=1e-5)
    assert (share == 0).all()


@pytest.mark.parametrize(("log_mass", "expected"), [(400.0, 1.0), (-400.0, 0.0)])
def test_a_residual_far_above_or_below_the_scores(log_mass: float, expected: float) -> None:
    scores, values = torch.randn(HEADS, GROUP, 7), torch.randn(HEADS, 7, 8)
    residual = Residual(torch.full((HEADS, GROUP), log_mass), torch.full((HEADS, GROUP, 8), 5.0))
    output, share = complete_softmax(scores, values, residual)
    assert torch.allclose(share, torch.tensor(expected))
    alone = residual.value if expected else scores.softmax(dim=-1) @ values
    assert torch.allclose(output, alone, atol=1e-5)


def test_a_residual_made_of_the_missing_tokens_gives_dense() -> None:
    """With the true log-mass and the true mean value, the join is exact."""
    query, (keys, values) = random_query(), random_tokens(50)
    scores = query @ keys.mT
    exact = Residual(scores[..., 20:].logsumexp(dim=-1), scores[..., 20:].softmax(dim=-1) @ values[:, 20:])
    output, share = complete_softmax(scores[..., :20], values[:, :20], exact)
    assert torch.allclose(output, decode_dense(query, keys, values), atol=1e-5)
    assert torch.allclose(share, scores.softmax(dim=-1)[..., 20:].sum(dim=-1), atol=1e-5)


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0.05, 0.9))
def test_a_damped_share(log_mass: float, read_log_mass: float, damping: float) -> None:
    residual = Residual(torch.tensor([log_mass]), torch.ones(1, 8), torch.tensor([damping]))
    read = torch.tensor([read_log_mass])
    share = (residual.log_mass - read).sigmoid()
    damped = damp(residual, read)
    assert torch.allclose((damped.log_mass - read).sigmoid(), share * (1 - damping * share), rtol=1e-4)
    assert torch.equal(damped.value, residual.value)
    believed = residual._replace(damping=None)
    assert damp(believed, read) is believed


@pytest.mark.parametrize("damping", [0.0, 1e-9, 0.6])
@pytest.mark.parametrize("ahead", [17.0, 60.0, 200.0])
def test_what_was_read_has_hardly_any_mass(ahead: float, damping: float) -> None:
    """Of a query head whose pages others of its group have outvoted."""
    residual = Residual(torch.tensor([ahead]), torch.ones(1, 8), torch.tensor([damping]))
    scores, values = torch.zeros(1, 1), torch.full((1, 8), 5.0)
    out, share = complete_softmax(scores, values, damp(residual, scores.logsumexp(dim=-1)))
    torch.testing.assert_close(out, torch.full((1, 8), 1 + damping * (5 - 1)), atol=1e-5, rtol=1e-5)
    assert bool(share.isfinite().all())


def test_nothing_left_stays_nothing_when_damped() -> None:
    nothing = Residual(torch.full((2, 3), -torch.inf), torch.zeros(2, 3, 8), torch.full((2, 3), 0.2))
    assert (damp(nothing, torch.zeros(2, 3)).log_mass == -torch.inf).all()
