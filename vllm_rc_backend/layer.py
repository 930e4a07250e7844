"""What every platform's backend needs of a layer: whether it is sparse, its side store, and what is refused."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from vllm.config import get_current_vllm_config
from vllm.utils.torch_utils import get_dtype_size

from vllm_rc_backend import compat
from vllm_rc_backend.completion import Completion
from vllm_rc_backend.completion.feature_file import FeatureFileError, layer_completion
from vllm_rc_backend.config import OptionError, RCTopKConfig
from vllm_rc_backend.host_kv import memory
from vllm_rc_backend.host_kv import pool as host_pool
from vllm_rc_backend.kernels.reference import SummaryTags
from vllm_rc_backend.observability import meter, metrics
from vllm_rc_backend.plugin import NAME
from vllm_rc_backend.selection import make_policy
from vllm_rc_backend.side_store import SideStore, StoreLayout

logger = logging.getLogger("vllm.rc_topk")

T = TypeVar("T")

SLACK_SLOTS = 8
"""Spare summary slots, for sequences that share a prefix and part."""


class BackendFace:
    """Class methods of vLLM's AttentionBackend that are the same on every platform. Mixed in before vLLM's class."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_sliding_window(cls) -> bool:
        # Those layers are decoded densely: a window is a budget of its own.
        return True


@dataclass(frozen=True)
class LayerShape:
    """What the constructor of an attention layer says about it."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_cache_dtype: str


def refuse_layer(alibi_slopes: object, logits_soft_cap: float | None, sinks: object, attn_type: str) -> None:
    """Refuse attention variants whose scores are not plain scaled dot products.

    Raises:
        compat.UnsupportedError: what was found and the way out.
    """
    found = {
        "ALiBi slopes": alibi_slopes is not None,
        f"logits soft-capping at {logits_soft_cap}": bool(logits_soft_cap),
        "attention sinks": sinks is not None,
        f"{attn_type} attention": attn_type != "decoder",
    }
    for what, present in found.items():
        if present:
            raise compat.UnsupportedError(
                f"rc_topk does not support layers with {what}. Start without --attention-backend rc_topk."
            )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device at one moment.

    Attributes:
        allocated: held by this process's tensors.
        free: held by nobody.
        total: of the device.
    """

    allocated: int
    free: int
    total: int

    @classmethod
    def of(cls, vllm_config: Any) -> DeviceMemory:
        """Now. On a CPU, where vLLM plans its KV pool from the machine's size, nothing counts as held."""
        if vllm_config.device_config.device_type == "cuda":
            free, total = torch.cuda.mem_get_info()
            return cls(torch.cuda.memory_allocated(), free, total)
        from vllm.platforms import current_platform

        total = int(current_platform.get_device_total_memory())
        return cls(0, total, total)

    def taken_since(self, before: DeviceMemory) -> int:
        """Bytes that this engine has taken for certain; what vLLM will find taken is not less.

        Tensors of an engine that this process had before are in ``before`` already, as vLLM counts them. Its memory
        may be reused, so that tensors grow without the device's free memory shrinking; and segments may be larger
        than the tensors in them: the smaller figure is certain.
        """
        return max(0, min(self.allocated - before.allocated, before.free - self.free))


class SparseLayer:
    """The sparse side of one attention layer, owned by its vLLM implementation object.

    Attributes:
        sparse: whether the layer ever decodes sparsely; False for sliding windows, attention in chunks, layers that
            read another layer's KV cache, and ``dense_layers``.
        store: the side store; None before the weights are loaded, and for dense layers.
        before: the device's memory when the layer was made, before its weights were loaded.
    """

    def __init__(self, shape: LayerShape, sliding_window: int | None, shares_kv_of: str | None) -> None:
        self.vllm_config = get_current_vllm_config()
        compat.check_engine(self.vllm_config)
        self.config = RCTopKConfig.from_additional_config(self.vllm_config.additional_config)
        if (
            self.config.on_host
            and self.vllm_config.device_config.device_type != "cpu"
            and shape.kv_cache_dtype.startswith("fp8")
        ):
            raise OptionError(
                "kv_residency",
                "host",
                f"gpu with --kv-cache-dtype {shape.kv_cache_dtype} on GPUs",
                "Prefill reads its own chunk unquantised; leave --kv-cache-dtype out.",
            )
        self.shape = shape
        self.sparse = sliding_window is None and shares_kv_of is None
        self.store: SideStore | None = None
        self.reserved = False
        self.index = 0  # in the model; known once the layers have names
        self.before = DeviceMemory.of(self.vllm_config)
        # Set by the platform's backend, where it needs them.
        # The same with kv_residency=host: the page cache, and the buffer that prefills read the host through.
        self.pages: Any = None
        self.staging: Any = None
        self.workspace: Any = None
        self.attention: Any = None
        self.updater: Any = None

    def layout(self, block_size: int, slots: int) -> StoreLayout:
        """Sizes of this layer's side store."""
        config, kv_dtype = self.config, self.shape.kv_cache_dtype
        if block_size % config.page_size:
            raise OptionError(
                "page_size",
                config.page_size,
                f"a divisor of vLLM's block size, which is {block_size}",
                f"Choose a smaller page, or start vLLM with --block-size {config.page_size}.",
            )
        kv_bytes = 1 if kv_dtype.startswith("fp8") else get_dtype_size(self.vllm_config.model_config.dtype)
        return StoreLayout(
            heads=self.shape.num_kv_heads,
            head_size=self.shape.head_size,
            kv_bytes=kv_bytes,
            slots=slots,
            statistics_bits=config.stored_bits,
            geometry=config.geometry(block_size),
            policy=make_policy(config.selection, config.selection_weight),
            completion=self._completion(),
        )

    def _completion(self) -> Completion:
        parallel = self.vllm_config.parallel_config
        try:
            return layer_completion(
                self.config.estimator,
                self.config.features_file,
                self.vllm_config.model_config.hf_text_config.to_dict(),
                self.index,
                parallel.rank % parallel.tensor_parallel_size,
                parallel.tensor_parallel_size,
            )
        except FeatureFileError as error:
            allowed = "a file of rc-topk calibrate for this model"
            raise OptionError("features_file", self.config.features_file, allowed, str(error)) from error


def own_layers(vllm_config: Any) -> dict[str, SparseLayer]:
    """The layers of this rank that use this backend, by name."""
    impls = {
        name: getattr(layer, "impl", None) for name, layer in compat.attention_layers(vllm_config).items()
    }
    return {name: impl.sparse_layer for name, impl in impls.items() if isinstance(impl, SparseImpl)}


def sparse_layers(vllm_config: Any) -> dict[str, SparseLayer]:
    """Those of them that decode sparsely."""
    return {name: layer for name, layer in own_layers(vllm_config).items() if layer.sparse}


class SparseImpl:
    """What our implementation classes add to vLLM's: a SparseLayer and its memory. Mixed in before vLLM's class."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        refuse_layer(alibi_slopes, logits_soft_cap, sinks, attn_type)
        super().__init__(  # type: ignore[call-arg]
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
        )
        self.sparse_layer = SparseLayer(
            LayerShape(num_heads, num_kv_heads, head_size, kv_cache_dtype),
            sliding_window,
            kv_sharing_target_layer_name,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called by vLLM layer by layer, when all weights are on the device and nothing has been profiled yet.

        The first layer reserves for all of them. vLLM calls again when weights are replaced; the stores stay then.
        """
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if not self.sparse_layer.reserved:
            reserve(self.sparse_layer.vllm_config)


def reserve(vllm_config: Any) -> None:
    """Allocate the side stores of all sparse layers of this rank, before vLLM sizes its KV pool, and say so.

    Raises:
        OptionError: ``dense_layers`` names a layer that the model does not have.
    """
    count = int(vllm_config.model_config.get_total_num_hidden_layers())
    owners = compat.attention_layers(vllm_config)
    for name, layer in own_layers(vllm_config).items():
        layer.config.check_layers(count)
        layer.reserved = True
        layer.index = compat.layer_index(name)
        if layer.index in layer.config.dense_layers or compat.attends_in_chunks(owners[name]):
            layer.sparse = False
    layers = sparse_layers(vllm_config)
    compat.allocate_pool_inside(None)
    if any(layer.config.on_host for layer in own_layers(vllm_config).values()):
        keep_pages_in_host_memory(vllm_config, layers)
    if not layers:
        logger.warning(
            "rc_topk: no layer of this model can be decoded sparsely (sliding windows, attention in chunks, shared KV "
            "caches and dense_layers stay dense): every step is dense."
        )
        return
    device = _device(vllm_config)
    block_size = vllm_config.cache_config.block_size
    layouts = {name: layer.layout(block_size, slots=0) for name, layer in layers.items()}
    side_block_bytes = sum(layout.block_bytes for layout in layouts.values())
    blocks = compat.pool_blocks_bound(vllm_config, side_block_bytes, *_taken_and_total(vllm_config))
    slots = _slots(vllm_config, next(iter(layouts.values())), blocks * block_size)

    def allocate() -> None:
        for name, layer in layers.items():
            layout = replace(layouts[name], slots=slots)
            layer.store = SideStore(layout, blocks * layout.geometry.pages_per_block, device)

    kept_in_sleep(vllm_config, allocate)
    _report(vllm_config, layers, blocks)
    counters = meter.get()
    counters.interval = next(iter(layers.values())).config.log_interval
    if vllm_config.parallel_config.rank == 0:  # other ranks count the same
        metrics.publish()
    else:
        counters.interval = 0


def keep_pages_in_host_memory(vllm_config: Any, sparse: dict[str, SparseLayer]) -> None:
    """Give vLLM's pool the size that kv_residency=host asks for.

    Raises:
        UnsupportedError: a layer would read its whole context from the host at every token.
        OptionError: the host has not that much memory.
    """
    others = [name for name in compat.attention_layers(vllm_config) if name not in sparse]
    if others:
        raise compat.UnsupportedError(
            f"rc_topk: kv_residency=host needs every layer to decode sparsely; {len(others)} do not (sliding windows, "
            f"shared KV caches, recurrent states): {', '.join(others[:3])}, ... Set kv_residency=gpu."
        )
    config = next(iter(sparse.values())).config
    assert config.host_kv_gib is not None
    spare, ranks = memory.spare_bytes(), vllm_config.parallel_config.local_world_size
    on_cuda = vllm_config.device_config.device_type == "cuda"
    if on_cuda:
        # Builds the library: a compiler that is missing stops the start before anything long. What an engine that this
        # process had before has pinned serves the next one.
        spare += ranks * host_pool.held_bytes()
    memory.check(config.host_kv_gib, ranks, spare)
    compat.own_pool_bytes(vllm_config, int(config.host_kv_gib * memory.GIB))
    if on_cuda:
        compat.allocate_pool_inside(host_pool.host_memory)
    logger.info(
        "rc_topk: the KV pool takes %.2f GiB of host memory on each rank (%.1f GiB could be spared).",
        config.host_kv_gib,
        spare / memory.GIB,
    )


def page_cache_slots(vllm_config: Any, layers: dict[str, SparseLayer], left: int) -> int:
    """Pages of one KV head that the page cache of each of these layers has room for.

    Args:
        layers: of one KV-cache group; the groups share evenly.
        left: bytes for all layers, if page_cache_gib is not given.
    """
    layer = next(iter(layers.values()))
    gib, store = layer.config.page_cache_gib, layer.store
    assert store is not None
    nbytes = left if gib is None else int(gib * memory.GIB)
    entry = store.layout.token_bytes // store.layout.heads * store.layout.geometry.page_size
    return min(nbytes // len(sparse_layers(vllm_config)) // entry, store.pages * store.layout.heads)


def bind(vllm_config: Any, layer_names: Iterable[str], block_size: int) -> dict[str, SparseLayer]:
    """Give the stores of a KV-cache group the block size that its block table is in; it is final only now."""
    names = set(layer_names)
    layers = {name: layer for name, layer in sparse_layers(vllm_config).items() if name in names}
    for layer in layers.values():
        assert layer.store is not None, "vLLM built attention metadata before it loaded the weights"
        layout = layer.layout(block_size, layer.store.layout.slots)
        pages = compat.pool_tokens(vllm_config, block_size) // layout.geometry.page_size
        if pages > layer.store.pages:
            logger.warning(
                "rc_topk: the KV pool has %d pages, more than the %d that were reserved for; allocating anew, "
                "outside of what vLLM measured.",
                pages,
                layer.store.pages,
            )
            device = layer.store.codes.device
            layer.store = kept_in_sleep(vllm_config, partial(SideStore, layout, pages, device))
        layer.store.layout = layout
    return layers


def make_tags(store: SideStore) -> SummaryTags:
    """Summary tags for a KV-cache group, from the store of any of its layers."""
    return SummaryTags.empty(store.layout.slots, store.pages, store.codes.device)


def kept_in_sleep(vllm_config: Any, allocate: Callable[[], T]) -> T:
    """Allocate what lives longer than a step in memory that stays when vLLM's sleep mode frees its own.

    vLLM loads weights and plans its KV cache inside pools that it empties in sleep; at level 2, and in vLLM 0.26 at
    level 1, their contents are lost, and nothing tells a backend. Tags and counters of arrivals must not be. A pool
    takes what the thread that opened it allocates, so another thread does this. (A pool of our own inside vLLM's would
    have to outlive it: torch aborts when a pool is dropped while another one is open.)
    """
    if not vllm_config.model_config.enable_cumem_allocator:
        return allocate()
    device = torch.cuda.current_device()

    def on_device() -> T:
        torch.cuda.set_device(device)
        return allocate()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_device).result()


def _device(vllm_config: Any) -> torch.device:
    device = torch.device(vllm_config.device_config.device_type)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def _taken_and_total(vllm_config: Any) -> tuple[int, int]:
    """Bytes that this engine has taken since its first attention layer was made, and bytes of the device."""
    gc.collect()
    if vllm_config.device_config.device_type == "cuda":
        torch.cuda.empty_cache()  # as vLLM does before it measures
    now = DeviceMemory.of(vllm_config)
    # The first layer made is the one that saw the most free memory: weights only add to what is taken.
    before = max((layer.before for layer in own_layers(vllm_config).values()), key=lambda memory: memory.free)
    return now.taken_since(before), now.total


def _slots(vllm_config: Any, layout: StoreLayout, pool_tokens: int) -> int:
    """Summary slots: one for every sequence that can be sparse at the same time, if no two share blocks."""
    config = RCTopKConfig.from_additional_config(vllm_config.additional_config)
    if not layout.completion.state_rows(layout.head_size):
        return 0
    if config.summary_slots is not None:
        return config.summary_slots
    geometry = layout.geometry
    shortest = max(
        geometry.dense_threshold, int(geometry.budget) if geometry.budget >= 1 else config.smallest_budget
    )
    most = min(vllm_config.scheduler_config.max_num_seqs, math.ceil(pool_tokens / shortest))
    return max(most, 1) + SLACK_SLOTS


def _report(vllm_config: Any, layers: dict[str, SparseLayer], blocks: int) -> None:
    stores = [layer.store for layer in layers.values() if layer.store is not None]
    layout = stores[0].layout
    tokens = blocks * layout.geometry.block_size
    statistics = sum(s.nbytes - s.states.nbytes for s in stores)
    states = sum(s.states.nbytes for s in stores)
    pool = blocks * compat.pool_block_bytes(vllm_config)
    read = layout.token_equivalents(vllm_config.model_config.max_model_len)
    logger.info(
        "rc_topk: %d of %d attention layers decode sparsely; selection=%s completion=%s budget=%s. Side memory on "
        "this rank %.3f GiB (%.1f %% of the KV pool): statistics %.1f bytes per token, %d summary slots of %.2f MiB. "
        "At %d tokens of context a query reads %.0f tokens exactly, statistics worth %.0f and a summary worth %.0f.",
        len(layers),
        len(compat.attention_layers(vllm_config)),
        layout.policy.name,
        layout.completion.name,
        layers[next(iter(layers))].config.budget,
        (statistics + states) / 2**30,
        100 * (statistics + states) / max(pool, 1),
        statistics / max(tokens, 1),
        layout.slots,
        sum(s.layout.slot_bytes for s in stores) / 2**20,
        vllm_config.model_config.max_model_len,
        read["tokens"],
        read["statistics"],
        read["summary"],
    )
