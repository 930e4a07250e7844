"""Warming up launches a decode of padding for each of the kernels, and leaves nothing behind; shared by the tests with
and without a GPU."""

from __future__ import annotations

import torch

from tests.unit.kernels.cases import FEATURES, RUNS, SHARE
from vllm_rc_backend.attention_triton import COUNTERS
from vllm_rc_backend.evaluation.kernel_check import Case, Runner
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
}


def check_warm_up(device: str, case: Case) -> None:
    """The cache holds NaN, so that whatever is read of it is seen."""
    runner = Runner(case, device)
    attention, work, seen = runner.attention, runner.workspace, []
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

    # All of a start's, and then a prefill and a decode as if nothing had been.
    warm_up(attention, runner.planner, case.dtype)
    attention.bind(runner.kv_cache, case.key_scale, case.value_scale)
    runner.prefill()
    runner.decode(list(case.seq_lens))
    runner.compare_counters()
