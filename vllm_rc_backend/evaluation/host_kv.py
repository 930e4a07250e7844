"""``python -m vllm_rc_backend.evaluation.host_kv``: KV pages in host memory, beside what else serves the same load.

The load: so many chats of one length. In the first round each gets one token, which is prefill. In the later ones
all come back at once with a short question and are answered at length, their KV found where it was left. By whom:

* ``host``: rc_topk with the KV pages in host memory,
* ``gpu``: rc_topk with every page on the device,
* ``vllm``: vLLM's FlashAttention with its native offloading to the CPU, on as much of the device as ``host``,
* ``gather``: no engine; how fast pages come over the bus.

Dummy weights in the per-layer shape of Llama-3.1-8B and prompts of random tokens, or (``--model``) a trained model and
text: how often the page cache has what is read depends on them. Each runs in a process of its own; what is found is
written after each, so that a run that is cut short keeps what it had.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_rc_backend.evaluation.child import run_child
from vllm_rc_backend.evaluation.end_to_end import LLAMA_8B, Load
from vllm_rc_backend.evaluation.rounds import answer_all
from vllm_rc_backend.evaluation.text import Corpus
from vllm_rc_backend.host_kv import pool
from vllm_rc_backend.host_kv.memory import GIB
from vllm_rc_backend.host_kv.page_cache import COUNTERS, DevicePages
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.observability import meter
from vllm_rc_backend.observability.meter import Counts

CONTENDERS = ("gather", "host", "gpu", "vllm")
BUS = 55e9
"""Bytes a second of large copies from pinned memory to an H200 (PCIe 5, 16 lanes), measured."""

CHUNK = 16384
"""Tokens of a prefill step."""

HEADS, HEAD_SIZE = 8, 128
"""Of K and V in ``LLAMA_8B``."""

QUESTION = 16
"""Tokens that a chat comes back with."""

TIMES, WARM_UP = 20, 2
"""Launches that ``gather`` times, and before them."""


def make_engine(contender: str, args: argparse.Namespace) -> Any:
    """vLLM's ``LLM`` of a contender, in this process."""
    from vllm import LLM

    load, options = args.load, dict(args.options)
    config: dict[str, Any] = LLAMA_8B | {"num_hidden_layers": args.layers}
    if args.model is not None:
        config = json.loads((args.model / "config.json").read_text())
    longest = load.context + 1 + args.rounds * (QUESTION + args.tokens)
    token_bytes = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    needed = args.host_kv_gib or math.ceil(load.batch * longest * token_bytes / GIB) + 1
    if contender == "host":
        options |= {"kv_residency": "host", "host_kv_gib": needed}
        if args.page_cache_gib is not None:
            options["page_cache_gib"] = args.page_cache_gib
    own: dict[str, Any] = {"attention_backend": "RC_TOPK", "additional_config": {"rc_topk": options}}
    if contender == "gpu":
        own["kv_cache_memory_bytes"] = int(needed * GIB)
    elif contender == "vllm":
        own = {"attention_backend": "FLASH_ATTN", "kv_offloading_size": needed}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        return LLM(
            folder if args.model is None else str(args.model),
            load_format="dummy" if args.model is None else "auto",
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=load.batch,
            max_num_batched_tokens=CHUNK,
            gpu_memory_utilization=args.gpu_memory_utilization,
            compilation_config={"cudagraph_capture_sizes": [load.batch]},
            enable_prefix_caching=True,
            disable_log_stats=True,
            **own,
        )


def exactly(tokens: int) -> Any:
    """Sampling parameters of answers with so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def run_engine(contender: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start a contender and measure it."""
    # The engine runs as it is served, in a process of its own and with asynchronous scheduling. Figures of that process
    # are fetched by functions that it is sent.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    begun = time.perf_counter()
    llm = make_engine(contender, args)
    started = time.perf_counter() - begun
    load, rng = args.load, random.Random(args.load.context)
    corpus = None if args.model is None else Corpus.installed(args.model)[0]

    def draw(length: int) -> list[int]:
        if corpus is not None:
            return corpus.passage(length, rng)
        return [rng.randrange(1000, 100_000) for _ in range(length)]

    answer_all(llm, [draw(min(CHUNK + 2000, load.context))], exactly(8))  # compiles what the start has not
    with alone(args.lock):
        return measure(contender, llm, draw, args) | {"start_s": started}


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold a file's lock, so that contenders can start side by side and be measured one by one."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(
    contender: str, llm: Any, draw: Callable[[int], list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """All rounds. Times in milliseconds; lists have an entry a round.

    Args:
        draw: so many tokens that no prompt had before.
    """
    load = args.load
    prompts = [draw(load.context) for _ in range(load.batch)]
    prefill = last = answer_all(llm, prompts, exactly(1))
    before: list[Counts] = []
    rounds, traffic = [], []
    for _ in range(args.rounds):
        prompts = [[*p, *a, *draw(QUESTION)] for p, a in zip(prompts, last.answers, strict=True)]
        rounds.append(
            last := answer_all(llm, prompts, exactly(args.tokens), lambda: before.append(read_counts(llm)))
        )
        traffic.append(read_counts(llm).since(before[-1]) if before else Counts())
        print(
            f"{contender}: {rounds[-1].tokens / rounds[-1].total:.1f} tokens/s", file=sys.stderr, flush=True
        )
    cache = llm.llm_engine.vllm_config.cache_config
    (memory,) = llm.collective_rpc(memory_of_worker)
    found: dict[str, Any] = {
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "device_gib": memory["device"] / GIB,
        "prefill_ms": prefill.total * 1e3,
        "return_ms": [r.first * 1e3 for r in rounds],
        "settling_ms": [r.settling * 1e3 for r in rounds],
        "decoding_together": min(r.together for r in rounds),
        "tokens_per_s": [r.tokens / r.total for r in rounds],
    }
    steps = sorted(1e3 * step for r in rounds for step in r.steps)
    if steps:
        found["step_ms"] = statistics.median(steps)
        found["step_ms_p10_p90"] = [steps[len(steps) // 10], steps[len(steps) * 9 // 10]]
    if contender == "host" and before:
        wanted, got, evicted, nbytes, rows = (
            sum(getattr(t, name) for t in traffic)
            for name in ("pages_wanted", "pages_found", "pages_evicted", "host_bytes_fetched", "sparse_rows")
        )
        found |= {
            "page_cache_gib": memory["page_caches"] / GIB,
            "hit_rate": got / wanted,
            "bus_bytes_per_token": nbytes / rows,
            "bus_bound_step_ms": nbytes / rows * load.batch / BUS * 1e3,
            "evictions_per_token": evicted / rows,
        }
    return found


def read_counts(llm: Any) -> Counts:
    """The kernels' counters, once all that was started has ended."""
    (counts,) = llm.collective_rpc(counts_of_worker)
    return Counts(**counts)


def counts_of_worker(worker: Any) -> dict[str, float]:
    """Runs in the engine's process."""
    torch.cuda.synchronize()
    return asdict(meter.get().totals())


def memory_of_worker(worker: Any) -> dict[str, int]:
    """Runs in the engine's process: the most bytes that torch took of the device, and those of the page caches."""
    from vllm_rc_backend.layer import own_layers

    layers = own_layers(worker.vllm_config).values()
    groups = {id(layer.pages.group): layer.pages.group for layer in layers if layer.pages is not None}
    return {
        # To torch the host's pool is device memory, too.
        "device": torch.cuda.max_memory_reserved() - pool.held_bytes(),
        "page_caches": sum(group.nbytes for group in groups.values()),
    }


def gather(load: Load) -> dict[str, Any]:
    """How fast one layer's selected pages are brought to the device, when all are missing and when none is.

    By graph replay. Pages are chosen at random, anew in each step for the first figure.
    """
    rows, heads, size, page, device = load.batch, HEADS, HEAD_SIZE, 16, torch.device("cuda")
    context = min(load.context, 32768)
    length, blocks = context - 3, rows * context // page
    geometry = Geometry(page, page, 16, 16, 2048, 2048)
    count, places = geometry.retrieved_pages(length), geometry.mid_end(length) - geometry.sink_pages
    with pool.host_memory():
        storage = torch.zeros(blocks, page, heads, 2 * size, dtype=torch.bfloat16, device=device)
    source = torch.zeros(1 << 30, dtype=torch.int8, pin_memory=True)
    copy = torch.empty_like(source, device=device)
    whole = seconds(lambda: copy.copy_(source, non_blocking=True), 5)
    found: dict[str, Any] = {"context": context, "layers": 1, "copy_gb_per_s": copy.nbytes / whole / 1e9}
    table = torch.arange(blocks, dtype=torch.int32, device=device).view(rows, -1)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    scores = torch.rand(TIMES + WARM_UP, rows, heads, places, device=device)
    choices = scores.topk(count).indices.sort().values.to(torch.int32)
    for order, kv in {
        "block, token, head": storage.transpose(1, 2),
        "block, head, token": storage.view(blocks, heads, page, 2 * size),
    }.items():
        slots = 4 * rows * heads * count
        pages = DevicePages(geometry, 1, blocks, heads, slots, size, kv.dtype, device, rows, context)
        chosen = choices[0].clone()
        replay = capture(pages, chosen, kv, table, lengths, starts)
        turns = iter(choices)

        def step(
            chosen: Tensor = chosen,
            turns: Iterator[Tensor] = turns,
            replay: Callable[[], None] = replay,
        ) -> None:
            chosen.copy_(next(turns))
            replay()

        for _ in range(WARM_UP):
            step()
        pages.counters.zero_()
        missing = seconds(step, TIMES, warm_up=0)
        counts = dict(zip(COUNTERS, pages.counters.tolist(), strict=True))
        nbytes = counts["tokens_fetched"] * 2 * size * kv.element_size() / TIMES
        found[order] = {
            "gb_per_s": nbytes / missing / 1e9,
            "found": counts["pages_found"] / counts["pages_wanted"],
            "missing_us": missing * 1e6,
            "all_found_us": seconds(replay, TIMES) * 1e6,
        }
    return found


def capture(
    pages: DevicePages, chosen: Tensor, kv: Tensor, table: Tensor, lengths: Tensor, starts: Tensor
) -> Callable[[], None]:
    """A step's launches for one layer, as a graph."""

    def step() -> None:
        pages.begin_step(table, lengths, starts, 1)
        pages.layers[0].fetch(chosen, kv, table, lengths)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(launch: Callable[[], Any], times: int, warm_up: int = WARM_UP) -> float:
    """Of one launch, on the device, in the mean, after some that are not timed."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(warm_up):
        launch()
    begin.record()
    for _ in range(times):
        launch()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / times / 1e3


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--load", type=Load.parse, default=Load(65536, 16))
    parser.add_argument("--layers", type=int, default=16, help="of the dummy model; Llama-3.1-8B has 32")
    parser.add_argument("--model", type=Path, help="a trained model's folder, in place of dummy weights")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={}, help="of rc_topk, as JSON")
    parser.add_argument("--host-kv-gib", type=float, help="default: what the load needs")
    parser.add_argument("--page-cache-gib", type=float, help="default: what is left on the device")
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.125,
        help="of host, if it has no --page-cache-gib, and vllm",
    )
    parser.add_argument(
        "--lock", type=Path, help="a file to lock while measuring, if several are started at once"
    )
    parser.add_argument("--out", type=Path, help="a file of JSON rows; what is found is added to them")
    parser.add_argument("--write", type=Path, help="one contender, in this process: a file for what it finds")
    return parser.parse_args()


def main() -> None:
    """Run the contenders one after the other and print what each has found."""
    args = parse()
    if args.write is not None:
        (contender,) = args.contenders
        found = gather(args.load) if contender == "gather" else run_engine(contender, args)
        found["device"] = torch.cuda.get_device_name()
        args.write.write_text(json.dumps(found))
        return
    for contender in args.contenders:
        found = run_child(__spec__.name, [*sys.argv[1:], "--contenders", contender])
        row = {
            "contender": contender,
            "model": f"{args.layers} layers of Llama-3.1-8B's, dummy"
            if args.model is None
            else str(args.model),
            "load": asdict(args.load),
            "tokens": args.tokens,
            "rounds": args.rounds,
            "options": args.options,
        } | found
        print(json.dumps(row), flush=True)
        if args.out is not None:
            rows = json.loads(args.out.read_text()) if args.out.exists() else []
            args.out.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
