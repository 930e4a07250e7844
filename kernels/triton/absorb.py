"""Adding pages to summaries: of decodes by ``update_kernel``, of a prefill's chunk by ``absorb_kernel``.

Twin of ``reference.absorb_pages`` for every completion. What is summed up of a range of tokens is a matrix and a
vector, whatever they mean: of ``linear`` and ``paged`` C, with K1 and V1; of ``features`` S, with u.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.features import add_features, sum_features
from vllm_rc_backend.kernels.triton.launched import launched
from vllm_rc_backend.kernels.triton.overlap import ARRIVAL
from vllm_rc_backend.kernels.triton.summary import add_columns, sum_columns


@triton.jit
def sum_tokens(
    kv,
    block_table,
    key_weight,
    key_bias,
    head,
    begin,
    end,
    start,
    key_scale,
    value_scale,
    stride_block,
    stride_token,
    S: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Columns ``[start, start + COLS)`` of a state over tokens ``[begin, end)``.

    Args:
        kv: points to the head.
        block_table: points to the row.
        key_weight, key_bias: of ``completion.Features``, all heads; otherwise None.

    Returns:
        float32 ``[sum_rows, COLS]``, and a vector: u ``[block_f]``, or K1 and V1 by turns ``[2 * COLS]``.
    """
    if S.completion == "features":
        matrix, vector = sum_features(
            kv,
            block_table,
            key_weight + head * S.features * S.head_size,
            key_bias + head * S.features,
            begin,
            end,
            start,
            key_scale,
            value_scale,
            stride_block,
            stride_token,
            S,
            COLS,
            TILE,
        )
    else:
        matrix, K1, V1 = sum_columns(
            kv,
            block_table,
            begin,
            end,
            start,
            key_scale,
            value_scale,
            stride_block,
            stride_token,
            S,
            COLS,
            TILE,
        )
        vector = tl.reshape(tl.join(K1, V1), [2 * COLS])
    return matrix, vector


@triton.jit
def add_sums(matrix, vector, states, slot, source, head, start, S: tl.constexpr, COLS: tl.constexpr):
    """Write these columns of slot ``slot``: the sums, plus what slot ``source`` holds if it is not -1."""
    size: tl.constexpr = 2 * S.state_rows * S.head_size
    state = states + (slot.to(tl.int64) * S.heads + head) * size
    copied = states + (tl.maximum(source, 0).to(tl.int64) * S.heads + head) * size
    if S.completion == "features":
        add_features(matrix, vector, state, copied, source, start, S, COLS)
    else:
        K1, V1 = tl.split(tl.reshape(vector, [COLS, 2]))
        add_columns(matrix, K1, V1, state, copied, source, start, S, COLS)


@launched
def absorb_kernel(
    kv,
    block_table,
    states,
    plan_slot,
    plan_source,
    plan_first,
    plan_last,
    partials,
    arrived,
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
    LEAST: tl.constexpr,
):
    """Grid (column tiles * most ranges, heads, rows): the pages of a plan's rows, a range of them to a program.

    Each row's pages are shared out evenly, ``LEAST`` at least to a range, so that one long row fills the GPU. The last
    program of a (row, head, column tile) to arrive adds all ranges up, in the order of the pages whoever is last.

    Args:
        partials: float32 scratch, for each program the matrix and the vector of ``sum_tokens``.
        arrived: int32 ``[rows, heads, ARRIVAL]``, zero between launches; a number for each column tile.
    """
    g: tl.constexpr = S.geometry
    tiles: tl.constexpr = (S.head_size + COLS - 1) // COLS
    N: tl.constexpr = S.block_f if S.completion == "features" else 2 * COLS
    R: tl.constexpr = S.sum_rows
    head, row = tl.program_id(1), tl.program_id(2)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    most = tl.num_programs(0) // tiles
    slot = tl.load(plan_slot + row)
    first = tl.load(plan_first + row)
    last = tl.load(plan_last + row)
    share = tl.maximum(tl.cdiv(last - first, most), LEAST)
    splits = tl.cdiv(last - first, share)
    if (slot >= 0) & (split < splits):
        source = tl.load(plan_source + row)
        begin = first + split * share
        matrix, vector = sum_tokens(
            kv + head.to(tl.int64) * stride_head,
            block_table + row.to(tl.int64) * stride_table,
            key_weight,
            key_bias,
            head,
            begin * g.page_size,
            tl.minimum(begin + share, last) * g.page_size,
            tile * COLS,
            key_scale,
            value_scale,
            stride_block,
            stride_token,
            S,
            COLS,
            TILE,
        )
        complete = splits == 1
        if splits > 1:
            lane = row.to(tl.int64) * S.heads + head
            partials += (lane * tiles + tile) * most * (R * COLS + N)
            at = tl.arange(0, R)[:, None] * COLS + tl.arange(0, COLS)[None, :]
            behind = R * COLS + tl.arange(0, N)
            own = partials + split * (R * COLS + N)
            tl.store(own + at, matrix)
            tl.store(own + behind, vector)
            tl.debug_barrier()  # all of this program's partial is written before it arrives
            arrived += lane * ARRIVAL + tile
            complete = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
            if complete:
                tl.store(arrived, 0)
                matrix = tl.zeros([R, COLS], tl.float32)
                vector = tl.zeros([N], tl.float32)
                for i in range(splits):
                    other = partials + i * (R * COLS + N)
                    matrix += tl.load(other + at, cache_modifier=".cg")
                    vector += tl.load(other + behind, cache_modifier=".cg")
        if complete:
            add_sums(matrix, vector, states, slot, source, head, tile * COLS, S, COLS)
