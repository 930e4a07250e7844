"""KV pages in pinned host memory: the allocator, the kernels, and real vLLM against pages on the device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm_rc_backend.evaluation.kernel_check import Case, check
from vllm_rc_backend.host_kv import pool
from vllm_rc_backend.host_kv.memory import free_bytes
from vllm_rc_backend.observability import meter

from ..harness import SCENARIOS, SMALL, Answer, Prompt, answers, assert_close, engine, greedy

GPU = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None, "max_num_seqs": 16}
HOST = SMALL | {"kv_residency": "host", "host_kv_gib": 2.0}


def test_memory_is_pinned_used_and_used_again() -> None:
    free = torch.cuda.mem_get_info()[0]
    for _ in range(2):
        with pool.host_memory():
            tensor = torch.zeros(1 << 30, dtype=torch.int8, device="cuda")
        assert pool.held_bytes() == 1 << 30
        assert free - torch.cuda.mem_get_info()[0] < 256 << 20, "the tensor lies on the device"
        tensor.view(torch.int32)[12345] = 7
        assert int(tensor.view(torch.int32).sum(dtype=torch.int64)) == 7
        del tensor
    torch.zeros(1 << 20, device="cuda")
    assert pool.held_bytes() == 1 << 30


def test_too_much_is_an_error_that_says_so() -> None:
    held = pool.held_bytes()
    with pytest.raises(pool.HostPoolError, match="Lower host_kv_gib"), pool.host_memory():
        torch.zeros(1 << 44, dtype=torch.int8, device="cuda")
    assert pool.held_bytes() == held


def test_a_process_that_is_killed_leaves_nothing_pinned() -> None:
    before = free_bytes()
    code = (
        "import torch, time; from vllm_rc_backend.host_kv import pool\n"
        "with pool.host_memory(): t = torch.zeros(6 << 30, dtype=torch.int8, device='cuda')\n"
        "torch.cuda.synchronize(); print('pinned', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "pinned\n"
    assert before - free_bytes() > 5 << 30
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert before - free_bytes() < 1 << 30


@pytest.mark.parametrize("slots", [0, 40, 400])
@pytest.mark.parametrize("completion", ["linear", "paged"])
def test_decoding_through_a_page_cache(slots: int, completion: str) -> None:
    case = Case(
        seq_lens=(900, 300, 0, 120),
        selection="runs",
        statistics_bits=2,
        completion=completion,
        head_size=128,
        cache_slots=slots,
        max_model_len=2048,
    )
    check(case, "cuda", 20)


@pytest.fixture(scope="module")
def resident(prompt: Prompt) -> dict[str, list[Answer]]:
    """What the same options answer with every page on the device."""
    with engine("rc_topk", SMALL, **GPU) as llm:
        return {s.__name__: answers(s(llm, prompt)) for s in SCENARIOS if s.__name__ != "shared_then_parted"}


@pytest.mark.parametrize("cache", [{"page_cache_gib": 0.01}, {}], ids=["small cache", "what is left"])
def test_same_answers(cache: dict[str, Any], resident: dict[str, list[Answer]], prompt: Prompt) -> None:
    with engine("rc_topk", HOST | cache, **GPU) as llm:
        for scenario in SCENARIOS:
            found = answers(scenario(llm, prompt))
            if scenario.__name__ in resident:  # the other samples: a tie changes everything after it
                assert_close(found, resident[scenario.__name__])
        llm.generate([prompt(900)], greedy(40), use_tqdm=False)
        torch.cuda.synchronize()
        counts = meter.get().totals()
    assert counts.pages_wanted > 0
    assert counts.host_bytes_fetched > 0
    assert (counts.pages_found / counts.pages_wanted > 0.8) == (not cache)
