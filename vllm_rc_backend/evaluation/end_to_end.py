"""``python -m vllm_rc_backend.evaluation.end_to_end``: whole-engine times, ours beside vLLM's FlashAttention.

Dummy weights in the shape of Llama-3.1-8B. Each backend runs in a process of its own, one after the other on the same
machine. The time per output token is the slope between two output lengths over prompts whose prefix is cached, so that
prefill, sampling set-up and tokenisation drop out. The prefill time is the median of several passes of one token with
an empty prefix cache, after one that is not timed: whatever is compiled or tuned at first use is in that.

On a machine with two GPUs each backend can have its own: run both with --backend, then --join what they wrote.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_rc_backend.evaluation.child import run_child
from vllm_rc_backend.evaluation.environment import command_line, environment, update_results

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1048576,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MODULE = "vllm_rc_backend.evaluation.end_to_end"
BACKENDS = ("FLASH_ATTN", "RC_TOPK")
SHORT, LONG = 16, 272
"""Output lengths whose difference gives the time per token."""


@dataclass(frozen=True)
class Load:
    """So many sequences of one context length, decoding together."""

    context: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Load:
        """``131072x6``."""
        context, batch = text.split("x")
        return cls(int(context), int(batch))


DEFAULT_LOADS = (Load(4096, 64), Load(32768, 24), Load(131072, 6))


@dataclass(frozen=True)
class Run:
    """What is the same for both backends.

    Attributes:
        loads: in this order.
        options: ours.
        layers: of the model; fewer than 32 leave the share of attention in a layer as it is.
        utilization: vLLM's ``gpu_memory_utilization``.
        repeats: slopes of each load.
        prefills: timed passes over the uncached prompts of each load.
        skip_attention: leave out the attention of prompts, see ``leave_out_attention_of_prompts``.
    """

    loads: list[Load]
    options: dict[str, Any]
    layers: int
    utilization: float
    repeats: int
    prefills: int
    skip_attention: bool


def leave_out_attention_of_prompts() -> None:
    """In this process and those it forks, for decode times at lengths whose prompts would take minutes: the KV cache is
    filled as ever.

    With dummy weights what a prompt's layers make of it does not matter, and attention is nearly all of its time.
    """
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    attention = FlashAttentionImpl.forward

    def forward(*call: Any, **named: Any) -> Any:
        metadata, output = (*call, named.get("output"))[6:8]  # after self, layer, query, key, value and cache
        if metadata is not None and metadata.max_query_len > 1:
            return output.zero_()
        return attention(*call, **named)

    FlashAttentionImpl.forward = forward


def empty_prefix_cache(llm: Any) -> None:
    """Wait until the blocks of the last requests are free, and forget what is in them.

    Raises:
        RuntimeError: they are not free after five seconds.
    """
    for _ in range(100):
        if llm.reset_prefix_cache():
            return
        time.sleep(0.05)
    raise RuntimeError("vLLM did not empty its prefix cache within 5 s, so that no prefill can be timed")


def measure(backend: str, run: Run) -> Any:
    """Run all loads on one backend in this process. Times in milliseconds, spreads from the least to the greatest."""
    if run.skip_attention:
        leave_out_attention_of_prompts()
    from vllm import LLM, SamplingParams

    longest = max(load.context for load in run.loads) + LONG + 64
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": run.layers}))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend=backend,
            additional_config={"rc_topk": run.options} if backend == "RC_TOPK" else {},
            max_model_len=longest,
            max_num_seqs=max(load.batch for load in run.loads),
            gpu_memory_utilization=run.utilization,
            compilation_config={"cudagraph_capture_sizes": sorted({load.batch for load in run.loads})},
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
    rows = []
    for load in run.loads:
        rng = random.Random(load.context)
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, 100_000) for _ in range(load.context)]}
            for _ in range(load.batch)
        ]

        def seconds(tokens: int, cached: bool = True, prompts: Any = prompts) -> float:
            if not cached:
                empty_prefix_cache(llm)
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - start

        seconds(1, cached=False)
        prefills = [seconds(1, cached=False) * 1e3 for _ in range(run.prefills)]
        seconds(LONG)  # caches the generated tokens' blocks, too
        slopes = [(seconds(LONG) - seconds(SHORT)) / (LONG - SHORT) * 1e3 for _ in range(run.repeats)]
        rows.append(
            {
                "context": load.context,
                "batch": load.batch,
                "prefill_ms": statistics.median(prefills) if prefills else None,
                "prefill_ms_spread": max(prefills) - min(prefills) if prefills else None,
                "token_ms": statistics.median(slopes),
                "token_ms_spread": max(slopes) - min(slopes),
            }
        )
        print(json.dumps({"backend": backend, **rows[-1]}), file=sys.stderr, flush=True)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "backend": backend,
        "rows": rows,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "layers": run.layers,
        "options": run.options,
        "environment": environment(
            torch.device("cuda", 0), command_line(f"python -m {MODULE}", sys.argv[1:])
        ),
    }


def compare(run: Run) -> list[dict[str, Any]]:
    """Run every backend in a process of its own and join their rows."""
    found = {}
    for backend in BACKENDS:
        arguments = ["--backend", backend, "--options", json.dumps(run.options)]
        arguments += ["--gpu-memory-utilization", str(run.utilization), "--layers", str(run.layers)]
        arguments += ["--repeats", str(run.repeats), "--prefills", str(run.prefills)]
        arguments += ["--skip-attention-of-prompts"] if run.skip_attention else []
        arguments += ["--loads", *(f"{load.context}x{load.batch}" for load in run.loads)]
        found[backend] = run_child(MODULE, arguments)
    return join(*found.values())


def join(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each load from what ``measure`` has found on either backend, in either order.

    A load of which one backend has no time above zero has none: the shorter answers took longer, so that something else
    than their tokens was timed. It is named on stderr.

    Raises:
        ValueError: they are not of both backends, or of other loads or models.
    """
    found = {measured["backend"]: measured for measured in (one, other)}
    if set(found) != set(BACKENDS):
        raise ValueError(f"both are of {one['backend']}: one of {' and one of '.join(BACKENDS)} is needed")
    dense, ours = (found[backend] for backend in BACKENDS)
    loads = [
        [f"{row['context']}x{row['batch']} of {measured['layers']} layers" for row in measured["rows"]]
        for measured in (dense, ours)
    ]
    if loads[0] != loads[1]:
        raise ValueError(f"of other loads: {', '.join(loads[0])} and {', '.join(loads[1])}")
    rows = []
    for d, o in zip(dense["rows"], ours["rows"], strict=True):
        if min(d["token_ms"], o["token_ms"]) <= 0:
            print(
                f"{d['context']}x{d['batch']} is left out: {d['token_ms']:.2f} and {o['token_ms']:.2f} ms a token "
                "are no times. Look for compilations or other work in the log, and measure it again.",
                file=sys.stderr,
            )
            continue
        prefilled = None not in (d["prefill_ms"], o["prefill_ms"])
        rows.append(
            {
                "context": d["context"],
                "batch": d["batch"],
                "layers": ours["layers"],
                "dense_token_ms": d["token_ms"],
                "rc_topk_token_ms": o["token_ms"],
                "ratio": d["token_ms"] / o["token_ms"],
                "spread_ms": max(d["token_ms_spread"], o["token_ms_spread"]),
                "dense_prefill_ms": d["prefill_ms"],
                "rc_topk_prefill_ms": o["prefill_ms"],
                "prefill_ratio": o["prefill_ms"] / d["prefill_ms"] if prefilled else None,
                "prefill_spread_ms": max(d["prefill_ms_spread"], o["prefill_ms_spread"])
                if prefilled
                else None,
                "dense_kv_tokens": dense["kv_tokens"],
                "rc_topk_kv_tokens": ours["kv_tokens"],
                "options": ours["options"],
                "environment": ours["environment"],
            }
        )
    return rows


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a results file, in place of those of the same load and model that it has."""
    held = json.loads(path.read_text()).get("end_to_end", []) if path.exists() else []

    def load(row: dict[str, Any]) -> tuple[int, ...]:
        return row["layers"], row["context"], row["batch"]

    new = {load(row) for row in rows}
    update_results(path, end_to_end=[row for row in held if load(row) not in new] + rows)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of ``compare``'s rows."""
    lines = [
        "| context x sequences | dense, ms per token | rc_topk, ms per token | ratio | dense prefill, ms "
        "| rc_topk prefill, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        prefill = "- | - | -"
        if r["prefill_ratio"] is not None:
            prefill = f"{r['dense_prefill_ms']:.0f} | {r['rc_topk_prefill_ms']:.0f} ± "
            prefill += f"{r['prefill_spread_ms']:.0f} | {r['prefill_ratio']:.3f}"
        lines.append(
            f"| {r['context']} x {r['batch']} | {r['dense_token_ms']:.2f} | {r['rc_topk_token_ms']:.2f} | "
            f"{r['ratio']:.2f} | {prefill} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Both backends, one of them, or what was found of either."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--backend", choices=BACKENDS, help="one of them, in this process; default: both")
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=list(DEFAULT_LOADS))
    parser.add_argument("--options", type=json.loads, default={}, help="of rc_topk, as JSON")
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefills", type=int, default=5, help="timed; 0 to time decoding alone")
    parser.add_argument(
        "--skip-attention-of-prompts",
        action="store_true",
        help="for decode times at very long contexts: prompts take seconds then, and mean nothing (with --prefills 0)",
    )
    parser.add_argument("--write", type=Path, help="with --backend: the file for what was found, as JSON")
    source.add_argument(
        "--join",
        nargs=2,
        type=Path,
        metavar=("ONE", "OTHER"),
        help="measure nothing: what --backend FLASH_ATTN and --backend RC_TOPK wrote, in either order",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/results/performance.json"),
        help="the results file whose rows of these loads are replaced (default %(default)s)",
    )
    args = parser.parse_args()
    if bool(args.backend) != bool(args.write):
        parser.error("--backend and --write go together: one backend's figures go into a file of their own")
    if args.skip_attention_of_prompts and args.prefills:
        parser.error("--skip-attention-of-prompts leaves nothing to time of a prefill: add --prefills 0")
    run = Run(
        loads=args.loads,
        options=args.options,
        layers=args.layers,
        utilization=args.gpu_memory_utilization,
        repeats=args.repeats,
        prefills=args.prefills,
        skip_attention=args.skip_attention_of_prompts,
    )
    if args.backend:
        args.write.write_text(json.dumps(measure(args.backend, run), indent=1))
        return
    if args.join:
        try:
            rows = join(*(json.loads(path.read_text()) for path in args.join))
        except ValueError as error:
            parser.error(f"--join {' '.join(map(str, args.join))}: {error}")
    else:
        rows = compare(run)
    keep(args.output, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
