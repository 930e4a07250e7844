"""How often a page cache has what decoding reads, by its size: the example model's own queries, in vLLM on a CPU.

The pages that each layer asks for are recorded once, then replayed through page caches of several sizes. Text is this
interpreter's own library; nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "model"


def prompts(count: int, length: int) -> list[dict[str, list[int]]]:
    """Passages of Python source, BOS included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    tokens = tokenizer("".join(f.read_text() for f in files), add_special_tokens=False)["input_ids"]
    starts = random.Random(0).sample(range(len(tokens) - length), count)
    return [{"prompt_token_ids": [0, *tokens[start : start + length - 1]]} for start in starts]


def record(count: int, length: int, steps: int, budget: int) -> tuple[dict[int, list[Any]], int]:
    """What each layer's cache is asked for, in order, and pages of a KV head that one step of one layer reads."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    from vllm_rc_backend.kernels.reference import PageCache

    asked: dict[int, list[Any]] = {}
    request, truncate = PageCache.request, PageCache.truncate

    def record_request(self: PageCache, page_ids: torch.Tensor, tokens: torch.Tensor) -> Any:
        asked.setdefault(id(self), []).append((page_ids.clone(), tokens.clone()))
        return request(self, page_ids, tokens)

    def record_truncate(self: PageCache, page_ids: torch.Tensor, tokens: torch.Tensor) -> None:
        asked.setdefault(id(self), []).append((page_ids.clone(), tokens.clone(), None))
        truncate(self, page_ids, tokens)

    PageCache.request, PageCache.truncate = record_request, record_truncate  # type: ignore[method-assign]
    options = {"budget": budget, "kv_residency": "host", "host_kv_gib": 1.0, "page_cache_gib": 0}
    llm = vllm.LLM(
        str(MODEL),
        attention_backend="rc_topk",
        additional_config={"rc_topk": options},
        max_model_len=length + steps + 1,
        max_num_seqs=count,
        gpu_memory_utilization=0.1,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    llm.generate(prompts(count, length), sampling)
    PageCache.request, PageCache.truncate = request, truncate  # type: ignore[method-assign]
    decoded = sum(p.numel() for p, *rest in next(iter(asked.values())) if len(rest) == 1)
    return asked, decoded // (steps - 1)


def replay(asked: dict[int, list[Any]], slots: int) -> tuple[float, float]:
    """Share of the pages found, and tokens of a KV head fetched per page wanted, over all layers."""
    from vllm_rc_backend.kernels.reference import PageCache

    wanted = hits = fetched = 0
    for events in asked.values():
        heads = max(event[0].shape[0] for event in events if len(event) == 2)
        pages = 1 + max(int(event[0].max()) for event in events if event[0].numel())
        cache = PageCache.empty(pages, heads, slots, 16, 0, torch.float32)
        for page_ids, tokens, *end in events:
            if end:
                cache.truncate(page_ids, tokens)
            else:
                cache.request(page_ids, tokens)
        wanted += cache.traffic.wanted
        hits += cache.traffic.hits
        fetched += cache.traffic.tokens_fetched
    return hits / wanted, fetched / wanted


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=65)
    parser.add_argument("--budget", type=int, default=512)
    args = parser.parse_args()
    asked, step = record(args.sequences, args.context, args.steps, args.budget)
    everything = args.sequences * args.context // 16 * 2
    print(f"pages that a step reads, per layer: {step}; pages of all contexts: {everything}")
    print("| slots / pages of a step | slots / pages of all contexts | found | fetched, of what is read |")
    print("|---|---|---|---|")
    for factor in (0, 0.5, 1, 1.5, 2, 3, 4, 8):
        slots = int(factor * step)
        found, fetched = replay(asked, slots)
        print(
            f"| {factor} | {100 * slots / everything:.0f} % | {100 * found:.1f} % | {100 * fetched / 16:.1f} % |"
        )


if __name__ == "__main__":
    main()
