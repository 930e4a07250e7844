"""A real vLLM engine in this process, the scenarios it is put through, and how its answers are compared.

Shared by the CPU and the GPU suite: only the dense backend's name, the dtype and the sizes differ.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

vllm = pytest.importorskip("vllm")

MODEL = str(Path(__file__).parents[1] / "examples" / "model")
Prompt = Callable[..., dict[str, list[int]]]


@contextmanager
def engine(backend: str, options: dict[str, Any] | None = None, **kwargs: Any) -> Iterator[Any]:
    """A real ``LLM`` on the example model, torn down at the end."""
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "model": MODEL,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 512 << 20,
        "seed": 0,
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():
        # vLLM refuses to start where memory is freed, as of an engine before, while it measures what this one takes.
        gc.collect()
        torch.cuda.empty_cache()
    else:
        # float32, so that greedy outputs can be compared.
        defaults |= {"dtype": "float32", "enforce_eager": True}
    if backend == "rc_topk":
        defaults["additional_config"] = {"rc_topk": {"log_interval": 0, **(options or {})}}
    llm = vllm.LLM(attention_backend=backend, **(defaults | kwargs))
    try:
        yield llm
    finally:
        shutdown = getattr(llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sparse_layers(llm: Any) -> dict[str, Any]:
    """Our layers by name, with vLLM's layer objects; of an engine whose one worker lives in this process."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {n: layer for n, layer in context.items() if layer.impl.sparse_layer.sparse}


def with_features(folder: Path, features: int = 48) -> dict[str, Any]:
    """Options for the completion ``features`` with untrained maps for the example model, written to this folder."""
    from vllm_rc_backend.completion.feature_file import FeatureFile, fingerprint
    from vllm_rc_backend.evaluation.kernel_check import random_maps

    config = json.loads(Path(MODEL, "config.json").read_text())
    sizes = config["num_key_value_heads"], features, config["head_dim"]
    path = folder / "maps.safetensors"
    layers = [random_maps(*sizes) for _ in range(config["num_hidden_layers"])]
    FeatureFile(layers, fingerprint(config)).save(path)
    return {"completion": "features", "features_file": str(path)}


FULL = {"budget": 1_000_000}
"""A budget that covers every context."""

SMALL = {"budget": 192}
"""A budget that leaves most of a context of 1000 tokens unread."""


@dataclass(frozen=True)
class Answer:
    """One sequence: its prompt, its tokens, the log-probability of each, and those of the likeliest at each place."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[dict[int, float], ...]


def answers(outputs: list[Any]) -> list[Answer]:
    """All sequences of ``LLM.generate``'s outputs, in order."""
    return [
        Answer(
            tuple(output.prompt_token_ids),
            tuple(o.token_ids),
            tuple(places[t].logprob for t, places in zip(o.token_ids, o.logprobs, strict=True)),
            tuple({t: place.logprob for t, place in places.items()} for places in o.logprobs),
        )
        for output in outputs
        for o in output.outputs
    ]


def assert_same(got: list[Answer], expected: list[Answer], tolerance: float = 2e-3) -> None:
    """The same tokens with the same probabilities, up to rounding."""
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


def assert_close(got: list[Answer], expected: list[Answer], tolerance: float = 0.25) -> None:
    """Greedy answers of bfloat16 engines that sum in another order: the same up to ties.

    Until two sequences part, each token is as likely in both; where they part, both hold the two tokens for equally
    likely. What comes after has another context and is not compared, nor is a turn whose history has parted.

    Args:
        tolerance: of one log-probability, a fifth of it of their mean. A bfloat16 logit of 8 to 16 moves in steps of
            1/16; two orders of summation were seen to differ by 0.08 at most and 0.005 in the mean.
    """
    assert len(got) == len(expected)
    tokens, differences = 0, []
    for mine, theirs in zip(got, expected, strict=True):
        if mine.prompt != theirs.prompt:
            continue
        pairs = list(zip(mine.tokens, theirs.tokens, strict=True))
        end = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        assert mine.logprobs[:end] == pytest.approx(theirs.logprobs[:end], abs=tolerance)
        differences += [abs(a - b) for a, b in zip(mine.logprobs[:end], theirs.logprobs[:end], strict=True)]
        if end < len(pairs):
            for likeliest in (mine.likeliest[end], theirs.likeliest[end]):
                first, second = (likeliest.get(token, -math.inf) for token in pairs[end])
                assert first == pytest.approx(second, abs=tolerance), (end, pairs[end], likeliest)
        tokens += len(pairs)
    assert len(differences) >= tokens / 4, f"only {len(differences)} of {tokens} tokens come before a tie"
    assert sum(differences) <= tolerance / 5 * len(differences)


def greedy(tokens: int = 24, **kwargs: Any) -> Any:
    """Deterministic sampling that runs on to the end."""
    return vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=3, **kwargs)


def run(
    llm: Any, arrivals: list[tuple[int, str, dict[str, list[int]], Any]], aborts: dict[str, int]
) -> list[Any]:
    """Drive the engine step by step.

    Args:
        arrivals: (step, id, prompt, sampling parameters).
        aborts: id to the number of output tokens after which the request is aborted.

    Returns:
        Finished outputs by request id, aborted ones left out.
    """
    core = llm.llm_engine
    waiting, done, step = sorted(arrivals, key=lambda a: a[0]), {}, 0
    while waiting or core.has_unfinished_requests():
        while waiting and waiting[0][0] <= step:
            _, name, prompt, params = waiting.pop(0)
            core.add_request(name, prompt, params)
        for output in core.step():
            name = output.request_id
            if output.finished:
                done[name] = output
            elif name in aborts and len(output.outputs[0].token_ids) >= aborts[name]:
                core.abort_request([name])
        step += 1
        assert step < 5000
    return [done[name] for name in sorted(done) if name not in aborts]


def ragged(llm: Any, prompt: Prompt) -> list[Any]:
    """Many sequences of very different lengths, prefills beside decodes, in chunks."""
    lengths = (5, 1200, 40, 700, 333, 16, 900, 64)
    return run(llm, [(2 * i, f"r{i}", prompt(n, i), greedy()) for i, n in enumerate(lengths)], {})


def prefix_hits(llm: Any, prompt: Prompt) -> list[Any]:
    """Shared prefixes: the same prompt again, one that ends inside a page and a chunk, one that goes on."""
    base = prompt(1100)["prompt_token_ids"]
    tail = prompt(200, 5)["prompt_token_ids"][1:]
    prompts = [base, base, base[:777], base[:1024], base + tail, base[:650] + tail]
    return run(llm, [(40 * i, f"p{i}", {"prompt_token_ids": p}, greedy()) for i, p in enumerate(prompts)], {})


def prefilled_together(llm: Any, prompt: Prompt) -> list[Any]:
    """Prompts that share blocks which another one's prefill fills in the same step, all their tokens but one."""
    base = prompt(460, 11)["prompt_token_ids"]
    prompts = [base, base[:385], base[:385], base[:257]]  # whole blocks of 16 or 128, and one token
    return run(llm, [(0, f"s{i}", {"prompt_token_ids": p}, greedy()) for i, p in enumerate(prompts)], {})


def turns(llm: Any, prompt: Prompt) -> list[Any]:
    """A chat of three turns: each prompt is the one before, its answer, and more."""
    history, outputs = prompt(600)["prompt_token_ids"], []
    for turn in range(3):
        (output,) = run(llm, [(0, f"t{turn}", {"prompt_token_ids": history}, greedy(40))], {})
        outputs.append(output)
        history = [*history, *output.outputs[0].token_ids, *prompt(150, turn + 3)["prompt_token_ids"][1:]]
    return outputs


def shared_then_parted(llm: Any, prompt: Prompt) -> list[Any]:
    """n > 1: samples of one prompt share its pages, then go their own ways past several page ends."""
    params = greedy(70)
    params.temperature, params.n = 0.8, 4
    torch.manual_seed(7)  # a seed in the request is refused by vLLM on a CPU when prefill is chunked
    return llm.generate([prompt(800, 2)], params, use_tqdm=False)


def aborted(llm: Any, prompt: Prompt) -> list[Any]:
    """Requests that vanish in the middle of decoding; their blocks are reused at once by others."""
    arrivals = [(3 * i, f"a{i:02}", prompt(400 + 37 * i, i), greedy(30)) for i in range(10)]
    return run(llm, arrivals, {"a01": 5, "a04": 1, "a06": 20})


SCENARIOS = [ragged, prefix_hits, prefilled_together, turns, shared_then_parted, aborted]
