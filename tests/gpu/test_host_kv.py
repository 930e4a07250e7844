"""KV pages in pinned host memory: the allocator, the kernels, and real vLLM against pages on the device."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm_rc_backend.evaluation.kernel_check import Case, check
from vllm_rc_backend.host_kv import pool
from vllm_rc_backend.host_kv.memory import free_bytes
from vllm_rc_backend.observability import meter

from ..harness import (
    SCENARIOS,
    SMALL,
    Answer,
    Prompt,
    answers,
    assert_close,
    engine,
    greedy,
    run,
    with_features,
)
from ..serving import eventually
from ..unit.kernels.triton_compiled import kernels_compiled

GPU = {
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": None,
    "max_num_seqs": 16,
    # Decode graphs as in production; without compiled prefills an engine starts in seconds.
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [4, 16],
    },
}
HOST = SMALL | {"kv_residency": "host", "host_kv_gib": 2.0}
GIB = 1 << 30


def memory_kind(tensor: torch.Tensor) -> str:
    """Where the driver says that a tensor's first and last byte lie."""
    driver, kinds = ctypes.CDLL("libcuda.so.1"), []
    for byte in (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1):
        kind = ctypes.c_uint()
        code = driver.cuPointerGetAttribute(ctypes.byref(kind), 2, ctypes.c_uint64(byte))  # MEMORY_TYPE
        kinds.append({1: "host", 2: "device"}[kind.value] if code == 0 else f"CUresult {code}")
    return kinds[0] if kinds[0] == kinds[1] else " and ".join(kinds)


def test_memory_is_pinned_used_and_used_again() -> None:
    size, before, addresses = GIB + (6 << 20), pool.held_bytes(), []
    assert memory_kind(torch.zeros(8, device="cuda")) == "device", "this test cannot tell where memory lies"
    for turn in range(2):
        with pool.host_memory():
            tensor = torch.zeros(size, dtype=torch.int8, device="cuda")
        addresses.append(tensor.data_ptr())
        assert memory_kind(tensor) == "host", f"turn {turn}"
        words = tensor.view(torch.int32)
        words[12345] = 7
        assert int(words.sum(dtype=torch.int64)) == 7, f"turn {turn}: the kernels do not see what was written"
        del tensor, words
    assert addresses[0] == addresses[1], "the second tensor did not get the first one's memory"
    assert pool.held_bytes() - before == size
    assert memory_kind(torch.zeros(1 << 20, device="cuda")) == "device", "allocated outside of the context"


def test_copies_of_any_part() -> None:
    with pool.host_memory():
        tensor = torch.zeros(GIB + (6 << 20), dtype=torch.int8, device="cuda")
    expected = torch.arange(64, dtype=torch.int8)
    part = tensor[GIB - 32 : GIB + 32]  # pages are taken a GiB at a time
    part.copy_(expected)
    assert torch.equal(part.cpu(), expected)
    assert torch.equal(part.clone().cpu(), expected)


@pytest.mark.parametrize(
    "wanted", [1 << 44, 1 << 48], ids=["more than there is", "more than can be addressed"]
)
def test_too_much_is_an_error_that_says_so(wanted: int) -> None:
    held = pool.held_bytes()
    with (
        pytest.raises(pool.HostPoolError, match=r"the host can spare .* Lower host_kv_gib"),
        pool.host_memory(),
    ):
        torch.zeros(wanted, dtype=torch.int8, device="cuda")
    assert pool.held_bytes() <= held  # torch gives back what it has cached before it gives up


def test_a_process_that_is_killed_leaves_nothing_pinned() -> None:
    gib = 12
    code = (
        "import torch, time; from vllm_rc_backend.host_kv import pool\n"
        f"with pool.host_memory(): t = torch.zeros({gib} << 30, dtype=torch.int8, device='cuda')\n"
        "torch.cuda.synchronize(); print('pinned', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "pinned\n"
    pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
    assert pages * 4096 > gib * GIB, "not all of it is in memory"
    while_pinned = free_bytes()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    # Others may use the machine: most of it must be back.
    assert eventually(lambda: free_bytes() - while_pinned >= 0.75 * gib * GIB, 20), (
        f"{(free_bytes() - while_pinned) / GIB:.1f} of {gib} GiB came back"
    )


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
    with engine("rc_topk", SMALL, **GPU | {"kv_cache_memory_bytes": 2 * GIB}) as llm:
        return {s.__name__: answers(s(llm, prompt)) for s in SCENARIOS if s.__name__ != "shared_then_parted"}


@pytest.mark.parametrize("gib", [0.001, 1.0], ids=["small cache", "room"])
def test_same_answers(gib: float, resident: dict[str, list[Answer]], prompt: Prompt) -> None:
    with engine("rc_topk", HOST | {"page_cache_gib": gib}, **GPU) as llm:
        for scenario in SCENARIOS:
            found = answers(scenario(llm, prompt))
            if scenario.__name__ in resident:  # the other samples: a tie changes everything after it
                assert_close(found, resident[scenario.__name__])
        llm.generate([prompt(900)], greedy(40), use_tqdm=False)
        torch.cuda.synchronize()
        counts = meter.get().totals()
    assert counts.host_bytes_fetched > 0
    rate = counts.pages_found / counts.pages_wanted
    # A row reads 13 pages with each of two KV heads; the small cache has 43 slots, the other one for every other page.
    assert rate > 0.8 if gib == 1.0 else rate < 0.8, f"{rate:.3f} of the pages found"


@pytest.mark.parametrize("completion", ["default", "features"])
def test_no_kernel_is_compiled_while_it_serves(completion: str, prompt: Prompt, tmp_path: Path) -> None:
    """Prompts come one by one and in chunks, beside any number of decodes, and only one size of batches has been
    captured. The directories of this small cache begin anywhere."""
    # A budget that no other test has: kernels of its own.
    options = HOST | {"budget": 208, "page_cache_gib": 0.001}
    if completion == "features":
        options |= with_features(tmp_path)
    captured = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [16]}
    arrivals = [(2 * i, str(i), prompt(700 + 10 * i, i), greedy(40)) for i in range(16)]
    others = kernels_compiled()
    with engine("rc_topk", options, **GPU | {"compilation_config": captured}) as llm:
        before = kernels_compiled()
        run(llm, arrivals, {})
        assert kernels_compiled() == before > others
