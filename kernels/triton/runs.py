"""The policy ``runs`` on the device: rotated run means at 2 bits, scored with one byte per element of the query.

Twin of ``selection/runs.py``. A byte holds four neighbouring elements, so the query is cut into four interleaved parts,
one for each place in a byte, and each part is multiplied with its two bits of all bytes as they lie in memory.

What limits is the number of instructions, not memory, hence these economies. Neighbouring runs of a page,
``S.runs_in_row`` of them, are one row of the matrix product, against a query that is repeated block by block along the
diagonal: with few query heads the columns would be padding otherwise. Places are masked where they are and never
shifted: the two lower ones are summed up apart, in units sixteen times as large. The highest is not masked either: it
is the whole byte, read as a signed number, and the other parts of the query make up for what else is in it. The
columns of a head are neighbours, and so a thread has all runs of a page and head, as far as ``S.runs_in_row`` is 2.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.reference import statistics
from vllm_rc_backend.kernels.triton.matmul import INTERPRETED, dot
from vllm_rc_backend.kernels.triton.paged import page_rows

# Added to the bits of this float32, an integer below 2^22 is added to its value: a conversion by one subtraction. The
# products of a head of 256 elements stay below 2.3 million whatever the query is.
ORIGIN = tl.constexpr(1.5 * 2**23)
ORIGIN_BITS = tl.constexpr(0x4B400000)
SMALLEST_SCALE = tl.constexpr(2.0**-14)
TOP_BIT = tl.constexpr(statistics.TOP_BIT)


@triton.jit
def hadamard(S: tl.constexpr):
    """Sylvester's Hadamard matrices along the diagonal, ones and minus ones: bfloat16 ``[block_q, block_q]``. Twin of
    ``selection.runs.hadamard``; the sign is the parity of the bits that row and column have in common.

    Made here, since memory would have to be asked for it.
    """
    ORDER: tl.constexpr = S.rotated // 4
    i, j = tl.arange(0, S.block_q)[:, None], tl.arange(0, S.block_q)[None, :]
    shared = i & j & (ORDER - 1)
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return tl.where(i // ORDER == j // ORDER, 1.0 - 2.0 * (shared & 1), 0.0).to(tl.bfloat16)


@triton.jit
def _rotate(x, matrix, PLANES: tl.constexpr):
    """The rotation of one place of all bytes, without its factor: the rows of ``x`` (float32 ``[block_q, n]``) to
    PLANES times 8 bits."""
    result = tl.zeros([x.shape[0], x.shape[1]], tl.float32)
    for _ in tl.static_range(PLANES):
        plane = x.to(tl.bfloat16)
        result = dot(matrix, plane, result)
        x -= plane.to(tl.float32)
    return result


@triton.jit
def _rotate_places(a, b, c, d, matrix, PLANES: tl.constexpr):
    """Rotate vectors given by the elements 4 j, 4 j + 1, 4 j + 2 and 4 j + 3: a Hadamard matrix of order 4 over the
    places and one over j, whose product is that of the whole. The result is sqrt(rotated) times too large."""
    p, q, r, s = a + b, a - b, c + d, c - d
    a = _rotate(p + r, matrix, PLANES)
    b = _rotate(q + s, matrix, PLANES)
    c = _rotate(p - r, matrix, PLANES)
    d = _rotate(q - s, matrix, PLANES)
    return a, b, c, d


@triton.jit
def query_places(query, stride_query_head, S: tl.constexpr):
    """Elements 4 j + place of the query heads, repeated for every run of a row: ``[block_q, columns, 4]``.

    Args:
        query: points to the first query head of the KV head.
    """
    Q: tl.constexpr = S.block_q  # Triton 3.6 takes no plain int in a shape
    C: tl.constexpr = S.columns
    j, column, place = tl.arange(0, Q), tl.arange(0, C), tl.arange(0, 4)
    head = column // S.runs_in_row
    return tl.load(
        query + (head * stride_query_head)[None, :, None] + (4 * j[:, None] + place[None, :])[:, None, :],
        mask=(head < S.group)[None, :, None] & (j < S.head_size // 4)[:, None, None],
        other=0.0,
    )


@triton.jit
def _along_diagonal(x, S: tl.constexpr):
    """Each run's columns in the rows of that run, zeros elsewhere: int32 ``[columns, row_bytes]``."""
    RUNS: tl.constexpr = S.runs_in_row
    COLUMNS: tl.constexpr = S.columns
    ROW: tl.constexpr = S.row_bytes
    own = tl.arange(0, RUNS)[:, None] == (tl.arange(0, COLUMNS) % RUNS)[None, :]
    return tl.trans(tl.reshape(tl.where(own[:, None, :], x[None, :, :], 0), [ROW, COLUMNS]))


@triton.jit
def query_parts(matrix, places, S: tl.constexpr):
    """A query, rotated and rounded to bytes.

    Args:
        matrix, places: from ``hadamard`` and ``query_places``, of an unscaled query.

    Returns:
        Four int8 ``[columns, row_bytes]``, for ``byte & 0x03``, ``byte & 0x0C``, ``byte & 0x30`` and the signed byte:
        16 times the sum of the first two plus that of the others is the product. Its factor, float32 ``[block_n]``, and
        what the sum starts from, int32 ``[columns]``: the bits of a float32 minus what the levels' origin adds.
    """
    Q: tl.constexpr = S.block_q  # Triton 3.6 takes no plain int in a shape
    C: tl.constexpr = S.columns
    even, odd = tl.split(tl.reshape(places.to(tl.float32), [Q, C, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    a, b, c, d = _rotate_places(a, b, c, d, matrix, 2)
    # A byte of levels is a + 4 b + 16 c + 64 (d - 2), and so the coefficients of a, b and c lack what the byte's adds.
    # Reduced once each, after the four parts have met element by element.
    d *= 0.25
    largest = tl.maximum(tl.abs(a - d / 16), tl.abs(b * 0.25 - d / 16))
    largest = tl.maximum(largest, tl.maximum(tl.abs(c - d), tl.abs(d)))
    # Half a unit is left for the rounding of d, which c makes up for.
    factor = tl.maximum(tl.max(largest, 0), 1e-30) / 126.5
    d = tl.floor(d / factor[None, :] + 0.5)
    a = tl.floor(a / factor[None, :] - d / 16 + 0.5)
    b = tl.floor(b / (4 * factor)[None, :] - d / 16 + 0.5)
    c = tl.floor(c / factor[None, :] - d + 0.5)
    # 1.5 times the sum of the coefficients, 16 (a + 4 b + c) + (1 + 4 + 16 + 64) d, less the 128 d that the signed byte
    # lacks. Half a unit of a sum of thousands is lost, nothing beside what two bits lose.
    shift = tl.sum((24 * a + 96 * b) + (24 * c - 0.5 * d), 0).to(tl.int32)
    factor *= 1.0 / (16.0 * tl.sqrt(tl.full([], S.rotated, tl.float32)))
    factor = tl.max(tl.reshape(factor, [S.block_n, S.runs_in_row]), 1)  # the same for all runs
    # All four in one, which changes threads once.
    parts = (a.to(tl.int32) & 0xFF) | (b.to(tl.int32) & 0xFF) << 8
    parts |= (c.to(tl.int32) & 0xFF) << 16 | d.to(tl.int32) << 24
    parts = _along_diagonal(parts, S)
    a, b, c, d = (
        parts.to(tl.int8),
        (parts >> 8).to(tl.int8),
        (parts >> 16).to(tl.int8),
        (parts >> 24).to(tl.int8),
    )
    return a, b, c, d, factor, -shift + ORIGIN_BITS


@triton.constexpr_function
def _and(mask):
    """PTX that masks four bytes at a time."""
    return f"and.b32 $0, $1, {mask * 0x01010101};"


@triton.jit
def _masked(codes, MASK: tl.constexpr):
    """Some bits of every byte, as int8."""
    if INTERPRETED:
        result = (codes & MASK).to(tl.int8)
    else:
        result = tl.inline_asm_elementwise(_and(MASK), "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    return result


@triton.jit
def _log2(x):
    """The hardware's, instead of a polynomial of twenty instructions."""
    if INTERPRETED:
        result = tl.log2(x)
    else:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.constexpr_function
def _log2_exact(power):
    """Of a power of two."""
    return power.bit_length() - 1


@triton.jit
def run_scores(codes, scales, index, a, b, c, d, factor, start, S: tl.constexpr, TILE: tl.constexpr):
    """Log-mean-exp over the runs of some pages, base 2: float32 ``[TILE, block_n]``.

    Args:
        index: of the pages' first vectors in the store, int64 ``[TILE]``.
        a, b, c, d, factor, start: from ``query_parts``; the factor gives scores in base 2.
    """
    V: tl.constexpr = S.vectors
    RUNS: tl.constexpr = S.runs_in_row
    ROWS: tl.constexpr = V // RUNS
    Q: tl.constexpr = S.block_q
    ROW: tl.constexpr = S.row_bytes
    N: tl.constexpr = S.block_n
    ALL: tl.constexpr = ROWS * TILE
    LOG2_RUNS: tl.constexpr = _log2_exact(V)
    first = tl.reshape((tl.arange(0, ROWS) * RUNS)[:, None] + index[None, :], [ALL])
    byte = tl.arange(0, ROW)
    at = first[:, None] * (S.head_size // 4) + (byte // Q * (S.head_size // 4) + byte % Q)[None, :]
    if Q == S.head_size // 4:
        stored = tl.load(codes + at)
    else:
        stored = tl.load(
            codes + at, mask=(first >= 0)[:, None] & (byte % Q < S.head_size // 4)[None, :], other=0
        )
    lower = tl.zeros([ALL, RUNS * N], tl.int32)
    lower = tl.dot(_masked(stored, 0x03), tl.trans(a), lower, out_dtype=tl.int32)
    lower = tl.dot(_masked(stored, 0x0C), tl.trans(b), lower, out_dtype=tl.int32)
    sums = lower * 16 + start[None, :]
    sums = tl.dot(_masked(stored, 0x30), tl.trans(c), sums, out_dtype=tl.int32)
    sums = tl.dot(stored.to(tl.int8, bitcast=True), tl.trans(d), sums, out_dtype=tl.int32)
    products = sums.to(tl.float32, bitcast=True) - ORIGIN
    # Page first, as they lie in memory: only loads of four bytes or more are issued ahead.
    unit = tl.load(scales + index[:, None] + tl.arange(0, V)[None, :])
    unit = tl.permute(tl.reshape(unit, [TILE, ROWS, RUNS]), (1, 0, 2)).to(tl.float32)
    scores = tl.reshape(products, [ROWS, TILE, N, RUNS]) * unit[:, :, None, :]
    # The factor is positive: the best is the best without it, and it comes with the subtraction in one instruction,
    # which divides by the number of runs, too.
    best = tl.max(tl.max(scores, 0), 2)
    subtracted = best * factor[None, :] + LOG2_RUNS
    weights = tl.exp2(scores * factor[None, None, :, None] - subtracted[None, :, :, None])
    return best * factor[None, :] + _log2(tl.sum(tl.sum(weights, 0), 2))


@triton.jit
def _run_means(kv, page, place: tl.constexpr, key_scale, stride_block, stride_token, S: tl.constexpr):
    """Elements 4 j + place of the run means of a physical page, float32 ``[block_q, 16]``: a matrix product takes 16
    columns, so eight runs come twice."""
    g: tl.constexpr = S.geometry
    Q: tl.constexpr = S.block_q  # Triton 3.6 takes no plain int in a shape
    run, j = tl.arange(0, 16) % S.vectors, tl.arange(0, Q)
    means = tl.zeros([Q, 16], tl.float32)
    length: tl.constexpr = g.page_size // S.vectors
    for token in tl.static_range(length):
        rows = page_rows(page, run * length + token, stride_block, stride_token, g)
        at = kv + rows[None, :] + (4 * j + place)[:, None]
        means += tl.load(at, mask=(j < S.head_size // 4)[:, None], other=0.0).to(tl.float32) * key_scale
    return means / length


@triton.jit
def finish_runs(kv, codes, scales, page, index, key_scale, stride_block, stride_token, S: tl.constexpr):
    """Store the run means of one physical page of one head; arguments as ``finish_page``, ``index`` of its vectors."""
    a = _run_means(kv, page, 0, key_scale, stride_block, stride_token, S)
    b = _run_means(kv, page, 1, key_scale, stride_block, stride_token, S)
    c = _run_means(kv, page, 2, key_scale, stride_block, stride_token, S)
    d = _run_means(kv, page, 3, key_scale, stride_block, stride_token, S)
    # A rotation keeps the mean square.
    square = tl.sum((a * a + b * b) + (c * c + d * d), 0)
    rms = tl.maximum(tl.sqrt(square / S.head_size), SMALLEST_SCALE).to(tl.float16).to(tl.float32)
    run, j = tl.arange(0, 16), tl.arange(0, S.block_q)
    real = run < S.vectors
    a, b, c, d = _rotate_places(a, b, c, d, hadamard(S), 3)
    root = tl.sqrt(tl.full([], S.rotated, tl.float32))
    step = (rms * root)[None, :]
    along = _along(a, step) + _along(b, step) + _along(c, step) + _along(d, step)
    scale = square / tl.maximum(along / root, SMALLEST_SCALE)
    tl.store(scales + index + run, tl.maximum(scale, SMALLEST_SCALE).to(tl.float16), mask=real)
    packed = _code(a / step) | _code(b / step) << 2 | _code(c / step) << 4 | _code(d / step) << 6
    tl.store(
        codes + (index + run)[None, :] * (S.head_size // 4) + j[:, None],
        (packed ^ TOP_BIT).to(tl.uint8),
        mask=real[None, :] & (j < S.head_size // 4)[:, None],
    )


@triton.jit
def _along(x, step):
    """What the elements of one place give to the product of each vector with its levels: float32 ``[16]``."""
    return tl.sum(x * (_code(x / step).to(tl.float32) - 1.5), 0)


@triton.jit
def _code(x):
    """The level of an element in units of the root mean square: 0 to 3, int32."""
    return (tl.minimum(tl.maximum(tl.floor(x), -2.0), 1.0) + 2.0).to(tl.int32)
