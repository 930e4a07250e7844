"""``rc-topk bench --end-to-end``: whole-engine decode and prefill times, ours beside vLLM's FlashAttention.

Dummy weights in the shape of Llama-3.1-8B. Each backend runs in a process of its own, one after the other on the same
machine. The time per output token is the slope between two output lengths over prompts whose prefix is cached, so that
prefill, sampling set-up and tokenisation drop out; the time of the first, uncached pass is the prefill time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_rc_backend.evaluation.child import run_child

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
BACKENDS = ("FLASH_ATTN", "RC_TOPK")
SHORT, LONG = 16, 80
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


def measure(
    backend: str, loads: list[Load], options: dict[str, Any], utilization: float, repeats: int
) -> Any:
    """Run all loads on one backend in this process. Times in milliseconds."""
    from vllm import LLM, SamplingParams

    longest = max(load.context for load in loads) + LONG + 64
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend=backend,
            additional_config={"rc_topk": options} if backend == "RC_TOPK" else {},
            max_model_len=longest,
            max_num_seqs=max(load.batch for load in loads),
            gpu_memory_utilization=utilization,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
    rows = []
    for load in loads:
        rng = random.Random(load.context)
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, 100_000) for _ in range(load.context)]}
            for _ in range(load.batch)
        ]

        def run(tokens: int, prompts: Any = prompts) -> float:
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - start

        prefill = run(1)
        run(LONG)  # caches the generated tokens' blocks, too
        slopes = [(run(LONG) - run(SHORT)) / (LONG - SHORT) * 1e3 for _ in range(repeats)]
        rows.append(
            {
                "context": load.context,
                "batch": load.batch,
                "prefill_ms": prefill * 1e3,
                "token_ms": statistics.median(slopes),
                "token_ms_spread": max(slopes) - min(slopes),
            }
        )
        print(json.dumps({"backend": backend, **rows[-1]}), file=sys.stderr, flush=True)
        llm.reset_prefix_cache()
    cache = llm.llm_engine.vllm_config.cache_config
    return {"rows": rows, "kv_tokens": cache.num_gpu_blocks * cache.block_size}


def compare(
    loads: list[Load], options: dict[str, Any], utilization: float, repeats: int
) -> list[dict[str, Any]]:
    """Run every backend in a process of its own and join their rows."""
    found = {}
    for backend in BACKENDS:
        arguments = ["--backend", backend, "--options", json.dumps(options)]
        arguments += ["--gpu-memory-utilization", str(utilization), "--repeats", str(repeats)]
        arguments += ["--loads", *(f"{load.context}x{load.batch}" for load in loads)]
        found[backend] = run_child(__name__, arguments)
    dense, ours = (found[backend] for backend in BACKENDS)
    return [
        asdict(load)
        | {
            "dense_token_ms": d["token_ms"],
            "rc_topk_token_ms": o["token_ms"],
            "ratio": d["token_ms"] / o["token_ms"],
            "spread_ms": max(d["token_ms_spread"], o["token_ms_spread"]),
            "dense_prefill_ms": d["prefill_ms"],
            "rc_topk_prefill_ms": o["prefill_ms"],
            "prefill_ratio": o["prefill_ms"] / d["prefill_ms"],
            "dense_kv_tokens": dense["kv_tokens"],
            "rc_topk_kv_tokens": ours["kv_tokens"],
        }
        for load, d, o in zip(loads, dense["rows"], ours["rows"], strict=True)
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of ``compare``'s rows."""
    lines = [
        "| context x sequences | dense, ms per token | rc_topk, ms per token | ratio | prefill, rc_topk / dense |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['context']} x {r['batch']} | {r['dense_token_ms']:.2f} | {r['rc_topk_token_ms']:.2f} | "
        f"{r['ratio']:.2f} | {r['prefill_ratio']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """One backend, for ``compare``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--loads", nargs="+", type=Load.parse, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, required=True, help="the file for what was found, as JSON")
    args = parser.parse_args()
    found = measure(args.backend, args.loads, args.options, args.gpu_memory_utilization, args.repeats)
    args.write.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
