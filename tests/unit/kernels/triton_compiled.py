"""Run by test_triton.py: compile every kernel for Hopper without a GPU and print what each takes, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.unit.kernels.cases import RUNS, SHARE
from vllm_rc_backend import attention_triton, summaries_triton
from vllm_rc_backend.attention_triton import TritonAttention, Workspace, make_shape, most_features
from vllm_rc_backend.decaying_memory import BLOCK, TILE
from vllm_rc_backend.evaluation.kernel_check import Case
from vllm_rc_backend.host_kv import page_cache, staging
from vllm_rc_backend.host_kv.page_cache import DevicePages
from vllm_rc_backend.kernels.reference import SummaryTags
from vllm_rc_backend.kernels.triton.memory import linear_scan_kernel, remember_kernel
from vllm_rc_backend.side_store import SideStore
from vllm_rc_backend.summaries_triton import SummaryPlanner, SummaryUpdater

DEFAULT = {
    "heads": 8,
    "head_size": 128,
    "sink_tokens": 16,
    "tail_tokens": 64,
    "budget": 2048,
    "max_model_len": 131072,
}
VARIANTS = {
    "box": Case(**DEFAULT, statistics_bits=8),
    "default": Case(**DEFAULT, **RUNS, completion="paged"),
    "runs, fp8 cache": Case(**DEFAULT, **RUNS, completion="paged", kv_dtype=torch.float8_e4m3fn),
    "runs, head size 256, 16 query heads, a share": Case(
        **{**DEFAULT, "head_size": 256, "budget": 1 / 32}, **RUNS, completion="paged", group=16
    ),
    "runs, head size 256": Case(**{**DEFAULT, "head_size": 256}, **RUNS, completion="paged"),
    "page cache": Case(**DEFAULT, **RUNS, completion="paged", cache_slots=64),
    "selection only": Case(**DEFAULT, **RUNS, completion="none"),
    "share": Case(**DEFAULT, **SHARE, completion="paged"),
    "share, 16 query heads, short contexts": Case(
        **{**DEFAULT, "max_model_len": 32768}, **SHARE, completion="paged", group=16
    ),
    "share, 16 query heads, selection only": Case(**DEFAULT, **SHARE, completion="none", group=16),
    "share, features, page cache": Case(
        **DEFAULT, **SHARE, completion="features", features=128, cache_slots=64
    ),
    "features": Case(**DEFAULT, **RUNS, completion="features", features=128),
    "features, page cache": Case(**DEFAULT, **RUNS, completion="features", features=128, cache_slots=64),
    "the most features": Case(**DEFAULT, **RUNS, completion="features", features=most_features(128)),
    "the most features, head size 256, 16 query heads": Case(
        **{**DEFAULT, "head_size": 256},
        **RUNS,
        completion="features",
        features=most_features(256),
        group=16,
    ),
    "short contexts, head size 64": Case(
        **{**DEFAULT, "max_model_len": 32768, "head_size": 64}, **RUNS, completion="paged"
    ),
    "fp8 cache": Case(**DEFAULT, kv_dtype=torch.float8_e4m3fn, statistics_bits=8),
    "fp16, mean_var, head size 64": Case(
        **{**DEFAULT, "head_size": 64}, dtype=torch.float16, selection="mean_var", statistics_bits=8
    ),
    "head size 256, 16 query heads": Case(**{**DEFAULT, "head_size": 256}, group=16, statistics_bits=8),
}


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments and its launch options."""


class Recorder:
    """Stands in for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: object) -> Any:
        def record(*args: Any, **options: Any) -> None:
            self.launches.append((args, options))

        return record


def step_kernels() -> list[tuple[ModuleType, str]]:
    """Where the host finds the kernels of a step: modules and names in them."""
    modules = (attention_triton, summaries_triton, page_cache, staging)
    return [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]


def kernels_compiled() -> int:
    """Of all kernels of a step, in this process."""
    caches = [cache for at in step_kernels() for cache in getattr(*at).device_caches.values()]
    return sum(len(cache[0]) for cache in caches)


def launches(case: Case) -> Iterator[Launch]:
    """Every kernel with the arguments of a step of this case."""
    recorders = {at: Recorder(getattr(*at)) for at in step_kernels()}
    for at, recorder in recorders.items():
        setattr(*at, recorder)
    layout = case.layout
    shape = make_shape(layout, case.group, case.group_rule)
    work = Workspace(shape, 1, case.max_model_len, "cpu", case.statistics_bits)
    work.overlap = True
    attention = TritonAttention(SideStore(layout, 4, "cpu"), work, case.head_size**-0.5)
    kv_cache = torch.zeros(4, case.heads, case.page_size, 2 * case.head_size).to(case.kv_dtype or case.dtype)
    table, lengths, starts = (torch.zeros(n, dtype=torch.int32) for n in (16, 1, 2))
    query = torch.zeros(1, case.heads * case.group, case.head_size, dtype=case.dtype)
    planner = SummaryPlanner(layout.geometry, SummaryTags.empty(layout.slots, 4), 256)
    plan = planner.plan(table.view(1, -1), lengths, starts)
    attention.bind(kv_cache, 1.0, 1.0)
    if layout.slots:
        SummaryUpdater([attention]).update(table.view(1, -1), plan)
    attention.update_prefill(kv_cache, table.view(1, -1), lengths, starts, 64, plan)
    step = (query, kv_cache, table.view(1, -1), lengths, plan, query)
    attention.decode(*step)
    if work.joint(1) and case.cache_slots is None:  # both phases were one launch: each alone, too
        attention.launch(*step, attends=False)
        attention.launch(*step, scores=False)
        # The most rows for which they are: more programs on a multiprocessor, one for each (row, head).
        rows = max(rows for rows in range(1, 600) if work.joint(rows))
        attention.launch(*step[:3], lengths.expand(rows), *step[4:])
    if case.cache_slots is not None:
        sizes = case.heads, case.cache_slots, case.head_size, kv_cache.dtype
        pages = DevicePages(shape.geometry, 32, 4, *sizes, "cpu", 1, case.max_model_len)
        pages.begin_step(table.view(1, -1), lengths, starts, 1)
        attention.pages = pages.layers[0]
        attention.decode(*step)
        buffer = staging.Staging(shape.geometry, case.heads, case.head_size, kv_cache.dtype, "cpu", 1)
        buffer.copy(kv_cache, table.view(1, -1), lengths, starts, 0)
    for at, recorder in recorders.items():
        setattr(*at, recorder.kernel)
        yield from ((recorder.kernel, *launch) for launch in recorder.launches)


def memory_launches() -> Iterator[Launch]:
    """RAT+'s memory with 8 KV heads of 128: the scan of the training, a prefill, a decode."""
    channels = 8 * 128
    tiles = {"tile": TILE, "block": BLOCK}
    decay, total = torch.zeros(16, channels), torch.zeros(16, 2, channels)
    starts, known = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.bool)
    yield linear_scan_kernel, (decay, total, starts, total[:1], total, 2, channels), tiles
    packed, out = (torch.zeros(16, n * channels, dtype=torch.bfloat16) for n in (3, 2))
    arguments = (packed, out, total, starts, starts, known, 4 * channels, channels)
    yield remember_kernel, arguments, {**tiles, "prefill": True}
    yield remember_kernel, (*arguments[:4], None, None, *arguments[6:]), {**tiles, "prefill": False}


LINE = re.compile(
    r"^(\.L_\w+):|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);.*\n.*/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)
"""Of a disassembly a label, or an instruction, its operands, and the upper half of its code."""


def shortest_wait(disassembly: str) -> int | None:
    """In loops with products of integers: instructions from a load to the first that waits for its answer, at least.

    Few of them, and the loop waits for memory in each round. An instruction's code names the counter (of six) that says
    whether a load's answer is there, in bits 46 to 48 of its upper half, and in bits 52 to 57 those it waits for.
    """
    labels: dict[str, int] = {}
    code: list[tuple[str, int, int]] = []
    shortest = []
    for label, op, operands, upper in LINE.findall(disassembly):
        if label:
            labels[label] = len(code)
            continue
        code.append((op, int(upper, 16) >> 46 & 7, int(upper, 16) >> 52 & 63))
        target = re.search(r"\.L_\w+", operands) if op == "BRA" else None
        loop = code[labels.get(target.group(), len(code)) :] if target else []
        if not any(op.startswith(("IMMA", "IGMMA")) for op, _, _ in loop):
            continue
        for i, (op, counter, _) in enumerate(loop):
            if op.startswith("LDG."):
                after = loop[i + 1 :] + loop[: i + 1]
                shortest.append(next(n for n, (_, _, waits) in enumerate(after, 1) if waits >> counter & 1))
    return min(shortest, default=None)


def tool(name: str, *arguments: str) -> str:
    """What a tool that comes with Triton prints."""
    path = Path(nvidia.__path__[0]) / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(launch: Launch) -> dict[str, int | str | None]:
    """Compile and ask the binary."""
    kernel, args, options = launch
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    constants = {name: values[name] for name in names if kernel.params[names.index(name)].is_constexpr}
    constants |= {name: None for name in names if values[name] is None}
    aligned, signature = {}, {}
    for i, name in enumerate(names):
        value = values[name]
        signature[name] = "constexpr" if name in constants else triton.runtime.jit.mangle_type(value)
        specialised = type(value) is int and value % 16 == 0 and not kernel.params[i].do_not_specialize
        alignable = isinstance(value, torch.Tensor) and not kernel.params[i].do_not_specialize_on_alignment
        if name not in constants and (alignable or specialised):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    warps = {k: v for k, v in options.items() if k in ("num_warps", "num_stages", "maxnreg")}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        report = tool("cuobjdump", "-res-usage", file.name)
        disassembly = tool("nvdisasm", "-c", "-hex", file.name)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {
        "kernel": kernel.__name__,
        "scores": bool(options.get("SCORES")),
        "attends": bool(options.get("ATTENDS")),
        "runs": kernel.__name__ == "decode_kernel" and options["S"].query_map == "runs",
        "registers": int(found["REG"]),
        "local_bytes": int(found["LOCAL"]),
        "stack_bytes": int(found["STACK"]),
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "most_registers": options.get("maxnreg"),
        "shortest_wait": shortest_wait(disassembly),
    }


if __name__ == "__main__":
    found = [{"variant": name, **resources(r)} for name, case in VARIANTS.items() for r in launches(case)]
    found += [{"variant": "memory", **resources(launch)} for launch in memory_launches()]
    print(json.dumps(found, indent=1))
