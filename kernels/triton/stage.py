"""Earlier tokens of sequences, copied out of a pool in host memory: a prefill reads each of them once a chunk."""

import triton.language as tl

from vllm_rc_backend.kernels.triton.launched import launched
from vllm_rc_backend.kernels.triton.paged import token_rows


@launched
def stage_kernel(
    pool,
    block_table,
    seq_lens,
    query_start,
    staged,
    lengths,
    first,
    room,
    stride_block,
    stride_head,
    stride_token,
    stride_table,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    g: tl.constexpr,
):
    """Grid (tiles of ``room``, heads, rows): tokens ``[first, first + room)`` of what each row had before this step.

    Args:
        pool: ``[blocks, heads, block_size, 2 * head_size]``, mapped host memory.
        staged: ``[rows, room, heads, 2 * head_size]``, out; what no token is copied to stays as it is.
        lengths: int32 ``[rows]``, out: how many tokens there are.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    before = tl.load(seq_lens + row) - (tl.load(query_start + row + 1) - tl.load(query_start + row))
    count = tl.minimum(tl.maximum(before - first, 0), room)
    if (tile == 0) & (head == 0):
        tl.store(lengths + row, count)
    if tile * TILE < count:
        at = tile * TILE + tl.arange(0, TILE)
        cols = tl.arange(0, COLS)
        mask = (at < count)[:, None] & (cols < 2 * HEAD_SIZE)[None, :]
        rows = token_rows(
            block_table + row.to(tl.int64) * stride_table,
            first + at,
            at < count,
            stride_block,
            stride_token,
            g,
        )
        tokens = tl.load(
            pool + head.to(tl.int64) * stride_head + rows[:, None] + cols[None, :], mask=mask, other=0.0
        )
        out = staged + ((row.to(tl.int64) * room + at) * HEADS + head)[:, None] * (2 * HEAD_SIZE)
        tl.store(out + cols[None, :], tokens, mask=mask)
