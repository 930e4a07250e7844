"""The memory's scan against its equation, one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_rc_backend.decaying_memory import linear_scan as scan_operator
from vllm_rc_backend.decaying_memory import remember
from vllm_rc_backend.kernels.reference import linear_scan, memory_step

GROUPS, CHANNELS = 2, 6


def inputs(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, gates from 0 to 1 inclusive, starts, and the states before."""
    tokens = sum(lengths)
    gate = torch.rand(tokens, CHANNELS).mul(1.4).sub(0.2).clamp(0, 1)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    x, state = torch.randn(tokens, GROUPS, CHANNELS), torch.randn(len(lengths), GROUPS, CHANNELS)
    return x, gate, starts, state


def one_by_one(
    x: torch.Tensor, gate: torch.Tensor, starts: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """The equation in float64."""
    rows = []
    for sequence, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        y = state[sequence].double()
        for t in range(first, last):
            y = gate[t].double() * y + (1 - gate[t].double()) * x[t].double()
            rows.append(y)
    return torch.stack(rows).float()


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_scan_is_the_equation(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    arguments = inputs(lengths)
    torch.testing.assert_close(remember(*arguments), one_by_one(*arguments), atol=2e-6, rtol=1e-5)


@given(length=st.integers(2, 200), cut=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_sequence_may_be_cut_anywhere(length: int, cut: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, gate, starts, state = inputs([length])
    whole = remember(x, gate, starts, state)
    at = 1 + int(cut * (length - 2))
    head = remember(x[:at], gate[:at], torch.tensor([0, at]), state)
    tail = remember(x[at:], gate[at:], torch.tensor([0, length - at]), head[-1:])
    torch.testing.assert_close(torch.cat((head, tail)), whole, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        memory_step(x[at:][:1], gate[at:][:1], whole[at - 1 :][:1]), whole[at:][:1], atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_sequences_do_not_reach_each_other(poison: float) -> None:
    x, gate, starts, state = inputs([30, 17, 25])
    expected = remember(x, gate, starts, state)
    x[starts[1] : starts[2]] = poison
    got = remember(x, gate, starts, state)
    assert not got[starts[1] : starts[2]].isfinite().all()
    assert torch.equal(got[: starts[1]], expected[: starts[1]])
    assert torch.equal(got[starts[2] :], expected[starts[2] :])


def test_gates_at_their_ends() -> None:
    x, _, starts, state = inputs([9, 4])
    assert torch.equal(remember(x, torch.zeros(13, CHANNELS), starts, state), x)
    kept = remember(x, torch.ones(13, CHANNELS), starts, state)
    assert torch.equal(kept, state.repeat_interleave(starts.diff(), dim=0))


@pytest.mark.parametrize("gate", [0.5, 0.9, 0.99, 0.999])
def test_ten_thousand_steps(gate: float) -> None:
    """A float32 state stays at rounding level; one read back from a bfloat16 key cache does not where gates are slow.

    The second is what docs/decisions.md weighs against a state of its own: undo RoPE on the last key, take the step,
    round, apply RoPE, round.
    """
    tokens, size = 10_000, 64
    x = (torch.randn(tokens, 1, size) + torch.randn(size)).bfloat16().float()
    g = torch.full((1, size), gate)
    state = cached = torch.zeros(1, 1, size)
    exact = state.double()
    frequencies = 5e5 ** (-torch.arange(0, size, 2) / size)
    for t in range(tokens):
        exact = memory_step(x[t].double(), g.double(), exact)
        state = memory_step(x[t], g, state)
        before = rotate(cached, -(t - 1) * frequencies)
        cached = rotate(memory_step(x[t], g, before).bfloat16().float(), t * frequencies).bfloat16().float()
    recovered = rotate(cached, -(tokens - 1) * frequencies)

    def error(found: torch.Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    assert error(state) < 2e-5
    once = error(exact.bfloat16())
    assert error(recovered) < 5 * once if gate <= 0.9 else error(recovered) > 8 * once
    scanned = remember(x, g.expand(tokens, -1), torch.tensor([0, tokens]), torch.zeros(1, 1, size))
    assert error(scanned[-1]) < 2e-5


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE of one key."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def test_operator_has_the_gradient_of_the_definition() -> None:
    x, gate, starts, state = (t.double() if t.is_floating_point() else t for t in inputs([5, 1, 9]))
    arguments = [t.requires_grad_() for t in (gate.clamp(0.1, 0.9), x, state)]
    weights = torch.randn(x.shape, dtype=torch.float64)

    def gradients(scan: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        decay, total, before = arguments
        return torch.autograd.grad((scan(decay, total, starts, before) * weights).sum(), arguments)

    for got, expected in zip(gradients(scan_operator), gradients(linear_scan), strict=True):
        torch.testing.assert_close(got, expected)
    torch.library.opcheck(
        scan_operator, (*(t.float().detach() for t in arguments[:2]), starts, state.float())
    )
