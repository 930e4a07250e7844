"""Page statistics of finished pages, from the cache: twin of ``reference.finish_pages``."""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.launched import launched
from vllm_rc_backend.kernels.triton.paged import page_of, page_rows
from vllm_rc_backend.kernels.triton.runs import finish_runs

SMALLEST_SCALE = tl.constexpr(2.0**-14)
ROUND = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest even integer


@triton.jit
def _store_vector(x, codes, scales, index, S: tl.constexpr):
    """Round one statistic to its stored form. ``x`` float32 ``[block_d]``, ``index`` of the vector in the store."""
    cols = tl.arange(0, S.block_d)
    if codes.dtype.element_ty == tl.int8:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), 127.0), SMALLEST_SCALE)
        stored = scale.to(tl.float16)
        up = (stored.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
        stored = tl.where(stored.to(tl.float32) < scale, up, stored)
        tl.store(scales + index, stored)
        x = (tl.div_rn(x, stored.to(tl.float32)) + ROUND) - ROUND
    tl.store(codes + index * S.head_size + cols, x.to(codes.dtype.element_ty), mask=cols < S.head_size)


@triton.jit
def finish_page(kv, codes, scales, page, head, key_scale, stride_block, stride_token, S: tl.constexpr):
    """Statistics of one physical page of one head; ``kv`` points to the head."""
    g: tl.constexpr = S.geometry
    index = (page.to(tl.int64) * S.heads + head) * S.vectors
    if S.query_map == "runs":
        finish_runs(kv, codes, scales, page, index, key_scale, stride_block, stride_token, S)
    else:
        cols = tl.arange(0, S.block_d)
        rows = page_rows(page, tl.arange(0, g.page_size), stride_block, stride_token, g)
        real = (cols < S.head_size)[None, :]
        keys = tl.load(kv + rows[:, None] + cols[None, :], mask=real, other=0.0).to(tl.float32) * key_scale
        if S.query_map == "abs":
            low, high = tl.min(keys, 0), tl.max(keys, 0)
            first, second = (high + low) * 0.5, (high - low) * 0.5
        else:
            first = tl.sum(keys, 0) / g.page_size
            centred = keys - first[None, :]
            second = tl.sum(centred * centred, 0) / g.page_size
        _store_vector(first, codes, scales, index, S)
        if S.vectors == 2:
            _store_vector(second, codes, scales, index + 1, S)


@launched
def finish_pages_kernel(
    kv,
    block_table,
    seq_lens,
    query_start,
    codes,
    scales,
    key_scale,
    stride_block,
    stride_head,
    stride_token,
    stride_table,
    S: tl.constexpr,
):
    """Grid (pages that a row can finish, heads, rows): one page of one head each."""
    g: tl.constexpr = S.geometry
    head, row = tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + row)
    query_len = tl.load(query_start + row + 1) - tl.load(query_start + row)
    page = (seq_len - query_len) // g.page_size + tl.program_id(0)
    if page < seq_len // g.page_size:
        physical = page_of(block_table + row.to(tl.int64) * stride_table, page, page >= 0, g)
        finish_page(
            kv + head.to(tl.int64) * stride_head,
            codes,
            scales,
            physical,
            head,
            key_scale,
            stride_block,
            stride_token,
            S,
        )
