"""The backend on vLLM's CPU platform: vLLM's own kernels for prefill and dense rows, the reference for sparse ones.

Slow on purpose: it exists so that everything but the fast kernels runs, and is tested, without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_rc_backend.attention import Batch, ReferenceAttention
from vllm_rc_backend.cpu_layout import as_numbers, block_layout
from vllm_rc_backend.host_kv.memory import GIB
from vllm_rc_backend.kernels.reference import PageCache, PagedKV, SummaryTags, Traffic, plan_summaries
from vllm_rc_backend.layer import (
    BackendFace,
    SparseImpl,
    bind,
    make_tags,
    page_cache_slots,
)
from vllm_rc_backend.observability import meter

CACHE_SHARE = 8
"""The pool is so many times the page cache, if page_cache_gib is not given: here both are ordinary memory."""


class RCTopKCPUBackend(BackendFace, CPUAttentionBackend):
    """vLLM's CPU backend with sparse decode."""

    @staticmethod
    def get_impl_cls() -> type[RCTopKCPUImpl]:
        return RCTopKCPUImpl

    @staticmethod
    def get_builder_cls() -> type[RCTopKCPUMetadataBuilder]:
        return RCTopKCPUMetadataBuilder


@dataclass
class RCTopKCPUMetadata:
    """Metadata of one step.

    Attributes:
        whole: vLLM's metadata of all rows, for layers that stay dense.
        dense: the same for the rows that are not sparse (``whole`` if none is); None if all are sparse.
        dense_tokens: int64, the tokens of those rows; None if they are all tokens.
        batch: the rows, for the side store; None if no layer of the group is sparse.
        sparse: (row, token) pairs that decode sparsely.
    """

    whole: CPUAttentionMetadata
    dense: CPUAttentionMetadata | None
    dense_tokens: Tensor | None
    batch: Batch | None
    sparse: list[tuple[int, int]]


class RCTopKCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits each step's rows into dense and sparse ones, and plans the summaries for all layers of the group."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layers = bind(vllm_config, layer_names, kv_cache_spec.block_size)
        self.tags: SummaryTags | None = None
        if self.layers:
            store = next(iter(self.layers.values())).store
            assert store is not None
            self.layout = store.layout
            self.tags = make_tags(store) if store.layout.slots else None
            config = next(iter(self.layers.values())).config
            if config.host_kv_gib is not None:
                slots = page_cache_slots(
                    vllm_config, self.layers, int(config.host_kv_gib * GIB / CACHE_SHARE)
                )
        for layer in self.layers.values():
            if layer.config.on_host:
                assert layer.store is not None
                cache = as_numbers(torch.empty(0, dtype=kv_cache_spec.dtype), layer.shape.kv_cache_dtype)
                layer.pages = PageCache.empty(
                    layer.store.pages,
                    layer.shape.num_kv_heads,
                    slots,
                    self.layout.geometry.page_size,
                    layer.shape.head_size,
                    cache.dtype,
                )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RCTopKCPUMetadata:
        common = common_attn_metadata
        whole = super().build(common_prefix_len, common, fast_build)
        if not self.layers:
            return RCTopKCPUMetadata(whole, whole, None, None, [])
        geometry = self.layout.geometry
        starts = common.query_start_loc.tolist()
        query_lens = [end - start for start, end in pairwise(starts)]
        seq_lens = common.seq_lens[: len(query_lens)].tolist()
        table = common.block_table_tensor[: len(query_lens)]
        plan = None
        if self.tags is not None:
            plan = plan_summaries(self.tags, geometry, table, seq_lens, query_lens)
        batch = Batch(table, seq_lens, query_lens, plan)
        rows = range(len(seq_lens))
        sparse = [r for r in rows if query_lens[r] == 1 and geometry.is_sparse(seq_lens[r])]
        meter.get().step(self.layout, batch, sparse)
        if not sparse:
            return RCTopKCPUMetadata(whole, whole, None, batch, [])
        dense, tokens = self._restrict(common, [r for r in rows if r not in set(sparse)], starts)
        return RCTopKCPUMetadata(whole, dense, tokens, batch, [(r, starts[r]) for r in sparse])

    def _restrict(
        self, common: CommonAttentionMetadata, rows: list[int], starts: list[int]
    ) -> tuple[CPUAttentionMetadata | None, Tensor]:
        """vLLM's metadata for some of the rows, and their tokens."""
        spans = [torch.arange(starts[r], starts[r + 1]) for r in rows]
        if not rows:
            return None, torch.empty(0, dtype=torch.long)
        tokens = torch.cat(spans)
        lens = [len(span) for span in spans]
        query_start_loc = torch.tensor([0, *lens], dtype=common.query_start_loc.dtype).cumsum(0)
        query_start_loc = query_start_loc.to(common.query_start_loc.dtype)
        index = torch.tensor(rows)
        restricted = common.replace(
            query_start_loc=query_start_loc,
            query_start_loc_cpu=query_start_loc,
            seq_lens=common.seq_lens[index],
            num_reqs=len(rows),
            num_actual_tokens=len(tokens),
            max_query_len=max(lens),
            block_table_tensor=common.block_table_tensor[index],
            slot_mapping=common.slot_mapping[tokens],
        )
        return super().build(0, restricted), tokens


class RCTopKCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    """One attention layer on the CPU."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RCTopKCPUMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # profiling
            return output
        if not self.sparse_layer.sparse:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata.whole, output)

        meta, batch, store = attn_metadata, attn_metadata.batch, self.sparse_layer.store
        assert batch is not None
        assert store is not None
        kv = self._paged(layer, query.dtype, kv_cache)
        pages = self.sparse_layer.pages
        attention = ReferenceAttention(store, self.scale, self.sparse_layer.config.group_rule, pages)
        attention.update(kv, batch)

        if meta.dense_tokens is None:
            return super().forward(layer, query, key, value, kv_cache, meta.dense, output)
        if meta.dense is not None:
            part = torch.empty_like(output[meta.dense_tokens])
            super().forward(layer, query[meta.dense_tokens], key, value, kv_cache, meta.dense, part)
            output[meta.dense_tokens] = part
        for row, token in meta.sparse:
            row_output, residual = attention.decode(query[token], kv, batch, row)
            output[token] = row_output.to(output.dtype)
            meter.get().residual(residual)
        if pages is not None:
            meter.get().pages(store.layout, pages.traffic)
            pages.traffic = Traffic()
        return output

    def _paged(self, layer: Any, dtype: torch.dtype, kv_cache: Tensor) -> PagedKV:
        store = self.sparse_layer.store
        assert store is not None
        block_size = store.layout.geometry.block_size
        index = block_layout(
            layer.isa, dtype, self.kv_cache_dtype, kv_cache.dtype, block_size, self.head_size
        )
        pages = kv_cache.shape[0] * store.layout.geometry.pages_per_block
        if pages > store.pages:
            raise RuntimeError(
                f"rc_topk: the KV pool has {pages} pages, the side store was planned for {store.pages}; please report "
                "this with the engine's configuration."
            )
        return PagedKV(
            as_numbers(kv_cache, self.kv_cache_dtype),
            *index,
            store.layout.geometry.page_size,
            layer._k_scale_float,
            layer._v_scale_float,
        )
