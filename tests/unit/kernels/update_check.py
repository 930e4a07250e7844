"""One update of the summaries of several layers against the reference; on the CPU under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.kernels.cases import RUNS
from vllm_rc_backend.attention_triton import TritonAttention, Workspace, make_shape
from vllm_rc_backend.evaluation.kernel_check import Case
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.reference import PagedKV, SummaryPlan
from vllm_rc_backend.kernels.reference.summary import split_planes
from vllm_rc_backend.side_store import SideStore
from vllm_rc_backend.summaries_triton import SummaryUpdater

UPDATES: dict[str, dict[str, Any]] = {
    "default": {"completion": "paged"},
    "features": {"completion": "features"},
    "head size 96, 3 KV heads": {"completion": "linear", "head_size": 96, "heads": 3},
    "head size 256, fp8": {"completion": "paged", "head_size": 256, "kv_dtype": torch.float8_e4m3fn},
    "fp16, pages of 32": {"completion": "paged", "dtype": torch.float16, "page_size": 32},
}
"""Options of ``Case`` by name."""

ROWS, BUSY = 18, (0, 5, 16)


def check_update(device: str, name: str) -> None:
    """Few rows have work, but more than there are programs; layers with factors of their own, one in another order."""
    case = Case(**RUNS, **UPDATES[name], slots=ROWS + 1)
    layout, rows, blocks = case.layout, ROWS, 3 * ROWS
    size, width = layout.geometry.block_size, 2 * layout.head_size
    shape = make_shape(layout, case.group, case.group_rule)
    work = Workspace(shape, rows, case.max_model_len, device, case.statistics_bits)
    work.processors = 10  # fewer programs than work
    factors = [(1.0, 1.0), (0.5, 2.0), (3.0, 0.25)]
    table = torch.randperm(blocks, device=device).view(rows, -1).int()
    pages = table.shape[1] * layout.geometry.pages_per_block
    # Nothing to do in most rows; one page from nothing, many on top of the own slot, and all on top of another slot.
    slot = torch.arange(rows)
    slot[3] = -1
    first, last = torch.full((rows,), 1), torch.full((rows,), 1)
    for row in BUSY:
        last[row] = pages if row else 2
    first[5] = 3
    source = torch.full((rows,), -1)
    source[5], source[16] = 5, ROWS
    plan = SummaryPlan(*(x.int().to(device) for x in (slot, source, first, last)))

    layers, expected = [], []
    for i, scales in enumerate(factors):
        cache = torch.randn(blocks, case.heads, size, width, device=device).to(case.kv_dtype or case.dtype)
        if i == 2:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        store = SideStore(layout, blocks * layout.geometry.pages_per_block, device)
        store.states.fill_(torch.nan)
        for known in (5, ROWS):
            tokens = torch.randn(2, case.heads, 40, layout.head_size, device=device)
            state = store.completion.contribution(*tokens)
            store.states[known] = torch.stack(split_planes(state), dim=1)
        states = store.states.clone()
        kv = PagedKV.packed(cache, case.page_size, *scales)
        reference.absorb_pages(kv, table, plan, store.completion, states)
        layers.append((TritonAttention(store, work, 1.0), cache))
        layers[-1][0].bind(cache, *scales)
        expected.append(states)
    updater = SummaryUpdater([layer for layer, _ in layers])
    for _ in range(2):  # what is known of the layers is kept
        states = [layer.store.states.clone() for layer, _ in layers]
        updater.update(table, plan)
        for (layer, _), right, before in zip(layers, expected, states, strict=True):
            got = layer.store.states
            for one in BUSY:
                mine, exact = (x[one].float().sum(dim=1) for x in (got, right))
                wrong = (mine - exact).norm() / exact.norm()
                assert wrong < 2e-4, f"slot {one}: states differ by {wrong:.1e}"
            others = [i for i in range(len(got)) if i not in BUSY]
            torch.testing.assert_close(got[others], before[others], rtol=0, atol=0, equal_nan=True)
            layer.store.states.copy_(before)
    assert int(work.counters[7]) == 2 * len(layers), "only the first row starts from nothing"
