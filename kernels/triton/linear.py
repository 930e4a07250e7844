"""The ``linear`` completion inside the decode kernel: twin of ``completion.Linear.residual``.

It enters twice: ``tilt`` once per (row, head) beside the splits of the exact part, and the residual in the merge.
Scores and log-masses are in base 2 here.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.matmul import dot

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(1e-30)


@triton.jit
def state_vector(state, row, S: tl.constexpr):
    """A row of a state from both bfloat16 planes: float32 ``[block_d]``. ``state`` points to (slot, head)."""
    cols = tl.arange(0, S.block_d)
    at = state + row * S.head_size + cols
    real = cols < S.head_size
    high = tl.load(at, mask=real, other=0.0).to(tl.float32)
    return high + tl.load(at + S.state_rows * S.head_size, mask=real, other=0.0).to(tl.float32)


@triton.jit
def tilt(query, stride_query_head, state, n, scale, S: tl.constexpr):
    """What the summary says of a query before it is known what was retrieved.

    Args:
        query: points to the first query head of the KV head.
        state: points to (slot, head).
        n: tokens of the mid region.

    Returns:
        (q^T C)/n - (q.K1/n)(V1/n) ``[block_m, block_d]`` with V1 in row ``group``, and q.K1 in base 2 ``[block_m]``.
    """
    M: tl.constexpr = S.block_m
    D: tl.constexpr = S.block_d
    CHUNK: tl.constexpr = min(D, 16384 // D)
    heads = tl.arange(0, M)
    cols = tl.arange(0, D)
    q_C = tl.zeros([M, D], tl.float32)
    q_K1 = tl.zeros([M], tl.float32)
    # All of a chunk is asked for before anything is multiplied: each answer is a trip to memory.
    V1 = state_vector(state, S.head_size + 1, S)
    for start in tl.static_range(0, D, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        at = state + S.head_size * S.head_size + rows
        K1 = tl.load(at, mask=rows < S.head_size, other=0.0).to(tl.float32)
        K1 += tl.load(at + S.state_rows * S.head_size, mask=rows < S.head_size, other=0.0).to(tl.float32)
        q = tl.load(
            query + heads[:, None] * stride_query_head + rows[None, :],
            mask=(heads < S.group)[:, None] & (rows < S.head_size)[None, :],
            other=0.0,
        ).to(tl.float32)
        C = tl.load(
            state + rows[:, None] * S.head_size + cols[None, :],
            mask=(rows < S.head_size)[:, None] & (cols < S.head_size)[None, :],
            other=0.0,
        )
        high = q.to(tl.bfloat16)
        q_C = dot(high, C, q_C)
        if query.dtype.element_ty != tl.bfloat16:
            q_C = dot((q - high.to(tl.float32)).to(tl.bfloat16), C, q_C)
        q_K1 += tl.sum(q * K1[None, :], 1)
    mean_score = q_K1 * (scale / n)
    result = q_C * (scale / n) - mean_score[:, None] * (V1 / n)[None, :]
    return tl.where((heads == S.group)[:, None], V1[None, :], result), q_K1 * (scale * LOG2_E)


@triton.jit
def damping(tilt_rows, n, S: tl.constexpr):
    """Of ``completion.Paged``, from the rows that ``tilt`` gives: float32 ``[block_m]``."""
    heads = tl.arange(0, S.block_m)
    squares = tl.sum(tilt_rows * tilt_rows, 1)
    mean = tl.sum(tl.where(heads == S.group, squares, 0.0), 0) / (n * n)
    return S.damping * squares / tl.maximum(squares + mean, SMALLEST)


@triton.jit
def residual_log_mass(q_K1, retrieved_scores, n, n_retrieved):
    """Log-mass (base 2) of what was not read, float32 ``[merge_rows]``.

    Args:
        q_K1: from ``tilt``, the first ``merge_rows`` rows.
        retrieved_scores: ``[merge_rows]``, sum of the retrieved tokens' scores in base 2.
        n, n_retrieved: tokens of the mid region, and of them retrieved (fewer).
    """
    n_U = (n - n_retrieved).to(tl.float32)
    return tl.log2(n_U) + (q_K1 - retrieved_scores) / n_U


@triton.jit
def residual_value(tilt_rows, retrieved_out, n, n_retrieved, S: tl.constexpr):
    """Mean value of what was not read, float32 ``[merge_rows, n]``.

    Args:
        tilt_rows: some columns of what ``tilt`` gives, the first ``merge_rows`` rows.
        retrieved_out: the same columns, the sum of the retrieved tokens' values in row ``group``.
    """
    heads = tl.arange(0, S.merge_rows)
    n_U = (n - n_retrieved).to(tl.float32)
    values = tl.sum(tl.where((heads == S.group)[:, None], tilt_rows - retrieved_out, 0.0), 0)
    return tilt_rows + (values / n_U)[None, :]
