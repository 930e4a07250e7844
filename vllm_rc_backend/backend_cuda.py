"""The backend on NVIDIA GPUs: vLLM's FlashAttention for prefill and dense layers, Triton kernels for every decode row.

Nothing here reads a device value. Decode rows, sparse or not, take the same launches on the same buffers, so that a
captured decode graph serves them all; which rows are sparse is decided on the device from their lengths.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_rc_backend import compat
from vllm_rc_backend.attention_triton import TritonAttention, Workspace, make_shape
from vllm_rc_backend.backend_cuda_prefill import staged_prefill
from vllm_rc_backend.host_kv import pool as host_pool
from vllm_rc_backend.host_kv.page_cache import DevicePages
from vllm_rc_backend.host_kv.staging import Staging
from vllm_rc_backend.kernels.reference import SummaryPlan
from vllm_rc_backend.layer import (
    BackendFace,
    SparseImpl,
    SparseLayer,
    bind,
    kept_in_sleep,
    make_tags,
    page_cache_slots,
    sparse_layers,
)
from vllm_rc_backend.observability.device import DeviceMeter
from vllm_rc_backend.side_store import SideStore
from vllm_rc_backend.summaries_triton import SummaryPlanner, SummaryUpdater
from vllm_rc_backend.warm_up_triton import warm_up

logger = logging.getLogger("vllm.rc_topk")

HEAD_SIZES = (64, 96, 128, 256)


class RCTopKCUDABackend(BackendFace, FlashAttentionBackend):
    """vLLM's FlashAttention backend with sparse decode."""

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_SIZES and super().supports_head_size(head_size)

    @staticmethod
    def get_impl_cls() -> type[RCTopKCUDAImpl]:
        return RCTopKCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[RCTopKCUDAMetadataBuilder]:
        return RCTopKCUDAMetadataBuilder


@dataclass
class RCTopKCUDAMetadata:
    """Metadata of one step. Decode rows come first.

    Attributes:
        num_actual_tokens: tokens of the step.
        whole: FlashAttention's metadata of all rows, for dense layers; None if there are none.
        prefill: the same for the prefill rows alone; None if there are none.
        num_decodes: decode rows, padding of a captured batch included.
        block_table, seq_lens, query_start_loc: of all rows.
        max_query_len: an upper bound of the new tokens of a row.
        plan: summaries of all rows; None without a completion.
        longest_context: with the KV pages in host memory, an upper bound of the tokens that prefill rows had before.
    """

    num_actual_tokens: int
    whole: FlashAttentionMetadata | None
    prefill: FlashAttentionMetadata | None
    num_decodes: int
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    plan: SummaryPlan | None
    longest_context: int


class RCTopKCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Splits each step into decodes and prefills, and plans the summaries for all layers of the group."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table: bool = False  # the plan depends on the group's own block table

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return cls._cudagraph_support

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        layers = bind(vllm_config, layer_names, kv_cache_spec.block_size)
        self.any_sparse = bool(layers)
        self.any_dense = len(layers) < len(layer_names)
        self.planner: SummaryPlanner | None = None
        self.updater = SummaryUpdater([])
        self.meter: DeviceMeter | None = None
        self.pages: DevicePages | None = None
        if not layers:
            return
        attach(vllm_config, layers)
        first = next(iter(layers.values()))
        assert first.store is not None
        if first.store.layout.slots:
            self.planner = kept_in_sleep(
                vllm_config, partial(make_planner, first.store, max_rows(vllm_config))
            )
            self.updater = SummaryUpdater([layer.attention for layer in layers.values()])
            for layer in layers.values():
                layer.updater = SummaryUpdater([layer.attention])
        if first.config.on_host:
            self.pages = keep_pages(vllm_config, layers)
        # With the page caches in place: with them a decode takes other kernels.
        warm_up(first.attention, self.planner, vllm_config.model_config.dtype, first.staging)
        workspace = first.attention.workspace
        self.meter = DeviceMeter(
            workspace.counters, first.store.layout, len(sparse_layers(vllm_config)), self.pages
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RCTopKCUDAMetadata:
        common = common_attn_metadata
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=1)
        plan = None
        if self.planner is not None:
            plan = self.planner.plan(common.block_table_tensor, common.seq_lens, common.query_start_loc)
            if decodes and not prefills:
                self.updater.update(common.block_table_tensor[:decodes], plan)
        if self.pages is not None:
            self.pages.begin_step(
                common.block_table_tensor, common.seq_lens, common.query_start_loc, common.max_query_len
            )
        if self.meter is not None:
            self.meter.step()
        # Before the prefills': FlashAttention's builder looks at the model's windows at its first call, and not with
        # fast_build.
        whole = super().build(0, common, fast_build) if self.any_dense else None
        prefill = None
        if prefills and self.any_sparse:
            # FlashAttention's schedule is made for a whole batch; fast_build leaves it out.
            prefill = super().build(0, _from_row(common, decodes, decode_tokens), fast_build=True)
        return RCTopKCUDAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            whole=whole,
            prefill=prefill,
            num_decodes=decodes,
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            query_start_loc=common.query_start_loc,
            max_query_len=common.max_query_len,
            plan=plan,
            longest_context=0
            if prefill is None or self.pages is None
            else compat.longest_context(common, decodes),
        )


def _from_row(common: CommonAttentionMetadata, row: int, token: int) -> CommonAttentionMetadata:
    """The rows from ``row`` on, whose first token is ``token``."""
    if row == 0:
        return common
    return replace(
        common,
        query_start_loc=common.query_start_loc[row:] - token,
        query_start_loc_cpu=common.query_start_loc_cpu[row:] - token,
        seq_lens=common.seq_lens[row:],
        num_reqs=common.num_reqs - row,
        num_actual_tokens=common.num_actual_tokens - token,
        block_table_tensor=common.block_table_tensor[row:],
        slot_mapping=common.slot_mapping[token:],
    )


def make_planner(store: SideStore, rows: int) -> SummaryPlanner:
    """The planner of a KV-cache group, from the store of any of its layers."""
    return SummaryPlanner(store.layout.geometry, make_tags(store), rows)


def max_rows(vllm_config: Any) -> int:
    """The most rows of a step, padding of captured batches included."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    sequences = int(vllm_config.scheduler_config.max_num_seqs)
    # A uniform decode batch is padded to the next captured size, which can exceed max_num_seqs.
    return min(max(sequences, captured), 2 * sequences)


def reserve_workspaces(vllm_config: Any) -> None:
    """Allocate the kernels' buffers, shared by all layers of one shape, before vLLM sizes its KV pool."""
    workspaces: dict[Any, Workspace] = {}
    for layer in sparse_layers(vllm_config).values():
        assert layer.store is not None
        group = layer.shape.num_heads // layer.shape.num_kv_heads
        shape = make_shape(layer.store.layout, group, layer.config.group_rule)
        if shape not in workspaces:
            workspaces[shape] = Workspace(
                shape,
                max_rows(vllm_config),
                vllm_config.model_config.max_model_len,
                layer.store.codes.device,
                layer.config.stored_bits,
                captured=vllm_config.compilation_config.cudagraph_capture_sizes or (),
            )
        layer.workspace = workspaces[shape]
    logger.info(
        "rc_topk: the kernels' buffers take %.2f GiB beside that, for %d rows and %d tokens of context.",
        sum(workspace.nbytes for workspace in workspaces.values()) / 2**30,
        max_rows(vllm_config),
        vllm_config.model_config.max_model_len,
    )


def attach(vllm_config: Any, layers: dict[str, SparseLayer]) -> None:
    """Make the layers' attention objects, now that the block size of their block table is known."""
    compat.let_compile_hooks_pass()
    compat.mend_older_runners()
    owners = compat.attention_layers(vllm_config)
    for name, layer in layers.items():
        assert layer.store is not None
        group = layer.shape.num_heads // layer.shape.num_kv_heads
        layer.workspace.shape = make_shape(layer.store.layout, group, layer.config.group_rule)
        layer.attention = TritonAttention(layer.store, layer.workspace, owners[name].impl.scale)


def keep_pages(vllm_config: Any, layers: dict[str, SparseLayer]) -> DevicePages:
    """Give a group's layers their page caches, out of what vLLM has left of the device's memory."""
    first = next(iter(layers.values()))
    store, rows = first.store, max_rows(vllm_config)
    assert store is not None
    layout, device = store.layout, store.codes.device
    kv_dtype = vllm_config.model_config.dtype
    geometry = first.attention.shape.geometry
    staging = Staging(geometry, layout.heads, layout.head_size, kv_dtype, device, rows)
    # A page's directory entries, and this buffer, come on top of the peak that vLLM's profiling run has shown.
    taken = staging.buffer.nbytes + 4 * store.pages * layout.heads * len(layers)
    left = max(_left_on_device(vllm_config, device) - taken, 0)
    pages = DevicePages(
        geometry,
        len(layers),
        store.pages,
        layout.heads,
        page_cache_slots(vllm_config, layers, left),
        layout.head_size,
        kv_dtype,
        device,
        rows,
        vllm_config.model_config.max_model_len,
    )
    for layer, own in zip(layers.values(), pages.layers, strict=True):
        layer.pages = layer.attention.pages = own
        layer.staging = staging
    logger.info(
        "rc_topk: the page cache takes %.2f GiB of the device: %d pages of a KV head in each of %d layers.",
        pages.nbytes / 2**30,
        pages.slots,
        len(layers),
    )
    if pages.slots < (least := layout.heads * pages.max_read):
        logger.warning(
            "rc_topk: that is less than one sequence reads in a step (%d pages): nearly all of it comes over the bus, "
            "each time anew. Raise page_cache_gib or --gpu-memory-utilization.",
            least,
        )
    return pages


def _left_on_device(vllm_config: Any, device: torch.device) -> int:
    """Bytes under --gpu-memory-utilization that neither this process's peak so far nor anybody else takes."""
    torch.cuda.synchronize(device)
    # To torch the host's pool is device memory, too; an engine that this process had before may have left it one.
    torch_now = torch.cuda.memory_reserved(device) - host_pool.held_bytes()
    torch_peak = torch.cuda.max_memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch_now
    return max(int(total * vllm_config.cache_config.gpu_memory_utilization) - others - torch_peak, 0)


class RCTopKCUDAImpl(SparseImpl, FlashAttentionImpl):
    """One attention layer on the GPU."""

    can_return_lse_for_decode: bool = False
    supports_dcp: bool = False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        first = not self.sparse_layer.reserved
        super().process_weights_after_loading(act_dtype)
        if first:
            config = self.sparse_layer.vllm_config
            kept_in_sleep(config, partial(reserve_workspaces, config))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RCTopKCUDAMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # profiling
            return output.fill_(0)
        meta = attn_metadata
        if not self.sparse_layer.sparse:
            return super().forward(
                layer, query, key, value, kv_cache, meta.whole, output, output_scale, output_block_scale
            )
        attention, decodes = self.sparse_layer.attention, meta.num_decodes
        attention.bind(kv_cache, layer._k_scale_float, layer._v_scale_float)
        if meta.prefill is not None:
            table, seq_lens = meta.block_table[decodes:], meta.seq_lens[decodes:]
            # Before the decodes, which may share blocks that prefills fill in this step (``SummaryUpdater``).
            plan = None if meta.plan is None else meta.plan.from_row(decodes)
            attention.update_prefill(
                kv_cache, table, seq_lens, meta.query_start_loc[decodes:], meta.max_query_len, plan
            )
            if decodes and meta.plan is not None:
                self.sparse_layer.updater.update(meta.block_table[:decodes], meta.plan)
        if decodes:
            rows = query[:decodes]
            if rows.dtype != output.dtype:  # vLLM quantised it for FlashAttention's fp8 path
                rows = rows.to(output.dtype) * layer._q_scale.to(output.dtype)
            attention.decode(
                rows,
                kv_cache,
                meta.block_table[:decodes],
                meta.seq_lens[:decodes],
                meta.plan,
                output[:decodes],
            )
        if meta.prefill is not None:
            tokens = slice(decodes, meta.num_actual_tokens)
            new = query[tokens], key[tokens], value[tokens]
            if attention.pages is not None:
                staged_prefill(
                    self,
                    self.sparse_layer.staging,
                    *new,
                    kv_cache,
                    table,
                    seq_lens,
                    meta.prefill.query_start_loc,
                    meta.max_query_len,
                    meta.longest_context,
                    output[tokens],
                )
            else:
                super().forward(layer, *new, kv_cache, meta.prefill, output[tokens])
        return output
