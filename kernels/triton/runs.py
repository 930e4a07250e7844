"""The policy ``runs`` on the device: rotated run means at 2 bits, scored with one byte per element of the query.

Twin of ``selection/runs.py``. A byte holds four neighbouring elements, so the query is cut into four interleaved parts,
one for each place in a byte, and each part is multiplied with its two bits of all bytes as they lie in memory.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.matmul import INTERPRETED, dot
from vllm_rc_backend.kernels.triton.paged import page_rows

RUNS = tl.constexpr(8)
SHIFT_AND_MASK = tl.constexpr(
    tuple(f"shr.u32 $0, $1, {2 * place}; and.b32 $0, $0, 0x03030303;" for place in range(4))
)
SMALLEST_RMS = tl.constexpr(2.0**-14)


@triton.jit
def _hadamard(columns, S: tl.constexpr):
    """Columns of the +-1 Hadamard matrix (one for each block of a head size that is no power of two), bfloat16
    ``[block_d, n]``; zero beyond the head size."""
    rows = tl.arange(0, S.block_d)[:, None]
    bits = (rows % S.rotated) & (columns % S.rotated)[None, :]
    for shift in tl.static_range(3, -1, -1):
        bits ^= bits >> (1 << shift)
    real = (rows // S.rotated == (columns // S.rotated)[None, :]) & (rows < S.head_size)
    return tl.where(real, 1.0 - 2.0 * (bits & 1).to(tl.float32), 0.0).to(tl.bfloat16)


@triton.jit
def _rotate(x, columns, PLANES: tl.constexpr, S: tl.constexpr):
    """Elements ``columns`` of the rotated rows of ``x`` (float32 ``[16, block_d]``), to PLANES times 8 bits."""
    matrix = _hadamard(columns, S)
    result = tl.zeros([x.shape[0], columns.shape[0]], tl.float32)
    for _ in tl.static_range(PLANES):
        plane = x.to(tl.bfloat16)
        result = dot(plane, matrix, result)
        x -= plane.to(tl.float32)
    return result * (1.0 / tl.sqrt(tl.full([], S.rotated, tl.float32)))


@triton.jit
def query_parts(q, S: tl.constexpr):
    """A rotated query, rounded to bytes.

    Args:
        q: float32 ``[block_n, block_d]``, scaled.

    Returns:
        Four int8 ``[block_n, block_q]``; their factor and 1.5 times the sum of their elements, float32 ``[block_n]``.
    """
    quarter = 4 * tl.arange(0, S.block_q)
    a = _rotate(q, quarter, 2, S)
    b = _rotate(q, quarter + 1, 2, S)
    c = _rotate(q, quarter + 2, 2, S)
    d = _rotate(q, quarter + 3, 2, S)
    largest = tl.maximum(
        tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1)),
        tl.maximum(tl.max(tl.abs(c), 1), tl.max(tl.abs(d), 1)),
    )
    factor = tl.maximum(largest, 1e-30) / 127.0
    a = tl.floor(a / factor[:, None] + 0.5)
    b = tl.floor(b / factor[:, None] + 0.5)
    c = tl.floor(c / factor[:, None] + 0.5)
    d = tl.floor(d / factor[:, None] + 0.5)
    offset = 1.5 * (tl.sum(a, 1) + tl.sum(b, 1) + tl.sum(c, 1) + tl.sum(d, 1))
    return a.to(tl.int8), b.to(tl.int8), c.to(tl.int8), d.to(tl.int8), factor, offset


@triton.jit
def _level(codes, place: tl.constexpr):
    """Two bits of every byte, as int8."""
    if INTERPRETED:
        result = ((codes >> (2 * place)) & 3).to(tl.int8)
    else:
        # Four bytes at a time: bits that cross from one to the next are masked away.
        result = tl.inline_asm_elementwise(
            SHIFT_AND_MASK[place], "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )
    return result


@triton.jit
def run_scores(codes, scales, index, a, b, c, d, factor, offset, mask, S: tl.constexpr, TILE: tl.constexpr):
    """Score of a page's best run for each query head: float32 ``[TILE, block_n]``.

    Args:
        index: of the pages' first vectors in the store, int64 ``[TILE]``.
        a, b, c, d, factor, offset: from ``query_parts``.
    """
    vectors = tl.reshape(index[:, None] + tl.arange(0, RUNS)[None, :], [TILE * RUNS])
    real = tl.reshape(mask[:, None] & (tl.arange(0, RUNS) >= 0)[None, :], [TILE * RUNS])
    cols = tl.arange(0, S.block_q)
    stored = tl.load(
        codes + vectors[:, None] * (S.head_size // 4) + cols[None, :],
        mask=real[:, None] & (cols < S.head_size // 4)[None, :],
        other=0,
    )
    sums = tl.dot(_level(stored, 0), tl.trans(a), out_dtype=tl.int32)
    sums = tl.dot(_level(stored, 1), tl.trans(b), sums, out_dtype=tl.int32)
    sums = tl.dot(_level(stored, 2), tl.trans(c), sums, out_dtype=tl.int32)
    sums = tl.dot(_level(stored, 3), tl.trans(d), sums, out_dtype=tl.int32)
    rms = tl.load(scales + vectors, mask=real, other=0.0).to(tl.float32)
    scores = (sums.to(tl.float32) - offset[None, :]) * rms[:, None] * factor[None, :]
    return tl.max(tl.reshape(scores, [TILE, RUNS, S.block_n]), 1)


@triton.jit
def finish_runs(kv, codes, scales, page, index, key_scale, stride_block, stride_token, S: tl.constexpr):
    """Store the run means of one physical page of one head; arguments as ``finish_page``, ``index`` of its vectors."""
    g: tl.constexpr = S.geometry
    quarter = tl.arange(0, S.block_q)
    run = tl.arange(0, 16) % RUNS  # a matrix product takes 16 rows: the eight runs twice
    cols = tl.arange(0, S.block_d)
    width: tl.constexpr = S.block_d  # Triton 3.6 takes no plain int in a shape
    means = tl.zeros([16, width], tl.float32)
    length: tl.constexpr = g.page_size // RUNS
    for token in tl.static_range(length):
        rows = page_rows(page, run * length + token, stride_block, stride_token, g)
        keys = tl.load(kv + rows[:, None] + cols[None, :], mask=(cols < S.head_size)[None, :], other=0.0)
        means += keys.to(tl.float32) * key_scale
    means /= length
    # A rotation keeps the mean square.
    rms = tl.sqrt(tl.sum(means * means, 1) / S.head_size)
    rms = tl.maximum(rms, SMALLEST_RMS).to(tl.float16)
    real = tl.arange(0, 16) < RUNS
    tl.store(scales + index + tl.arange(0, 16), rms, mask=real)
    bytes_wide: tl.constexpr = S.block_q
    packed = tl.zeros([16, bytes_wide], tl.int32)
    for place in tl.static_range(4):
        x = _rotate(means, 4 * quarter + place, 3, S) / rms.to(tl.float32)[:, None]
        level = tl.minimum(tl.maximum(tl.floor(x), -2.0), 1.0) + 2.0
        packed |= level.to(tl.int32) << (2 * place)
    tl.store(
        codes + (index + tl.arange(0, 16))[:, None] * (S.head_size // 4) + quarter[None, :],
        packed.to(tl.uint8),
        mask=real[:, None] & (quarter < S.head_size // 4)[None, :],
    )
