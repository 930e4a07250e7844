"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: the k largest of n keys against a sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_rc_backend.kernels.triton import topk
from vllm_rc_backend.kernels.triton.topk import LOWEST, bounds, ordered_key, running_counts, threshold

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149
MOST_ROUNDS = 8 + 17  # as topk.py says


@triton.jit
def top_kernel(scores, taken, n, k, BLOCK: tl.constexpr):
    """``taken`` int8 ``[n]`` out: 1 where a score is one of the k largest."""
    i = tl.arange(0, BLOCK)
    x = tl.where(i < n, ordered_key(tl.load(scores + i, mask=i < n, other=0.0)), LOWEST)
    low, high = bounds(x)
    t, ties = threshold(x, k, low, high, n)
    _, equal = running_counts(x, t)
    take = (x > t) | ((x == t) & (equal <= ties))
    tl.store(taken + i, take.to(tl.int8), mask=i < n)


def top(scores: torch.Tensor, k: int) -> tuple[list[int], int]:
    """What the kernel takes, ascending, and how many rounds it searched."""
    rounds = 0
    counts = topk._counts

    def counted(*args: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return counts(*args)

    taken = torch.full((len(scores),), -1, dtype=torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_counts", counted)
        top_kernel[(1,)](scores, taken, len(scores), k, BLOCK=triton.next_power_of_2(max(len(scores), 16)))
    assert set(taken.tolist()) <= {0, 1}
    return taken.nonzero().flatten().tolist(), rounds


def expected(scores: torch.Tensor, k: int) -> list[int]:
    """The same by a stable sort: ties go to the earlier."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:k].tolist())


INFINITY = float("inf")
EDGES = [
    0.0,
    -0.0,
    SMALLEST,
    -SMALLEST,
    1.0,
    1.0 + 2**-23,
    60000.0,
    -60000.0,
    LARGEST,
    -LARGEST,
    INFINITY,
    -INFINITY,
]
scores = st.one_of(
    st.lists(st.sampled_from(EDGES), min_size=1, max_size=40),
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
)


@settings(deadline=None)
@given(scores, st.floats(0, 1))
@example([-0.0, 0.0], 0.0)
@example([-INFINITY, INFINITY, 3.0, 1.0, 2.0], 0.5)
def test_the_largest_are_taken(values: list[float], share: float) -> None:
    k = 1 + int(share * (len(values) - 1))
    tensor = torch.tensor(values, dtype=torch.float32)
    taken, rounds = top(tensor, k)
    assert taken == expected(tensor, k)
    assert rounds <= MOST_ROUNDS


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 39), st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(1, 0.0)
@example(7, -LARGEST)
def test_equal_scores_take_no_search(k: int, value: float) -> None:
    assert top(torch.full((40,), value), k) == (list(range(k)), 0)


@pytest.mark.parametrize("k", [1, 2, 13, 128, 250, 255, 256])
def test_all_magnitudes_at_once(k: int) -> None:
    """Evenly spaced probes would take a round for every other power of two."""
    exponents = torch.arange(-126, 128, 2, dtype=torch.float64)
    tensor = torch.cat((2**exponents, -(2**exponents), torch.tensor([0.0, SMALLEST]))).float()
    tensor = tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(k))]
    taken, rounds = top(tensor, k)
    assert taken == expected(tensor, k)
    assert rounds <= MOST_ROUNDS


@pytest.mark.parametrize(("spread", "offset"), [(1.0, 0.0), (3.0, 2.0), (10.0, -20.0)])
def test_rounds_of_usual_scores(spread: float, offset: float) -> None:
    """Simulated with 40 rows of 1024 Gaussian scores: 4.6 rounds on average. Probes evenly spaced as integers: 6.9."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(12, 1024, generator=generator) * spread + offset
    found = [top(row, 126) for row in rows]
    assert [taken for taken, _ in found] == [expected(row, 126) for row in rows]
    assert sum(rounds for _, rounds in found) / len(rows) < 5.5
