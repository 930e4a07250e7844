"""At a server's start every kernel that a step may launch is compiled: otherwise it would be in the middle of the first
request that needs it, and no captured graph has them all in it."""

from __future__ import annotations

import torch

from vllm_rc_backend.attention_triton import TritonAttention
from vllm_rc_backend.host_kv.staging import Staging
from vllm_rc_backend.summaries_triton import SummaryPlanner, SummaryUpdater


def warm_up(
    attention: TritonAttention,
    planner: SummaryPlanner | None,
    dtype: torch.dtype,
    staging: Staging | None = None,
) -> None:
    """Launch each kernel on rows of padding, which read nothing and leave nothing behind.

    Args:
        attention: of any layer of a KV-cache group, not bound to a cache yet; with its page cache if it gets one, of
            which no step has begun.
        planner: the group's, which has planned nothing yet; None without a completion.
        dtype: of queries, and of the cache unless its elements are single bytes.
        staging: with the KV pages in host memory, what prefills read them through.
    """
    store = attention.store
    layout, device = store.layout, store.codes.device
    size = layout.geometry.block_size
    kv_dtype = torch.uint8 if layout.kv_bytes == 1 else dtype
    kv_cache = torch.zeros(1, size, layout.heads, 2 * layout.head_size, dtype=kv_dtype, device=device)
    kv_cache = kv_cache.transpose(1, 2)
    zeros = torch.zeros(16, dtype=torch.int32, device=device)
    table, lengths, starts = zeros.view(1, 16), zeros[:1], zeros[:2]
    plan = None if planner is None else planner.plan(table, lengths, starts)
    attention.update_prefill(kv_cache, table, lengths, starts, size, plan)
    if plan is not None:
        attention.bind(kv_cache, 1.0, 1.0)
        SummaryUpdater([attention]).update(table, plan)
        attention.cache = None
    if attention.pages is not None:
        attention.pages.group.begin_step(table, lengths, starts, 1)
        attention.pages.group.now.zero_()  # it was no step
    if staging is not None:
        staging.copy(kv_cache, table, lengths, starts, 0)
    attention.warm_up(kv_cache, dtype, plan)
