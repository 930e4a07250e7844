"""Every policy with every completion, through the whole of a decode step over a paged cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.unit.paging import GROUP, HEAD_SIZE, HEADS, Cache, as_table, geometry, random_tokens
from vllm_rc_backend.attention import Batch, ReferenceAttention
from vllm_rc_backend.completion import COMPLETIONS, make_completion
from vllm_rc_backend.config import GROUP_RULES
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import SummaryTags, decode_dense, plan_summaries
from vllm_rc_backend.selection import POLICIES, make_policy
from vllm_rc_backend.side_store import SideStore, StoreLayout

SCALE = HEAD_SIZE**-0.5
BLOCKS = 40


class Decoding:
    """One sequence: a prompt in two chunks, then a token at a time."""

    def __init__(self, selection: str, completion: str, bits: int, rule: str, shape: Geometry) -> None:
        self.geometry = shape
        self.keys, self.values = random_tokens(120)
        # Neighbouring tokens resemble each other, as in text: without that no page is better than another.
        self.keys += 3 * torch.randn(HEADS, 30, HEAD_SIZE).repeat_interleave(4, dim=1)
        self.cache, self.table, self.seq_len = Cache.empty(BLOCKS, shape), [], 0
        layout = StoreLayout(
            heads=HEADS,
            head_size=HEAD_SIZE,
            kv_bytes=4,
            slots=2 if completion != "none" else 0,
            statistics_bits=bits,
            geometry=shape,
            policy=make_policy(selection),
            completion=make_completion(completion),
        )
        self.store = SideStore(layout, BLOCKS * shape.pages_per_block, "cpu")
        for tensor in (self.store.codes, self.store.scales, self.store.states):
            if tensor is not None and tensor.is_floating_point():
                tensor.fill_(torch.nan)
        self.tags = SummaryTags.empty(layout.slots, self.store.pages) if layout.slots else None
        self.attention = ReferenceAttention(self.store, SCALE, rule)

    def step(self, count: int) -> Batch:
        span = slice(self.seq_len, self.seq_len + count)
        self.cache.write(self.table, self.seq_len, self.keys[:, span], self.values[:, span])
        self.seq_len += count
        table, lens = as_table(self.table).unsqueeze(0), ([self.seq_len], [count])
        plan = None
        if self.tags is not None:
            plan = plan_summaries(self.tags, self.geometry, table, *lens)
        batch = Batch(table, *lens, plan)
        self.attention.update(self.cache.kv, batch)
        return batch

    def decode(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(output, dense output, share of the residual) of every step that decodes sparsely."""
        self.step(37)
        self.step(24)
        while self.seq_len < self.keys.shape[1]:
            batch = self.step(1)
            if not self.geometry.is_sparse(self.seq_len):
                continue
            query = torch.randn(HEADS * GROUP, HEAD_SIZE)
            output, share = self.attention.decode(query, self.cache.kv, batch, 0)
            grouped = query.unflatten(0, (HEADS, GROUP)) * SCALE
            dense = decode_dense(grouped, self.keys[:, : self.seq_len], self.values[:, : self.seq_len])
            yield output, dense.flatten(0, 1), share


MATRIX = [
    (selection, completion)
    for selection, completion in itertools.product(sorted(POLICIES), sorted(COMPLETIONS))
    if POLICIES[selection].estimates_mass or not COMPLETIONS[completion].needs_mass
]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("selection", "completion", "rule"),
    [
        (selection, completion, rule)
        for (selection, completion), rule in itertools.product(MATRIX, GROUP_RULES)
        if POLICIES[selection].estimates_mass or rule != "share"
    ],
)
def test_sparse_decode_is_finite_and_near_dense(
    selection: str, completion: str, rule: str, bits: int
) -> None:
    steps = list(Decoding(selection, completion, bits, rule, geometry(budget=40)).decode())
    assert len(steps) == 59
    errors = []
    for output, dense, share in steps:
        assert output.isfinite().all(), "something that no token was written to was read"
        assert 0 <= share < 1
        assert (share > 0) == (completion != "none")
        errors.append((output - dense).norm() / dense.norm())
    # Pages chosen at random give 0.82 with the linear completion and 0.93 without.
    assert torch.stack(errors).mean() < 0.55


@pytest.mark.parametrize(("selection", "completion"), MATRIX)
def test_one_page_left_out(selection: str, completion: str) -> None:
    """At the largest budget that is still sparse, only the least relevant page is estimated."""
    errors = [
        (output - dense).norm() / dense.norm()
        for output, dense, _ in Decoding(selection, completion, 16, "max", geometry(budget=0.97)).decode()
    ]
    assert errors
    assert torch.stack(errors).mean() < 0.02


@pytest.mark.parametrize("completion", sorted(COMPLETIONS))
def test_a_budget_that_covers_the_context_is_never_sparse(completion: str) -> None:
    assert not list(Decoding("box", completion, 16, "max", geometry(budget=120)).decode())
