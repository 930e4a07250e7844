"""The policy ``runs`` on the device: rotated run means at 2 bits, scored with one byte per element of the query.

Twin of ``selection/runs.py``. A byte holds four neighbouring elements, so the query is cut into four interleaved parts,
one for each place in a byte, and each part is multiplied with its two bits of all bytes as they lie in memory.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.matmul import INTERPRETED, dot
from vllm_rc_backend.kernels.triton.paged import page_rows

SHIFT_AND_MASK = tl.constexpr(
    tuple(f"shr.u32 $0, $1, {2 * place}; and.b32 $0, $0, 0x03030303;" for place in range(4))
)
SMALLEST_RMS = tl.constexpr(2.0**-14)


@triton.jit
def _rotation_part(rotation, place: tl.constexpr, S: tl.constexpr):
    """Columns ``4 j + place`` of the rotation's matrix of ones and minus ones: bfloat16 ``[block_d, block_q]``."""
    rows, column = tl.arange(0, S.block_d), tl.arange(0, S.block_q)
    return tl.load(
        rotation + rows[:, None] * S.head_size + (place * (S.head_size // 4) + column)[None, :],
        mask=(rows < S.head_size)[:, None] & (column < S.head_size // 4)[None, :],
        other=0.0,
    )


@triton.jit
def _rotate_query(q, low, rotation, place: tl.constexpr, S: tl.constexpr):
    """A part of the rotated query, times sqrt(rotated): float32 ``[block_q, n]`` from ``[block_d, n]``."""
    matrix = tl.trans(_rotation_part(rotation, place, S))
    result = tl.zeros([matrix.shape[0], q.shape[1]], tl.float32)
    result = dot(matrix, q.to(tl.bfloat16), result)
    if q.dtype != tl.bfloat16:
        result = dot(matrix, low, result)
    return result


@triton.jit
def query_parts(q, rotation, S: tl.constexpr):
    """A query, rotated and rounded to bytes.

    Args:
        q: the query as it comes, unscaled, ``[block_d, n]``.
        rotation: bfloat16 ``[head_size, head_size]``, from ``attention_triton.rotation_matrix``.

    Returns:
        Four int8 ``[block_q, n]``; their factor and 1.5 times the sum of their elements, float32 ``[n]``.
    """
    low = (q.to(tl.float32) - q.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16)
    a = _rotate_query(q, low, rotation, 0, S)
    b = _rotate_query(q, low, rotation, 1, S)
    c = _rotate_query(q, low, rotation, 2, S)
    d = _rotate_query(q, low, rotation, 3, S)
    largest = tl.maximum(
        tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)),
        tl.maximum(tl.max(tl.abs(c), 0), tl.max(tl.abs(d), 0)),
    )
    factor = tl.maximum(largest, 1e-30) / 127.0
    a = tl.floor(a / factor[None, :] + 0.5)
    b = tl.floor(b / factor[None, :] + 0.5)
    c = tl.floor(c / factor[None, :] + 0.5)
    d = tl.floor(d / factor[None, :] + 0.5)
    offset = 1.5 * (tl.sum(a, 0) + tl.sum(b, 0) + tl.sum(c, 0) + tl.sum(d, 0))
    factor *= 1.0 / tl.sqrt(tl.full([], S.rotated, tl.float32))
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
    """Scores of all runs of some pages: float32 ``[vectors, TILE, n]``, run first so that a thread holds all of a page's.

    Args:
        index: of the pages' first vectors in the store, int64 ``[TILE]``.
        a, b, c, d, factor, offset: from ``query_parts``.
    """
    V: tl.constexpr = S.vectors
    VECTORS: tl.constexpr = V * TILE
    run = tl.arange(0, V)
    vectors = tl.reshape(run[:, None] + index[None, :], [VECTORS])
    real = tl.reshape((run >= 0)[:, None] & mask[None, :], [VECTORS])
    cols = tl.arange(0, S.block_q)
    stored = tl.load(
        codes + vectors[:, None] * (S.head_size // 4) + cols[None, :],
        mask=real[:, None] & (cols < S.head_size // 4)[None, :],
        other=0,
    )
    sums = tl.dot(_level(stored, 0), a, out_dtype=tl.int32)
    sums = tl.dot(_level(stored, 1), b, sums, out_dtype=tl.int32)
    sums = tl.dot(_level(stored, 2), c, sums, out_dtype=tl.int32)
    sums = tl.dot(_level(stored, 3), d, sums, out_dtype=tl.int32)
    rms = tl.load(scales + vectors, mask=real, other=0.0).to(tl.float32)
    scores = (sums.to(tl.float32) - offset[None, :]) * (rms[:, None] * factor[None, :])
    return tl.reshape(scores, [V, TILE, a.shape[1]])


@triton.jit
def _rotate(x, rotation, place: tl.constexpr, S: tl.constexpr):
    """A part of the rotated rows of ``x`` (float32 ``[16, block_d]``), to 24 bits."""
    matrix = _rotation_part(rotation, place, S)
    result = tl.zeros([x.shape[0], matrix.shape[1]], tl.float32)
    for _ in tl.static_range(3):
        plane = x.to(tl.bfloat16)
        result = dot(plane, matrix, result)
        x -= plane.to(tl.float32)
    return result * (1.0 / tl.sqrt(tl.full([], S.rotated, tl.float32)))


@triton.jit
def finish_runs(
    kv, codes, scales, rotation, page, index, key_scale, stride_block, stride_token, S: tl.constexpr
):
    """Store the run means of one physical page of one head; arguments as ``finish_page``, ``index`` of its vectors."""
    g: tl.constexpr = S.geometry
    byte = tl.arange(0, S.block_q)
    run = tl.arange(0, 16) % S.vectors  # a matrix product takes 16 rows: eight runs come twice
    cols = tl.arange(0, S.block_d)
    width: tl.constexpr = S.block_d  # Triton 3.6 takes no plain int in a shape
    means = tl.zeros([16, width], tl.float32)
    length: tl.constexpr = g.page_size // S.vectors
    for token in tl.static_range(length):
        rows = page_rows(page, run * length + token, stride_block, stride_token, g)
        keys = tl.load(kv + rows[:, None] + cols[None, :], mask=(cols < S.head_size)[None, :], other=0.0)
        means += keys.to(tl.float32) * key_scale
    means /= length
    # A rotation keeps the mean square.
    rms = tl.sqrt(tl.sum(means * means, 1) / S.head_size)
    rms = tl.maximum(rms, SMALLEST_RMS).to(tl.float16)
    real = tl.arange(0, 16) < S.vectors
    tl.store(scales + index + tl.arange(0, 16), rms, mask=real)
    bytes_wide: tl.constexpr = S.block_q
    packed = tl.zeros([16, bytes_wide], tl.int32)
    for place in tl.static_range(4):
        x = _rotate(means, rotation, place, S) / rms.to(tl.float32)[:, None]
        level = tl.minimum(tl.maximum(tl.floor(x), -2.0), 1.0) + 2.0
        packed |= level.to(tl.int32) << (2 * place)
    tl.store(
        codes + (index + tl.arange(0, 16))[:, None] * (S.head_size // 4) + byte[None, :],
        packed.to(tl.uint8),
        mask=real[:, None] & (byte < S.head_size // 4)[None, :],
    )
