"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: earlier tokens copied for a prefill."""

from __future__ import annotations

import torch

from vllm_rc_backend.host_kv.staging import Staging

from .page_cache_interpreted import GEOMETRY, HEAD_SIZE, HEADS, Bench


def test_staged_tokens_are_the_pools() -> None:
    """In pieces that end inside a block, for rows of which some have nothing left."""
    bench = Bench(0, rows=3)
    bench.write([300, 40, 0])
    bench.write([20, 5, 9])
    staging = Staging(GEOMETRY, HEADS, HEAD_SIZE, torch.float32, "cpu", max_rows=3)
    staging.table = staging.table[:6]  # two blocks a row
    starts, lengths = torch.tensor([0, 20, 25, 34]).int(), torch.tensor(bench.lengths).int()
    for first, expected in ((0, [256, 40, 0]), (256, [44, 0, 0])):
        staging.buffer.fill_(torch.nan)
        keys, values, table, counts = staging.copy(bench.pools[0], bench.table, lengths, starts, first)
        assert counts.tolist() == expected
        for row, count in enumerate(expected):
            for i in range(count):
                block, place = divmod(first + i, GEOMETRY.block_size)
                token = bench.pools[0][int(bench.table[row, block]), :, place]
                got = (int(table[row, i // 128]), i % 128)
                assert torch.equal(torch.cat((keys[got], values[got]), dim=-1), token)
