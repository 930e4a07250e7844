"""Summaries of the layers of a KV-cache group on a GPU: once per step, before any layer, which slot each row uses, and
what decodes add. Prefills add theirs layer by layer, when their tokens are in the cache (``TritonAttention``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from vllm_rc_backend.attention_triton import CachePlace, TritonAttention
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference.summary import SummaryPlan, SummaryTags
from vllm_rc_backend.kernels.triton.shape import next_power_of_2
from vllm_rc_backend.kernels.triton.summary import plan_kernel
from vllm_rc_backend.kernels.triton.update import update_kernel

CACHE_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}


class SummaryPlanner:
    """Which summary slot each row of a step uses; one per KV-cache group, shared by its layers."""

    def __init__(self, geometry: Geometry, tags: SummaryTags, max_rows: int) -> None:
        device = tags.slot_page.device
        if geometry.budget >= 1:
            geometry = dataclasses.replace(geometry, budget=int(geometry.budget))
        self.geometry = geometry
        self.tags = tags
        self.max_rows = max_rows
        self.scratch = torch.empty(3, len(tags.slot_page), dtype=torch.int32, device=device)
        self.columns = torch.zeros(4, max_rows, dtype=torch.int32, device=device)
        self.columns[0] = -1

    @property
    def current(self) -> SummaryPlan:
        """The plan's persistent tensors ``[max_rows]``: slot, source, first, last."""
        return SummaryPlan(*self.columns)

    def plan(self, block_table: Tensor, seq_lens: Tensor, query_start: Tensor) -> SummaryPlan:
        """Once per step, before any layer: one launch that finds or assigns slots and updates the tags.

        Args:
            block_table: int32 ``[rows, max_blocks]``.
            seq_lens: int32 ``[rows]``, 0 in padding rows.
            query_start: int32 ``[rows + 1]``, where each row's new tokens start.
        """
        rows, tags = len(seq_lens), self.tags
        decodes, prefills, free = self.scratch
        plan = self.current
        plan_kernel[(1,)](
            tags.slot_page,
            tags.page_slot,
            tags.next_slot,
            block_table,
            seq_lens,
            query_start,
            plan.slot,
            plan.source,
            plan.first,
            plan.last,
            decodes,
            prefills,
            free,
            rows,
            len(free),
            block_table.stride(0),
            g=self.geometry,
            ROWS=next_power_of_2(self.max_rows),
            SLOTS=next_power_of_2(len(free)),
            num_warps=4,
        )
        return plan


@dataclass(frozen=True)
class _Alike:
    """Layers that one launch serves: their caches differ in address and factors only."""

    layers: list[TritonAttention]
    addresses: Tensor
    factors: Tensor

    @classmethod
    def of(cls, layers: list[TritonAttention]) -> _Alike:
        """With the table of their addresses, int64 ``[layers, 4]``: caches, states, the maps' weights and biases."""
        addresses = []
        for layer in layers:
            maps = [0 if x is None else x.data_ptr() for x in layer.maps[:2]]
            cache = 0 if layer.cache is None else layer.cache.address
            addresses.append([cache, layer.store.states.data_ptr(), *maps])
        factors = [(layer.key_scale, layer.value_scale) for layer in layers]
        device = layers[0].store.states.device
        return cls(
            layers,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.tensor(factors, dtype=torch.float32, device=device),
        )


class SummaryUpdater:
    """Adds what decodes leave behind to the summaries of some layers of a KV-cache group.

    Of all of them before the first, in a step of decodes alone. Beside prefills of each layer by itself, once their
    tokens are in the cache: vLLM lets a prompt share blocks that another one's prefill fills in the same step. If all
    its tokens but one are in them, it is a decode, and its pages have only just been written.
    """

    def __init__(self, layers: Sequence[TritonAttention]) -> None:
        self.layers = layers
        self._known: list[tuple[CachePlace | None, float, float]] = []
        self._alike: list[_Alike] = []

    def update(self, block_table: Tensor, plan: SummaryPlan) -> None:
        """One launch, or as many as there are kinds of layers. Nothing before the layers know their caches
        (``TritonAttention.bind``): nothing can be in them.

        Args:
            block_table: int32 ``[rows, max_blocks]`` of the rows with one new token each, which come first.
            plan: of these rows and maybe more, from ``SummaryPlanner.plan``.
        """
        known = [(layer.cache, layer.key_scale, layer.value_scale) for layer in self.layers]
        if known != self._known:
            self._describe()
            self._known = known
        for alike in self._alike:
            self._launch(alike, block_table, plan)

    def _describe(self) -> None:
        kinds: dict[object, list[TritonAttention]] = {}
        for layer in self.layers:
            if layer.cache is not None:
                kinds.setdefault((layer.shape, layer.cache.strides, layer.cache.dtype), []).append(layer)
        self._alike = [_Alike.of(layers) for layers in kinds.values()]

    @staticmethod
    def _launch(alike: _Alike, block_table: Tensor, plan: SummaryPlan) -> None:
        first, rows = alike.layers[0], len(block_table)
        shape, work, cache = first.shape, first.workspace, first.cache
        assert cache is not None
        columns = work.update_columns(first.pages is not None)
        most = rows * len(alike.layers) * shape.heads * -(-shape.head_size // columns)
        update_kernel[(min(work.processors * work.tuning.update_programs, most),)](
            alike.addresses,
            alike.factors,
            block_table,
            plan.slot,
            plan.source,
            plan.first,
            plan.last,
            work.counters,
            *cache.strides,
            block_table.stride(0),
            rows,
            len(alike.layers),
            S=shape,
            DTYPE=CACHE_TYPES[cache.dtype],
            COLS=columns,
            TILE=work.update_tile,
            ROWS=next_power_of_2(work.max_rows),
            num_warps=4,
        )
