"""Warming up launches a decode of padding for each of the kernels, and leaves nothing behind; shared by the tests with
and without a GPU."""

from __future__ import annotations

import torch

from tests.unit.kernels.cases import FEATURES, RUNS, SHARE
from vllm_rc_backend.attention_triton import COUNTERS
from vllm_rc_backend.evaluation.kernel_check import Case, Runner
from vllm_rc_backend.host_kv.page_cache import DevicePages
from vllm_rc_backend.host_kv.staging import Staging
from vllm_rc_backend.warm_up_triton import warm_up

ROWS = (40, 0, 90) * 3
WARM = {
    "paged": Case(**RUNS, completion="paged", seq_lens=ROWS),
    "share, token-major, fp16": Case(
        **SHARE, completion="linear", head_first=False, dtype=torch.float16, seq_lens=ROWS
    ),
    "features": Case(**FEATURES, seq_lens=ROWS),
    "selection only, fp8": Case(
        completion="none", kv_dtype=torch.float8_e4m3fn, statistics_bits=8, seq_lens=ROWS
    ),
    "paged, through a page cache": Case(**RUNS, completion="paged", seq_lens=ROWS[:4], cache_slots=500),
    "features, through a page cache": Case(**FEATURES, seq_lens=ROWS[:4], cache_slots=500),
    "a page cache without slots": Case(
        completion="none", pages_per_block=2, seq_lens=ROWS[:4], cache_slots=0
    ),
}


def cache_state(pages: DevicePages) -> list[list[int]]:
    """All that a page cache goes by: its directory, its clock, its counters."""
    shared = pages.page_slot, pages.filled, pages.now, pages.counters
    own = (x for layer in pages.layers for x in (layer.slot_key, layer.used, layer.hand))
    return [x.flatten().tolist() for x in (*shared, *own)]


def check_warm_up(device: str, case: Case) -> None:
    """The caches hold NaN, so that whatever is read of them is seen."""
    runner = Runner(case, device, steps=2)
    attention, work, seen = runner.attention, runner.workspace, []
    pages, staging, before = runner.pages, None, []
    if pages is not None:
        before = cache_state(pages)
        pages.layers[0].content.fill_(torch.nan)
        staging = Staging(case.geometry, case.heads, case.head_size, case.dtype, device, len(case.seq_lens))
    decode = attention.decode

    def watched(*arguments: object) -> None:
        out = arguments[-1]
        assert isinstance(out, torch.Tensor)
        out.fill_(torch.nan)
        decode(*arguments)  # type: ignore[arg-type]
        seen.append(out)

    attention.decode = watched  # type: ignore[method-assign, assignment]
    attention.warm_up(runner.kv_cache, case.dtype, runner.planner.current if runner.planner else None)
    assert [len(out) for out in seen] == work.compiled_for()
    assert all(int(out.count_nonzero()) == 0 for out in seen)
    assert work.counters.tolist() == [0] * len(COUNTERS)
    assert int(work.arrivals.count_nonzero()) == 0

    # All of a start's, and then a prefill and decodes as if nothing had been.
    warm_up(attention, runner.planner, case.dtype, staging)
    if pages is not None and staging is not None:
        assert cache_state(pages) == before
        assert bool(pages.layers[0].content.isnan().all())
        assert int(staging.buffer.count_nonzero()) == int(staging.lengths.count_nonzero()) == 0
    attention.bind(runner.kv_cache, case.key_scale, case.value_scale)
    runner.prefill()
    for step in range(1 if pages is None else 2):
        runner.decode([n + step if n else 0 for n in case.seq_lens])
    runner.compare_counters()
    if pages is not None:
        wanted, found, _, _ = pages.counters.tolist()
        assert wanted > 0
        assert (found > 0) == (pages.slots > 0)
