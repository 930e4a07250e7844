"""Every difference between the vLLM versions we support, and what vLLM is asked to refuse. Nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_rc_backend.plugin import NAME

SUPPORTED = SpecifierSet(">=0.26.0,<0.34", prereleases=True)
"""vLLM versions this plugin runs on. 0.26.0: the first whose FlashAttention reads the packed [block, head, token,
2 * head_size] cache our kernels share. 0.33: the newest that the tests have run against."""


class UnsupportedError(ValueError):
    """The engine is configured in a way that sparse decode cannot serve correctly; stops the start."""


def check_version() -> None:
    """Raise unless the installed vLLM is one of ``SUPPORTED``."""
    import vllm

    version = Version(vllm.__version__)
    if Version(version.base_version) not in SUPPORTED:
        raise UnsupportedError(
            f"rc_topk: vLLM {version} is not supported; supported: {SUPPORTED}. Install a supported vLLM, or start "
            "without --attention-backend rc_topk."
        )


def register_member(name: str, class_path: str) -> Any:
    """Add a member to vLLM's backend enum, or return the one that is there."""
    from vllm.v1.attention.backends import registry

    enum = registry.AttentionBackendEnum
    if name in enum.__members__:
        return enum.__members__[name]
    if hasattr(enum, "register"):  # 0.32
        registry.register_backend(name, class_path)
        return enum.__members__[name]
    member = object.__new__(enum)  # 0.26: what 0.32's register() does
    member._name_ = name
    member._value_ = class_path
    enum._member_map_[name] = member
    enum._value2member_map_[class_path] = member
    enum._member_names_.append(name)
    return member


def register_models(models: dict[str, str]) -> None:
    """Tell vLLM which class (``module:name``, imported when used) serves an architecture. Idempotent."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, path in models.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, path)


def let_compile_hooks_pass() -> None:
    """Let our kernels be compiled while a Triton compile hook is set, as vLLM sets one once it serves. Idempotent.

    Triton describes a kernel to hooks as JSON and fails with constants that are objects, such as ``Shape``; a request
    that needs a kernel anew would end the engine. vLLM does the same from 0.33 on; its hook ignores the description.
    """
    from triton.runtime import jit

    def describe_or_not(original: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
        try:
            return str(original(*args, **kwargs))
        except TypeError:
            return None

    _wrap_once(jit, "serialize_specialization_data", describe_or_not)


def _wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around``, which gets the original and its arguments, in place of a function. Idempotent."""
    original = getattr(owner, name)
    if getattr(original, "serves_rc_topk", False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapper.serves_rc_topk = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)


def mend_older_runners() -> None:
    """Two things that vLLM's GPU runners do between steps and that would leave us wrong numbers. Idempotent.

    Before 0.33 the V2 runner leaves the last step's pages in the rows of a batch that only keeps other data-parallel
    ranks company: they would be planned as if they were read. 0.26's V1 runner sets the tensors of fp8 scales to 1 when
    it wakes from sleep, and not the numbers that captured kernels have; the KV cache is then written by the tensors.
    """
    import torch
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def emptied(original: Callable[..., Any], tables: Any, num_reqs: int) -> Any:
        found = original(tables, num_reqs)
        for table in found:
            table.zero_()
        return found

    def as_the_kernels_have_them(original: Callable[..., Any], runner: Any) -> None:
        original(runner)
        for layer in runner.compilation_config.static_forward_context.values():
            for name in ("_k_scale", "_v_scale"):
                if isinstance(scale := getattr(layer, name, None), torch.Tensor):
                    scale.fill_(getattr(layer, f"{name}_float"))

    if "zero_" not in BlockTables.get_dummy_block_tables.__code__.co_names:  # before 0.33
        _wrap_once(BlockTables, "get_dummy_block_tables", emptied)
    if hasattr(GPUModelRunner, "init_fp8_kv_scales"):  # 0.26
        _wrap_once(GPUModelRunner, "init_fp8_kv_scales", as_the_kernels_have_them)


def let_cpu_platform_choose(member: Any) -> None:
    """Let vLLM's CPU platform take this backend: it ignores the flag otherwise. Only there, only for this member."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    original = platform.get_attn_backend_cls
    if getattr(original, "serves_rc_topk", False):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if selected_backend is not member:
            return str(original.__func__(cls, selected_backend, attn_selector_config, *args, **kwargs))
        reasons = member.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            # The words of vLLM's CUDA platform.
            raise ValueError(
                f"Selected backend {member} is not valid for this configuration. Reason: {reasons}"
            )
        return str(member.get_path())

    get_attn_backend_cls.serves_rc_topk = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    # The marker must be visible through the bound method, too.
    assert platform.get_attn_backend_cls.serves_rc_topk


def check_engine(vllm_config: Any) -> None:
    """Refuse engine features under which page statistics or summaries would silently be wrong.

    Raises:
        UnsupportedError: names every feature, the flag that turned it on, and the way out.
    """
    check_version()
    parallel = vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    refused = {
        "speculative decoding (--speculative-config): its verification steps decode several tokens at once": (
            vllm_config.speculative_config is not None
        ),
        "decode context parallelism (--decode-context-parallel-size): a rank holds only a share of each page": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
        ),
        "prefill context parallelism (--prefill-context-parallel-size): a rank holds only a share of each page": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "KV connectors (--kv-transfer-config): pages arrive without a forward pass and have no statistics": (
            transfer is not None and transfer.kv_connector is not None
        ),
        "KV offloading (--kv-offloading-size): pages arrive without a forward pass and have no statistics": (
            getattr(vllm_config.cache_config, "kv_offloading_size", None) is not None
        ),
        "microbatching (--enable-dbo, --ubatch-size): two half batches would share one set of summaries": (
            bool(getattr(parallel, "use_ubatching", False))
        ),
        "KV-sharing fast prefill (--kv-sharing-fast-prefill)": (
            bool(getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False))
        ),
        "hits within a block (--prefix-match-unit): pages arrive as copies and have no statistics": (
            getattr(vllm_config.cache_config, "prefix_match_unit", None) is not None
        ),
    }
    reasons = [reason for reason, present in refused.items() if present]
    if reasons:
        raise UnsupportedError(
            f"rc_topk does not work with: {'; '.join(reasons)}. Turn that off, or start without "
            "--attention-backend rc_topk."
        )


def uses_rc_topk(vllm_config: Any) -> bool:
    """Whether this engine was started with our backend, for all layers or for one kind of them."""
    attention = vllm_config.attention_config
    return any(
        getattr(chosen, "name", None) == NAME
        for chosen in (attention.backend, *attention.backend_per_kind.values())
    )


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """The layers of this rank that own a KV cache or a recurrent state, by name."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if hasattr(layer, "get_kv_cache_spec")}


def attends_in_chunks(layer: Any) -> bool:
    """Whether a layer sees the tokens of its own chunk of the sequence only (Llama 4's local layers).

    vLLM wraps the backend for them and gives it rows of chunks, not of sequences.
    """
    return getattr(layer, "attention_chunk_size", None) is not None


def pool_block_bytes(vllm_config: Any) -> int:
    """Bytes of one block id in this rank's KV pool, or fewer: what one kind of layers takes, the smallest counting.

    vLLM splits a hybrid model's layers into groups of one kind that share the pool, so a block id is as wide as the
    widest group. How wide that is, it decides later; no group is narrower than the rarest kind. A model of one kind is
    one group, and this is exact.
    """
    kinds: dict[Any, int] = {}
    for layer in attention_layers(vllm_config).values():
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is not None:
            kind = (type(spec), getattr(spec, "sliding_window", None))
            kinds[kind] = kinds.get(kind, 0) + int(spec.page_size_bytes)
    return min(kinds.values())


def pool_tokens(vllm_config: Any, block_size: int) -> int:
    """Tokens that vLLM's KV pool holds; 0 while it is not planned.

    Args:
        block_size: of the group asked about, which hybrid models may have enlarged.
    """
    cache = vllm_config.cache_config
    return int(cache.num_gpu_blocks or 0) * max(int(cache.block_size), block_size)


def pool_blocks_bound(vllm_config: Any, side_block_bytes: int, taken: int, total: int) -> int:
    """The most blocks that vLLM can plan for once the side store is taken out of its memory.

    vLLM sizes the pool after it has measured what the process holds, this plugin's tensors included. With ``s`` side
    bytes and ``k`` pool bytes per block, reserving for ``A / (k + s)`` of the available A bytes leaves room for at
    most as many.

    Args:
        side_block_bytes: side bytes of one block, all layers.
        taken: device bytes that this engine holds before the side store, or fewer: its weights.
        total: bytes of the device.
    """
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        return int(cache.num_gpu_blocks_override)
    if cache.kv_cache_memory_bytes is not None:  # the user's figure is for the pool alone
        return int(cache.kv_cache_memory_bytes) // pool_block_bytes(vllm_config)
    available: int = math.ceil(total * cache.gpu_memory_utilization) - taken
    # Rounded up: what rounding down leaves over may hold one more pool block, if not its side bytes as well.
    return math.ceil(max(available, 0) / (pool_block_bytes(vllm_config) + side_block_bytes))


def own_pool_bytes(vllm_config: Any, nbytes: int) -> None:
    """Let vLLM plan its KV pool for this many bytes on each rank, whatever is left on the device.

    Raises:
        UnsupportedError: a flag of vLLM's that also says how large or where the pool is.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    flags = {
        "--kv-cache-memory-bytes": cache.kv_cache_memory_bytes is not None,
        "--num-gpu-blocks-override": cache.num_gpu_blocks_override is not None,
        "--enable-sleep-mode, or another flag that uses vLLM's own allocator": bool(
            model.enable_cumem_allocator
        ),
    }
    found = [flag for flag, present in flags.items() if present]
    if found:
        raise UnsupportedError(
            f"rc_topk: kv_residency=host does not work with: {'; '.join(found)}. host_kv_gib says how large the KV "
            "pool is: leave that flag out, or set kv_residency=gpu."
        )
    cache.kv_cache_memory_bytes = nbytes


_pool_context: Callable[[], AbstractContextManager[None]] | None = None
"""Where the next KV pool of this process is allocated; None: as vLLM does it."""


def allocate_pool_inside(context: Callable[[], AbstractContextManager[None]] | None) -> None:
    """Let vLLM allocate its next KV pool inside this context, and nothing else in it; None undoes that."""
    global _pool_context
    _pool_context = context
    if context is not None:
        _wrap_pool_allocation()


def _take_pool_context() -> AbstractContextManager[None] | None:
    global _pool_context
    context, _pool_context = _pool_context, None
    return None if context is None else context()


@functools.cache
def _wrap_pool_allocation() -> None:
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu import attn_utils
    from vllm.v1.worker.gpu_worker import Worker

    def inside(original: Any) -> Any:
        @functools.wraps(original)
        def allocate(*args: Any, **kwargs: Any) -> Any:
            with _take_pool_context() or nullcontext():
                return original(*args, **kwargs)

        return allocate

    if hasattr(attn_utils, "_allocate_kv_cache"):  # 0.26: the worker's context has more than the pool inside
        attn_utils._allocate_kv_cache = inside(attn_utils._allocate_kv_cache)
        runner = gpu_model_runner.GPUModelRunner
        runner._allocate_kv_cache_tensors = inside(runner._allocate_kv_cache_tensors)
        return
    original = Worker._maybe_get_memory_pool_context

    @functools.wraps(original)
    def pool_context(self: Any, tag: str) -> Any:
        context = _take_pool_context() if tag == "kv_cache" else None
        return original(self, tag) if context is None else context

    Worker._maybe_get_memory_pool_context = pool_context


def longest_context(common: Any, row: int) -> int:
    """An upper bound of the tokens that rows from ``row`` on had before this step, known on the host."""
    seq_lens = getattr(common, "seq_lens_cpu_upper_bound", None)
    if seq_lens is None:
        return max(int(common.max_seq_len) - 1, 0)
    starts = common.query_start_loc_cpu
    query_lens = starts[1:] - starts[:-1]
    return max(int((seq_lens[row : len(query_lens)] - query_lens[row:]).max()), 0)


def layer_index(name: str) -> int:
    """The index of a layer in the model, from its name."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))
