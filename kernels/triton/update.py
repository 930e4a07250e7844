"""What a decode step owes the side store, for all rows in one launch; in most steps every program ends at once."""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.absorb import add_sums, sum_tokens
from vllm_rc_backend.kernels.triton.overlap import let_next_start
from vllm_rc_backend.kernels.triton.paged import page_of
from vllm_rc_backend.kernels.triton.statistics import finish_page


@triton.jit
def update_kernel(
    kv,
    block_table,
    seq_lens,
    codes,
    scales,
    rotation,
    states,
    plan_slot,
    plan_source,
    plan_first,
    plan_last,
    counters,
    key_weight,
    key_bias,
    key_scale,
    value_scale,
    stride_block,
    stride_head,
    stride_token,
    stride_table,
    S: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (1 + column tiles of a summary, heads, rows): statistics of a page finished now, and the summary.

    ``key_weight``, ``key_bias``: of ``completion.Features``, otherwise None.
    """
    let_next_start(OVERLAP)
    g: tl.constexpr = S.geometry
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv += head.to(tl.int64) * stride_head
    block_table += row.to(tl.int64) * stride_table
    if part == 0:
        seq_len = tl.load(seq_lens + row)
        if (seq_len > 0) & (seq_len % g.page_size == 0):
            page = page_of(block_table, seq_len // g.page_size - 1, seq_len > 0, g)
            finish_page(kv, codes, scales, rotation, page, head, key_scale, stride_block, stride_token, S)
    elif S.completion != "none":
        slot = tl.load(plan_slot + row)
        first = tl.load(plan_first + row)
        last = tl.load(plan_last + row)
        if (slot >= 0) & (first < last):
            source = tl.load(plan_source + row)
            if (source < 0) & (part == 1) & (head == 0):
                tl.atomic_add(counters + 7, 1, sem="relaxed")
            start = (part - 1) * COLS
            matrix, vector = sum_tokens(
                kv,
                block_table,
                key_weight,
                key_bias,
                head,
                first * g.page_size,
                last * g.page_size,
                start,
                key_scale,
                value_scale,
                stride_block,
                stride_token,
                S,
                COLS,
                TILE,
            )
            add_sums(matrix, vector, states, slot, source, head, start, S, COLS)
