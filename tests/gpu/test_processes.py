"""Engines on the GPU in processes of their own: memory from a clean start, sleep mode, several GPUs.

An engine leaves memory behind in its process (compiled code holds the model), and several ranks cannot share one.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from ..harness import (
    FULL,
    SMALL,
    Answer,
    Prompt,
    answers,
    assert_close,
    engine,
    greedy,
    sparse_layers,
    with_features,
)

GPU = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None, "max_num_seqs": 16}
SMALL_POOL = GPU | {"kv_cache_memory_bytes": 1 << 30}
T = TypeVar("T")


def in_its_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of this module in a new process that has touched no device."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def generated(
    backend: str, options: dict[str, Any] | None, settings: dict[str, Any], prompts: list[Any]
) -> list[Answer]:
    """Runs in a process of its own: what this engine answers."""
    with engine(backend, options, **settings) as llm:
        return answers(llm.generate(prompts, greedy(24), use_tqdm=False))


@dataclass(frozen=True)
class Memory:
    """What an engine holds; bytes where nothing else is said.

    Attributes:
        blocks: of the KV pool.
        block: one block of the pool, all layers.
        pages, reserved_pages: of the pool, and those that the side store has room for.
        side: the side store.
        most, device: the most that this process ever held, and all that there is.
    """

    blocks: int
    block: int
    pages: int
    reserved_pages: int
    side: int
    most: int
    device: int


def dense_blocks(settings: dict[str, Any]) -> int:
    """Runs in a process of its own: blocks of the KV pool with vLLM's own attention."""
    with engine("FLASH_ATTN", **settings) as llm:
        return int(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)


def sparse_memory(settings: dict[str, Any], prompts: list[Any]) -> Memory:
    """Runs in a process of its own: an engine's memory after these prompts."""
    with engine("rc_topk", {}, **settings) as llm:
        llm.generate(prompts, greedy(8), use_tqdm=False)
        blocks = int(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
        layers = list(sparse_layers(llm).values())
        stores = [layer.impl.sparse_layer.store for layer in layers]
        return Memory(
            blocks=blocks,
            block=sum(layer.kv_cache.nbytes // len(layer.kv_cache) for layer in layers),
            pages=blocks * stores[0].layout.geometry.pages_per_block,
            reserved_pages=stores[0].pages,
            side=sum(store.nbytes for store in stores),
            most=torch.cuda.max_memory_reserved(),
            device=torch.cuda.mem_get_info()[1],
        )


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_side_memory_is_inside_the_limit(eager: bool, prompt: Prompt) -> None:
    """The KV pool shrinks by what the plugin holds, and the whole stays under the limit with a full batch."""
    settings = {
        "gpu_memory_utilization": 0.92,
        "kv_cache_memory_bytes": None,
        "max_model_len": 32768,
        "max_num_seqs": 64,
        "enforce_eager": eager,
    }
    plain = in_its_own_process(dense_blocks, settings)
    ours = in_its_own_process(sparse_memory, settings, [prompt(2000, i) for i in range(64)])
    assert ours.pages <= ours.reserved_pages <= 1.05 * ours.pages
    assert (plain - ours.blocks) * ours.block == pytest.approx(ours.side, rel=0.25)
    assert ours.most < 0.93 * ours.device


def slept(level: int, prompts: list[Any]) -> tuple[list[Answer], list[Answer], int, int]:
    """Runs in a process of its own: answers before and after a sleep, the bytes it freed, and the KV pool's."""
    with engine("rc_topk", SMALL, enable_sleep_mode=True, **GPU) as llm:
        before = answers(llm.generate(prompts, greedy(24), use_tqdm=False))
        pool = sum(layer.kv_cache.nbytes for layer in sparse_layers(llm).values())
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        llm.sleep(level=level)
        freed = torch.cuda.mem_get_info()[0] - free
        llm.wake_up(tags=["weights"])
        if level == 2:
            llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        after = answers(llm.generate(prompts, greedy(24), use_tqdm=False))
    return before, after, freed, pool


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_the_pool_and_changes_no_answer(level: int, prompt: Prompt) -> None:
    """Blocks come back with other contents; summaries and statistics of before must not be taken for theirs."""
    prompts = [prompt(500 + 100 * i, i) for i in range(8)]
    before, after, freed, pool = in_its_own_process(slept, level, prompts)
    assert freed >= pool
    assert_close(after, before)


@pytest.fixture(scope="module", params=["full budget", "small budget", "features"])
def one_rank(
    request: pytest.FixtureRequest, prompt: Prompt, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[Any], list[Answer]]:
    """Options, prompts, and what one rank answers."""
    options = FULL if request.param == "full budget" else SMALL
    if request.param == "features":
        options = SMALL | with_features(tmp_path_factory.mktemp("features"))
    prompts = [prompt(300 + 150 * i, i) for i in range(8)]
    return options, prompts, in_its_own_process(generated, "rc_topk", options, SMALL_POOL, prompts)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_tensor_parallel_equals_one_rank(
    executor: str, one_rank: tuple[dict[str, Any], list[Any], list[Answer]]
) -> None:
    """Two ranks, each with its own KV heads, statistics, summaries and maps, and decode graphs with NCCL inside."""
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    options, prompts, expected = one_rank
    both = SMALL_POOL | {"tensor_parallel_size": 2, "distributed_executor_backend": executor}
    got = in_its_own_process(generated, "rc_topk", options, both, prompts)
    # A page at the edge of the budget may be taken on one side only.
    assert_close(got, expected, tolerance=0.25 if options is FULL else 0.5)
