"""The vectorised window against the definition, position by position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.paging import GROUP, HEAD_SIZE, HEADS, geometry
from vllm_rc_backend.attention import Batch, ReferenceAttention
from vllm_rc_backend.completion import COMPLETIONS, make_completion
from vllm_rc_backend.evaluation.snapkv import SnapKV
from vllm_rc_backend.evaluation.sparse import Setting, dense_window, sparse_window
from vllm_rc_backend.kernels.reference import (
    PagedKV,
    SummaryTags,
    decode_dense,
    decode_sparse,
    plan_summaries,
)
from vllm_rc_backend.selection import POLICIES, make_policy
from vllm_rc_backend.side_store import SideStore, StoreLayout

BATCH, TOKENS, WINDOW = 2, 90, 41
MATRIX = [
    (selection, completion)
    for selection in sorted(POLICIES)
    for completion in sorted(COMPLETIONS)
    if POLICIES[selection].estimates_mass or not COMPLETIONS[completion].needs_mass
]


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query of the window (scaled), keys and values of the sequence."""
    query = torch.randn(BATCH, WINDOW, HEADS, GROUP, HEAD_SIZE) / HEAD_SIZE**0.5
    return query, *torch.randn(2, BATCH, HEADS, TOKENS, HEAD_SIZE)


def decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, setting: Setting
) -> list[torch.Tensor]:
    """One sequence through the product's own decode step: prefill, then a token at a time."""
    shape, blocks = setting.geometry, TOKENS // setting.geometry.block_size + 1
    layout = StoreLayout(
        HEADS, HEAD_SIZE, 4, 1, setting.statistics_bits, shape, setting.policy, setting.completion
    )
    store = SideStore(layout, blocks * shape.pages_per_block, "cpu")
    attention, tags = ReferenceAttention(store, 1.0, setting.group_rule), SummaryTags.empty(1, store.pages)
    cache = torch.zeros(blocks, HEADS, shape.block_size, 2 * HEAD_SIZE)
    table, kv = torch.randperm(blocks).unsqueeze(0), PagedKV.packed(cache, shape.page_size)
    outputs, start = [], TOKENS - WINDOW
    for first, last in [(0, start), *((i, i + 1) for i in range(start, TOKENS))]:
        for i in range(first, last):
            token = torch.cat((keys[:, i], values[:, i]), dim=-1)
            cache[table[0, i // shape.block_size], :, i % shape.block_size] = token
        lengths = [last], [last - first]
        batch = Batch(table, *lengths, plan_summaries(tags, shape, table, *lengths))
        attention.update(kv, batch)
        if first < start:
            continue
        q = query[first - start]
        if shape.is_sparse(last):
            output, _ = attention.decode(q.flatten(0, 1), kv, batch, 0)
            outputs.append(output.unflatten(0, (HEADS, GROUP)))
        else:
            outputs.append(decode_dense(q, keys[:, :last], values[:, :last]))
    return outputs


@pytest.mark.parametrize(("selection", "completion"), MATRIX)
def test_window_is_decode_sparse_at_every_position(selection: str, completion: str) -> None:
    policy = make_policy(selection)
    setting = Setting(
        geometry(budget=31), policy, "max", make_completion(completion), policy.statistics_bits[0]
    )
    query, keys, values = tensors()
    window = sparse_window(query, keys, values, setting)
    for row in range(BATCH):
        for output, expected in zip(
            window[row], decode(query[row], keys[row], values[row], setting), strict=True
        ):
            assert torch.allclose(output, expected, atol=2e-3)


@pytest.mark.parametrize(("selection", "rule"), [("box", "mean"), ("moba", "share")])
@pytest.mark.parametrize("budget", [0.4, 0.9])
def test_a_share_as_budget_mixes_sparse_and_dense_positions(budget: float, selection: str, rule: str) -> None:
    shape = geometry(budget=budget, dense_threshold=60)
    setting = Setting(shape, make_policy(selection), rule, make_completion("linear"), 8)
    query, keys, values = tensors()
    window = sparse_window(query, keys, values, setting)
    expected = decode(query[0], keys[0], values[0], setting)
    assert torch.allclose(window[0], torch.stack(expected), atol=2e-3)


@pytest.mark.parametrize("completion", ["none", "linear"])
def test_snapkv_reads_the_pages_that_the_prompts_end_attended_to(completion: str) -> None:
    shape, start = geometry(budget=31), TOKENS - WINDOW
    setting = Setting(shape, SnapKV(), "max", make_completion(completion), 16)
    query, keys, values = tensors()
    observed = 3 * torch.randn(BATCH, 5, HEADS, GROUP, HEAD_SIZE) / HEAD_SIZE**0.5
    window = sparse_window(query, keys, values, setting, observed)

    page, first, last = shape.page_size, shape.sink_pages, shape.mid_end(start)
    for row in range(BATCH):
        mass = torch.zeros(HEADS, start)
        for i in range(5):
            seen = start - 4 + i
            scores = observed[row, i] @ keys[row, :, :seen].mT
            mass[:, :seen] += scores.softmax(dim=-1).sum(dim=1)
        by_page = mass[:, first * page : last * page].unflatten(1, (-1, page)).sum(dim=-1)
        kept = by_page.topk(shape.retrieved_pages(start)).indices.sort().values + first

        cache = torch.cat((keys[row], values[row]), dim=-1)[:, : TOKENS // page * page]
        tail = torch.zeros(HEADS, page, 2 * HEAD_SIZE)
        tail[:, : TOKENS % page] = torch.cat((keys[row], values[row]), dim=-1)[:, TOKENS // page * page :]
        cache = torch.cat((cache, tail), dim=1).unflatten(1, (-1, page)).transpose(0, 1).contiguous()
        for i in range(WINDOW):
            seq_len = start + i + 1
            mid = slice(first * page, shape.mid_end(seq_len) * page)
            later = torch.arange(last, shape.mid_end(seq_len)).expand(HEADS, -1)
            expected, _ = decode_sparse(
                query[row, i],
                PagedKV.packed(cache, page),
                torch.arange(len(cache)),
                seq_len,
                replace(shape, block_size=page),
                torch.cat((kept, later), dim=1),
                setting.completion,
                None
                if completion == "none"
                else setting.completion.contribution(keys[row, :, mid], values[row, :, mid]),
            )
            assert torch.allclose(window[row, i], expected, atol=2e-3)


def test_dense_window_is_causal_softmax() -> None:
    query, keys, values = tensors()
    window = dense_window(query, keys, values)
    for i in (0, 17, WINDOW - 1):
        end = TOKENS - WINDOW + i + 1
        assert torch.allclose(
            window[1, i], decode_dense(query[1, i], keys[1, :, :end], values[1, :, :end]), atol=1e-5
        )
