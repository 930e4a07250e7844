"""What must hold in every supported vLLM. Runs as a script in an interpreter of its own: `checks.py PLATFORM`.

Prints one JSON object, a check's name to its traceback or null.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MODEL = str(Path(__file__).parents[2] / "examples" / "model")
PLATFORM = sys.argv[1] if len(sys.argv) > 1 else ""
OPTIONS = {"rc_topk": {"budget": 256}}


def in_fresh_interpreter(code: str, stdin: bytes = b"", **environment: str) -> str:
    """Run code in a new process that has imported nothing; its standard output."""
    result = subprocess.run(
        [sys.executable, "-c", code], input=stdin, capture_output=True, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    return result.stdout.decode().strip().splitlines()[-1]


@functools.cache
def engine_config() -> Any:
    """The configuration of an engine as ``vllm serve --attention-backend rc_topk`` would make it."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=MODEL,
        attention_backend="rc_topk",
        additional_config=OPTIONS,
        dtype="bfloat16",
        max_model_len=4096,
    ).create_engine_config()


@functools.cache
def layers() -> dict[str, Any]:
    """Two attention layers, made by vLLM under that configuration."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = engine_config()
    torch.set_default_dtype(torch.bfloat16)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(2)]
    with set_current_vllm_config(config):
        return {
            name: Attention(4, 64, 64**-0.5, num_kv_heads=2, cache_config=config.cache_config, prefix=name)
            for name in names
        }


def backend() -> Any:
    """The backend class, by the way that vLLM goes."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum["RC_TOPK"].get_class()


def check_platform() -> None:
    from vllm.platforms import current_platform

    assert current_platform.is_cuda() == (PLATFORM == "cuda")
    assert current_platform.is_cpu() == (PLATFORM == "cpu")


def check_the_version_is_supported_and_others_are_refused() -> None:
    import vllm

    from vllm_rc_backend.compat import UnsupportedError, check_version

    check_version()
    real = vllm.__version__
    try:
        for version in ("0.25.1", "0.34.0", "1.0.0"):
            vllm.__version__ = version
            with pytest.raises(UnsupportedError, match=rf"{re.escape(version)} is not supported.*>=0\.26\.0"):
                check_version()
        for version in ("0.26.1", "0.33.0+cu130", "0.33.1.dev5+gabcdef"):
            vllm.__version__ = version
            check_version()
    finally:
        vllm.__version__ = real


def check_register_is_idempotent() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_rc_backend.plugin import register

    member = register()
    before = list(AttentionBackendEnum), type(current_platform).get_attn_backend_cls
    assert register() is member
    assert (list(AttentionBackendEnum), type(current_platform).get_attn_backend_cls) == before
    assert AttentionBackendEnum["RC_TOPK"] is member
    assert AttentionBackendEnum.RC_TOPK is member
    assert [m for m in AttentionBackendEnum if m.name == "RC_TOPK"] == [member]
    assert member.get_path() == "vllm_rc_backend.backend.RCTopKBackend"


def check_the_entry_point_obeys_vllm_plugins_and_leaves_other_backends_alone() -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); load_general_plugins(); import json;"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
        "print(json.dumps({m.name: m.value for m in E}))"
    )
    gpu = "fake_gpu," if PLATFORM == "cuda" else ""
    with_it = json.loads(in_fresh_interpreter(code, VLLM_PLUGINS=gpu + "rc_topk"))
    without = json.loads(in_fresh_interpreter(code, VLLM_PLUGINS=gpu + "another"))
    assert "RC_TOPK" not in without
    assert with_it == without | {"RC_TOPK": with_it["RC_TOPK"]}


def check_the_command_line_takes_the_flag() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    lines = {
        "name": ["--attention-backend", "rc_topk"],
        "capitals": ["--attention-backend", "RC_TOPK"],
        "dotted": ["--attention-config.backend", "rc_topk"],
    }
    for spelling, flags in lines.items():
        arguments = parser.parse_args(["--model", MODEL, *flags, "--additional-config.rc_topk.budget", "256"])
        engine = EngineArgs.from_cli_args(arguments)
        assert engine.additional_config == OPTIONS, engine.additional_config
        chosen = engine.attention_config.backend if spelling == "dotted" else engine.attention_backend
        assert chosen in (AttentionBackendEnum["RC_TOPK"], flags[1]), (spelling, chosen)


def check_the_configuration_parses_the_name() -> None:
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum["RC_TOPK"]
    assert AttentionConfig(backend="rc_topk").backend is member
    assert AttentionConfig(backend=member).backend is member
    assert engine_config().attention_config.backend is member
    assert engine_config().additional_config == OPTIONS


def check_pickles_into_a_fresh_interpreter() -> None:
    """Before plugins are loaded there: as in spawned workers (pickle) and Ray actors (cloudpickle)."""
    import cloudpickle

    code = (
        "import pickle, sys; config = pickle.load(sys.stdin.buffer);"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
        "member = config.attention_config.backend; assert member is E['RC_TOPK'];"
        "print(member.name, config.additional_config['rc_topk']['budget'])"
    )
    for library in (pickle, cloudpickle):
        assert in_fresh_interpreter(code, library.dumps(engine_config())) == "RC_TOPK 256"


def check_copies_are_the_same_member() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum["RC_TOPK"]
    assert copy.copy(member) is member
    assert copy.deepcopy(engine_config().attention_config).backend is member
    assert pickle.loads(pickle.dumps(member)) is member


def check_crosses_spawn_and_fork() -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for method in ("spawn", "fork"):
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # raises where a Pool would wait for ever
            name, value = pool.submit(name_and_value, AttentionBackendEnum["RC_TOPK"]).result()
        assert (name, value) == ("RC_TOPK", AttentionBackendEnum["RC_TOPK"].value)


def name_and_value(member: Any) -> tuple[str, str]:
    """Runs in the child process."""
    return member.name, member.value


def check_vllm_chooses_the_backend() -> None:
    for layer in layers().values():
        assert layer.attn_backend is backend()
        assert layer.attn_backend.get_name() == "RC_TOPK"
        assert isinstance(layer.impl, backend().get_impl_cls())


def check_overrides_accept_what_vllm_passes() -> None:
    """Every method that overrides one of this vLLM's takes all its parameters, and requires no other."""
    compared = 0
    for final in (backend(), backend().get_builder_cls(), backend().get_impl_cls()):
        for cls in final.__mro__:
            if not cls.__module__.startswith("vllm_rc_backend"):
                continue
            for name, attribute in vars(cls).items():
                theirs = next(
                    (
                        vars(c)[name]
                        for c in final.__mro__
                        if c.__module__.startswith("vllm.") and name in vars(c)
                    ),
                    None,
                )
                if theirs is None or not callable(getattr(final, name)) or isinstance(attribute, type):
                    continue
                accepts(unwrapped(attribute), unwrapped(theirs), f"{cls.__name__}.{name}")
                compared += 1
    assert compared > 15, compared


def unwrapped(attribute: Any) -> Callable[..., Any]:
    """The function of a class or static method."""
    return getattr(attribute, "__func__", attribute)


def accepts(ours: Callable[..., Any], theirs: Callable[..., Any], name: str) -> None:
    """Raise unless ``ours`` can be called wherever ``theirs`` is."""
    mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    variadic = any(p.kind is p.VAR_KEYWORD for p in mine.values())
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [p for p, value in other.items() if p not in mine and value.kind not in kinds]
    assert variadic or not missing, f"{name} lacks {missing}"
    required = [p for p, v in mine.items() if v.default is v.empty and v.kind not in kinds and p not in other]
    anything = any(p.kind in kinds for p in other.values())
    assert anything or not required, f"{name} requires {required}"


def check_a_valid_configuration_has_no_reasons_against_it() -> None:
    reasons = reasons_against()
    assert reasons == [], reasons


def check_refusals_name_their_reason() -> None:
    for change in (
        {"use_mla": True},
        {"has_sink": True},
        {"attn_type": "encoder_only"},
        {"attn_type": "encoder_decoder"},
        {"head_size": 100},
        {"use_kv_connector": True},
        {"kv_cache_dtype": "int4"},
    ):
        assert reasons_against(**change), change


def reasons_against(**change: Any) -> list[str]:
    """What vLLM's own check says about a layer of this backend."""
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    block_size = 16 if PLATFORM == "cuda" else 128
    values = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": block_size}
    selector = AttentionSelectorConfig(**{**values, **change})
    capability = current_platform.get_device_capability() if PLATFORM == "cuda" else None
    return backend().validate_configuration(device_capability=capability, **selector._asdict())


def check_unsafe_features_are_refused() -> None:
    """Each by the field that this vLLM has for it: a renamed field fails here instead of passing silently."""
    from vllm_rc_backend.compat import UnsupportedError, check_engine

    config = engine_config()
    check_engine(config)
    connector = type("Transfer", (), {"kv_connector": "SomeConnector"})()
    for section, name, value, flag in (
        (config, "speculative_config", object(), "--speculative-config"),
        (config, "kv_transfer_config", connector, "--kv-transfer-config"),
        (config.parallel_config, "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        (config.parallel_config, "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        (config.parallel_config, "enable_dbo", True, "--enable-dbo"),
        (config.cache_config, "kv_offloading_size", 1.0, "--kv-offloading-size"),
        (config.cache_config, "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        (config.cache_config, "prefix_match_unit", 16, "--prefix-match-unit"),
    ):
        with changed(section, name, value), pytest.raises(UnsupportedError, match=flag):
            check_engine(config)


@contextlib.contextmanager
def changed(section: Any, name: str, value: Any) -> Iterator[None]:
    """Set a field that exists, past pydantic's validation, for a while."""
    before = getattr(section, name)
    object.__setattr__(section, name, value)
    try:
        yield
    finally:
        object.__setattr__(section, name, before)


def plan(memory: int) -> Any:
    """vLLM's own plan of a KV pool of this many bytes, for layers of this backend."""
    try:
        from vllm.v1.core import kv_cache_planning as planning  # 0.33
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planning

    config = engine_config()
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers().items()}
    with contextlib.suppress(ImportError):  # 0.32: one layout for the whole model
        from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout

        names = [layout.name for layout in get_supported_kv_cache_layouts([backend()])]
        resolve_kv_cache_layout(config, [names], list(specs.values()))
    groups = planning.get_kv_cache_groups(config, specs)
    arguments = {
        "vllm_config": config,
        "kv_cache_specs": [specs],
        "available_memory": [memory],
        "global_kv_cache_groups": groups,
    }
    wanted = inspect.signature(planning.get_kv_cache_configs).parameters
    (found,) = planning.get_kv_cache_configs(**{k: v for k, v in arguments.items() if k in wanted})
    return found


def check_kv_cache_planning() -> None:
    """The pool has the block size and the bytes that the side store assumes."""
    from vllm_rc_backend import compat

    config, memory = engine_config(), 2**28
    planned = plan(memory)
    assert sorted(planned.kv_cache_groups[0].layer_names) == sorted(layers())
    block_size = planned.kv_cache_groups[0].kv_cache_spec.block_size
    assert block_size == config.cache_config.block_size
    assert block_size % 16 == 0, "pages of 16 tokens divide the block"
    block_bytes = compat.pool_block_bytes(config)
    assert block_bytes == 2 * block_size * 2 * 64 * 2 * 2  # layers, tokens, heads, head size, K and V, bytes
    assert planned.num_blocks == memory // block_bytes


def check_the_pool_never_outgrows_the_side_store() -> None:
    """The reservation covers every pool that vLLM can plan afterwards, and hardly more than the largest."""
    from vllm_rc_backend import compat

    config, total = engine_config(), 2**30 + 12_345
    for utilization, weights, side, activations in itertools.product(
        (0.3, 0.9, 0.917), (0, 60_000_001), (544, 4352), (0, 5_000_000)
    ):
        with changed(config.cache_config, "gpu_memory_utilization", utilization):
            blocks = compat.pool_blocks_bound(config, side, weights, total)
        requested = math.ceil(total * utilization)  # as the worker's request_memory
        planned = plan(requested - weights - blocks * side - activations).num_blocks
        assert planned <= blocks, (utilization, weights, side, activations)
        if not activations:
            assert planned >= blocks - 2


def check_memory_is_counted_as_taken_only_if_vllm_will_find_it_taken() -> None:
    from vllm_rc_backend.layer import DeviceMemory

    def taken(allocated: int, free: int) -> int:
        # An engine that this process had before left 30 bytes behind.
        return DeviceMemory(30 + allocated, 100 - free, 200).taken_since(DeviceMemory(30, 100, 200))

    assert taken(allocated=20, free=20) == 20
    assert taken(allocated=20, free=25) == 20, "the device gave larger segments than the tensors in them"
    assert taken(allocated=20, free=5) == 5, "tensors went where the former engine had left room"
    assert taken(allocated=-10, free=-10) == 0, "the former engine's tensors went meanwhile"


def import_without_a_gpu() -> None:
    """Stand in for a module that the worker imports and that builds Triton kernels then, which needs a GPU."""
    from types import ModuleType

    scan = ModuleType("vllm.model_executor.layers.mamba.ops.ssd_chunk_scan")
    scan._chunk_scan_fwd = None  # type: ignore[attr-defined]
    sys.modules.setdefault(scan.__name__, scan)


def check_the_pool_alone_is_allocated_where_it_is_told_to() -> None:
    """What kv_residency=host relies on: one place through which vLLM allocates its KV pool and nothing else."""
    from types import SimpleNamespace

    import torch

    import_without_a_gpu()
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu import attn_utils

    from vllm_rc_backend import compat

    entered = []

    @contextlib.contextmanager
    def place() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    def allocate() -> None:
        if hasattr(attn_utils, "_allocate_kv_cache"):
            nothing = SimpleNamespace(kv_cache_tensors=[], kv_cache_groups=[])
            attn_utils._allocate_kv_cache(nothing, {}, torch.device("cpu"))
            return
        model = SimpleNamespace(enable_cumem_allocator=False, enable_sleep_mode=False)
        worker = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
        for tag in ("weights", "runtime", "kv_cache"):
            with gpu_worker.Worker._maybe_get_memory_pool_context(worker, tag=tag):
                assert entered != ["in"] or tag == "kv_cache"
        source = inspect.getsource(gpu_worker.Worker.initialize_from_config)
        assert 'mem_pool_context = self._maybe_get_memory_pool_context(tag="kv_cache")' in source
        assert "kv_cache_allocation_context=mem_pool_context" in source

    compat.allocate_pool_inside(None)
    allocate()
    assert entered == []
    compat.allocate_pool_inside(place)
    allocate()
    assert entered == ["in", "out"]
    allocate()
    assert entered == ["in", "out"], "the next engine's pool is where vLLM places it"


def check_the_pools_size_may_be_given() -> None:
    from vllm_rc_backend.compat import UnsupportedError, own_pool_bytes

    config = engine_config()
    cache = config.cache_config
    with changed(cache, "kv_cache_memory_bytes", None):
        own_pool_bytes(config, 1 << 28)
        assert cache.kv_cache_memory_bytes == 1 << 28
    assert config.parallel_config.local_world_size == 1
    for section, name, value, flag in (
        (cache, "kv_cache_memory_bytes", 1 << 28, "--kv-cache-memory-bytes"),
        (cache, "num_gpu_blocks_override", 7, "--num-gpu-blocks-override"),
        (config.model_config, "enable_cumem_allocator", True, "--enable-sleep-mode"),
    ):
        with changed(section, name, value), pytest.raises(UnsupportedError, match=flag):
            own_pool_bytes(config, 1 << 28)


def check_what_older_runners_leave_is_mended() -> None:
    from types import SimpleNamespace

    import torch

    from vllm_rc_backend.compat import mend_older_runners

    import_without_a_gpu()
    from vllm.v1.worker.gpu.block_table import BlockTables

    mend_older_runners()
    mend_older_runners()
    tables = SimpleNamespace(input_block_tables=[torch.full((4, 3), 7)], _num_dirty_rows=0)
    (rows,) = BlockTables.get_dummy_block_tables(tables, 2)
    assert rows.shape == (2, 3)
    assert not rows.any()

    from vllm.v1.worker.gpu_model_runner import Attention, GPUModelRunner

    if hasattr(GPUModelRunner, "init_fp8_kv_scales"):
        layer = Attention.__new__(Attention)
        torch.nn.Module.__init__(layer)
        layer._k_scale, layer._v_scale = torch.zeros(1), torch.zeros(1)
        layer._k_scale_float, layer._v_scale_float = 0.25, 0.5
        runner = SimpleNamespace(
            cache_config=SimpleNamespace(cache_dtype="fp8"),
            compilation_config=SimpleNamespace(static_forward_context={"a": layer, "state": object()}),
        )
        GPUModelRunner.init_fp8_kv_scales(runner)
        assert (float(layer._k_scale), float(layer._v_scale)) == (0.25, 0.5)


def check_layers_are_found() -> None:
    from vllm_rc_backend import compat

    names = list(layers())
    assert list(compat.attention_layers(engine_config())) == names
    assert [compat.layer_index(name) for name in names] == [0, 1]


def check_the_models_are_known_and_keep_their_state_as_vllm_expects() -> None:
    """What vLLM asks of a hybrid model before and after it makes the layers, and what the memory asks of vLLM."""
    import dataclasses

    import torch
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig, set_current_vllm_config
    from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadata

    from vllm_rc_backend.models import MODELS
    from vllm_rc_backend.models.memory import DecayingMemory
    from vllm_rc_backend.models.rat_plus import RATPlusAttention, RATPlusForCausalLM

    assert set(MODELS) <= set(ModelRegistry.get_supported_archs())
    assert RATPlusForCausalLM.is_hybrid
    assert RATPlusForCausalLM.has_inner_state
    assert len(RATPlusForCausalLM.get_mamba_state_copy_func()) == 1
    accepts(RATPlusAttention.__init__, RATPlusAttention.__mro__[1].__init__, "RATPlusAttention")

    config = copy.copy(engine_config())
    config.cache_config, config.compilation_config = copy.copy(config.cache_config), CompilationConfig()
    config.cache_config.mamba_block_size = 16
    with set_current_vllm_config(config):
        memory = DecayingMemory(128, "model.layers.0.self_attn.memory")
    spec = memory.get_kv_cache_spec(config)
    assert spec.shapes == RATPlusForCausalLM.get_mamba_state_shape_from_config(config) == ((2, 128),)
    assert spec.dtypes == RATPlusForCausalLM.get_mamba_state_dtype_from_config(config) == (torch.float32,)

    assert memory.get_attn_backend().get_builder_cls().metadata_cls is ShortConvAttentionMetadata
    fields = {field.name for field in dataclasses.fields(ShortConvAttentionMetadata)}
    assert fields >= {"num_decode_tokens", "num_prefills", "num_prefill_tokens", "query_start_loc_p"}
    assert fields >= {"state_indices_tensor_d", "state_indices_tensor_p", "has_initial_states_p"}
    arguments = [argument.name for argument in torch.ops.vllm.short_conv.default._schema.arguments]
    assert arguments == ["hidden_states", "output", "layer_name"]
    assert "vllm::short_conv" in CompilationConfig._attention_ops


def check_requests_are_logged() -> None:
    from types import SimpleNamespace

    from vllm.v1.metrics import stats
    from vllm.v1.metrics.loggers import StatLoggerBase

    from vllm_rc_backend.compat import uses_rc_topk
    from vllm_rc_backend.plugin import backend_member
    from vllm_rc_backend.request_log import RequestLog

    names = {"request_id", "num_prompt_tokens", "num_generation_tokens"}
    assert names <= {f.name for f in dataclasses.fields(stats.FinishedRequestStats)}
    assert issubclass(RequestLog, StatLoggerBase)
    config = copy.copy(engine_config())
    assert uses_rc_topk(config)
    with changed(config.attention_config, "backend", None):
        assert not uses_rc_topk(config)
        with changed(config.attention_config, "backend_per_kind", {"full_attention": backend_member()}):
            assert uses_rc_topk(config)
    assert RequestLog(config).layout is None
    config.additional_config = {"rc_topk": {"budget": 256, "log_requests": True}}
    log = RequestLog(config)
    assert log.layout is not None
    assert log.layout.head_size == config.model_config.get_head_size()
    request = SimpleNamespace(request_id="a", num_prompt_tokens=1000, num_generation_tokens=5)
    log.record(None, SimpleNamespace(finished_requests=[request]), None, 0)
    log.writer.shutdown()
    log.log_engine_initialized()


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


def main() -> None:
    """Run all checks."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
