"""A prompt that shares the blocks which another one's prefill fills in the same step, all its tokens but one.

Interpreted by triton_interpreted.py, on a GPU by tests/gpu.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.kernels.cases import FEATURES, RUNS
from vllm_rc_backend.evaluation.kernel_check import Case, Runner

SHARED = 320
"""Tokens of the blocks that both have."""

COMPLETIONS: dict[str, dict[str, Any]] = {
    "paged": {**RUNS, "completion": "paged"},
    "features": FEATURES,
    "box": {},
}


def check_shared_step(device: str, completion: str, chunk: int) -> None:
    """The order of ``RCTopKCUDAImpl.forward``: prefills' statistics and summaries, decodes' summaries, decodes.

    Args:
        chunk: tokens of the longer prompt that the step adds; what it had before is in the cache.
    """
    longer = 350
    case = Case(**COMPLETIONS[completion], heads=1, seq_lens=(SHARED + 1, longer))
    runner = Runner(case, device, steps=2)
    blocks = SHARED // case.geometry.block_size
    runner.block_table[0, :blocks] = runner.block_table[1, :blocks]
    runner.tokens[0, :SHARED] = runner.tokens[1, :SHARED]
    before = longer - chunk
    if before:
        runner.extend([0, before], [0, before])

    lengths, counts = [SHARED + 1, longer], [1, chunk]
    runner.write(lengths, counts)
    seq_lens, starts = runner.tensor(lengths), runner.tensor([0, 1, 1 + chunk])
    assert runner.planner is not None
    plan = runner.planner.plan(runner.block_table, seq_lens, starts)
    table = runner.block_table
    runner.attention.update_prefill(
        runner.kv_cache, table[1:], seq_lens[1:], starts[1:], chunk, plan.from_row(1)
    )
    runner.updater.update(table[:1], plan)
    query = runner.new_query(1)
    out = torch.full_like(query, torch.nan)
    runner.attention.decode(query, runner.kv_cache, table[:1], seq_lens[:1], plan, out)
    runner.finish(lengths, counts)
    runner.compare(query, lengths[:1], out)
    runner.decode([n + 1 for n in lengths])
