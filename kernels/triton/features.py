"""The completion ``features`` on a GPU: twin of ``completion.Features``.

It enters twice: ``sum_features`` and ``add_features`` add pages to a summary, and in a decode step
``features_kernel``, a launch between scores and attention, reads the retrieved pages, maps their keys and leaves the
residual's log-mass and mean value for the merge. Those pages are read twice, the second time out of the second-level
cache as far as it holds them; the maps stay out of the attention's registers, and the attention as it is.

The maps are rounded to 16 bits and stay in shared memory while keys go by. Everything in base 2.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.choose import choose_pages
from vllm_rc_backend.kernels.triton.launched import launched
from vllm_rc_backend.kernels.triton.linear import LOG2_E
from vllm_rc_backend.kernels.triton.matmul import as_operand, dot, dot_split, operand_type
from vllm_rc_backend.kernels.triton.merge import PARTIAL_STATS
from vllm_rc_backend.kernels.triton.overlap import ARRIVAL, let_next_start, wait_for_previous
from vllm_rc_backend.kernels.triton.page_cache import cached_rows
from vllm_rc_backend.kernels.triton.paged import token_rows
from vllm_rc_backend.kernels.triton.regions import is_sparse, mid_end, retrieved_pages
from vllm_rc_backend.kernels.triton.summary import load_planes, store_planes

SMALLEST_COUNT = tl.constexpr(1e-6)
"""As in ``completion.features``."""

CHUNK = tl.constexpr(32)
"""Columns of a head that the residual's value is computed for at a time."""


@triton.jit
def _load_map(weight, dtype: tl.constexpr, S: tl.constexpr):
    """A map float32 ``[features, head_size]``, rounded to what it is multiplied with: ``[block_d, block_f]``."""
    D: tl.constexpr = S.block_d
    F: tl.constexpr = S.block_f
    cols, features = tl.arange(0, D), tl.arange(0, F)
    known = (cols < S.head_size)[:, None] & (features < S.features)[None, :]
    return tl.load(weight + features[None, :] * S.head_size + cols[:, None], mask=known, other=0.0).to(dtype)


@triton.jit
def _logits(x, weight, bias, scale, S: tl.constexpr, N: tl.constexpr):
    """``W x + b`` of some vectors: float32 ``[N, block_f]``, minus infinity where there is no feature.

    Args:
        x: ``[N, block_d]``, 16-bit.
        weight: from ``_load_map``.
        bias: points to float32 ``[features]``.
        scale: factor of the vectors.
    """
    F: tl.constexpr = S.block_f
    features = tl.arange(0, F)
    known = features < S.features
    b = tl.load(bias + features, mask=known, other=0.0)
    logits = (dot(x, weight, tl.zeros([N, F], tl.float32)) * scale + b[None, :]) * LOG2_E
    return tl.where(known[None, :], logits, float("-inf"))


@triton.jit
def _map_keys(keys, real, weight, bias, key_scale, S: tl.constexpr, N: tl.constexpr):
    """phi of some keys: float32 ``[N, block_f]``, rows sum to one, those that are not ``real`` to zero."""
    logits = _logits(keys, weight, bias, key_scale, S, N)
    phi = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return tl.where(real[:, None], phi / tl.sum(phi, 1)[:, None], 0.0)


@triton.jit
def sum_features(
    kv,
    block_table,
    weight,
    bias,
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
    """Columns ``[start, start + COLS)`` of S over tokens ``[begin, end)``. All pointers are to the head.

    Returns:
        float32 ``[block_f, COLS]``, and u ``[block_f]``.
    """
    g: tl.constexpr = S.geometry
    d: tl.constexpr = S.head_size
    F: tl.constexpr = S.block_f
    cols = start + tl.arange(0, COLS)
    elements = tl.arange(0, S.block_d)
    real_cols = cols < d
    key_map = _load_map(weight, operand_type(kv.dtype.element_ty), S)
    weighted = tl.zeros([F, COLS], tl.float32)
    u = tl.zeros([F], tl.float32)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        real = token < end
        at = kv + token_rows(block_table, token, real, stride_block, stride_token, g)
        keys = tl.load(
            at[:, None] + elements[None, :], mask=real[:, None] & (elements < d)[None, :], other=0.0
        )
        phi = _map_keys(as_operand(keys), real, key_map, bias, key_scale, S, TILE)
        values = tl.load(at[:, None] + d + cols[None, :], mask=real[:, None] & real_cols[None, :], other=0.0)
        # Added in float32, as in ``sum_columns``: matrix units truncate what they add up.
        added = dot_split(tl.trans(phi), as_operand(values), tl.zeros([F, COLS], tl.float32))
        weighted += added * value_scale
        u += tl.sum(phi, 0)
    return weighted, u


@triton.jit
def add_features(weighted, u, state, source, source_slot, start, S: tl.constexpr, COLS: tl.constexpr):
    """Write columns of S, and with the first of them u: these sums, plus ``source`` if its slot is not -1. Pointers are
    to the head.
    """
    d: tl.constexpr = S.head_size
    features = tl.arange(0, S.block_f)
    cols = start + tl.arange(0, COLS)
    known = features < S.features
    LOW: tl.constexpr = S.state_rows * d  # from the high plane to the low one
    tile = features[:, None] * d + cols[None, :]
    whole = known[:, None] & (cols < d)[None, :]
    counts = S.features * d + features
    if source_slot >= 0:
        weighted += load_planes(source + tile, whole, LOW)
        u += load_planes(source + counts, known, LOW)
    store_planes(state + tile, weighted, whole, LOW)
    if start == 0:
        U: tl.constexpr = S.block_u
        padding = tl.arange(0, U)
        padded = (padding >= S.features) & (padding < LOW - S.features * d)
        zeros = tl.zeros([U], tl.float32)
        store_planes(state + S.features * d + padding, zeros, padded, LOW)
        store_planes(state + counts, u, known, LOW)


@launched
def features_kernel(
    query,
    kv,
    content,
    reading,
    key_weight,
    key_bias,
    query_weight,
    query_bias,
    states,
    block_table,
    seq_lens,
    slots,
    keys,
    maxima,
    masses,
    groups,
    chosen,
    partial_out,
    partial_stats,
    counts,
    arrived,
    scale,
    key_scale,
    value_scale,
    stride_row,
    stride_query_head,
    stride_block,
    stride_head,
    stride_token,
    stride_table,
    max_pages,
    max_groups,
    max_selected,
    max_read,
    scorers,
    attenders,
    S: tl.constexpr,
    MASSES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (heads, attenders, rows): the pages of each row, and what they leave of its summary.

    The programs of a (row, head) share out its retrieved pages, each finds its own, as in ``decode_kernel``, and the
    last to arrive writes the residual where the merge looks for it. Arguments as there, and:

    Args:
        key_weight, key_bias, query_weight, query_bias: of ``completion.Features``.
        partial_out: row ``attenders`` out: the residual's mean value; the others are scratch.
        partial_stats: row ``attenders`` out: its log-mass.
        counts: float32 ``[rows, heads, attenders, features]`` scratch.
        arrived: int32 ``[rows, heads, ARRIVAL]``, zero between launches.
    """
    let_next_start(OVERLAP)
    g: tl.constexpr = S.geometry
    D: tl.constexpr = S.block_d
    M: tl.constexpr = S.block_m
    F: tl.constexpr = S.block_f
    d: tl.constexpr = S.head_size
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + row)
    slot = tl.load(slots + row)
    pages = mid_end(seq_len, g) - g.sink_pages
    retrieved = retrieved_pages(seq_len, g)
    share = tl.cdiv(retrieved, attenders)
    splits = tl.cdiv(retrieved, tl.maximum(share, 1))

    lane = row.to(tl.int64) * S.heads + head
    keys += lane * max_pages * S.key_width
    maxima += lane * max_groups * S.key_width
    masses += lane * scorers * (2 * S.block_n)
    chosen += lane * max_selected
    partial_out += lane * (attenders + 1) * S.merge_rows * D
    partial_stats += (lane * (attenders + 1) + attenders) * PARTIAL_STATS * S.merge_rows
    counts += lane * attenders * S.features
    arrived += lane * ARRIVAL
    query += row.to(tl.int64) * stride_row + head * S.group * stride_query_head
    block_table += row.to(tl.int64) * stride_table
    kv += head.to(tl.int64) * stride_head
    if reading is not None:
        reading += lane * max_read
    key_weight += head * S.features * d
    query_weight += head * S.features * d
    key_bias += head * S.features
    query_bias += head * S.features
    state = states + (tl.maximum(slot, 0).to(tl.int64) * S.heads + head) * (2 * S.state_rows * d)

    wait_for_previous(OVERLAP)
    if is_sparse(seq_len, g) & (split < splits):
        first, last = split * share, tl.minimum((split + 1) * share, retrieved)
        if reading is None:
            choose_pages(
                keys,
                maxima,
                masses,
                scorers,
                groups + (lane * attenders + split) * max_selected,
                chosen,
                pages,
                retrieved,
                first,
                last,
                S,
                MASSES,
                GROUP,
                BLOCK,
                SINGLE,
            )
        if slot >= 0:
            heads = tl.arange(0, M)
            cols = tl.arange(0, D)
            features = tl.arange(0, F)
            known = features < S.features
            asked = heads < S.group
            out_at = heads[:, None] * D + cols[None, :]
            real_out = asked[:, None] & (cols < d)[None, :]
            q = tl.load(query + heads[:, None] * stride_query_head + cols[None, :], mask=real_out, other=0.0)
            logits = _logits(q, _load_map(query_weight, q.dtype, S), query_bias, scale, S, M)
            most = tl.max(logits, 1)
            # Rounded once and for all, so that what is subtracted was weighted as what it is subtracted from.
            psi = tl.exp2(logits - most[:, None]).to(tl.bfloat16)

            key_map = _load_map(key_weight, operand_type(kv.dtype.element_ty), S)
            weighted = tl.zeros([M, D], tl.float32)
            u = tl.zeros([F], tl.float32)
            for start in range(first * g.page_size, last * g.page_size, TILE):
                j = start + tl.arange(0, TILE)
                real = j < last * g.page_size
                if reading is None:
                    place = tl.load(chosen + j // g.page_size, mask=real, other=0)
                    token = place * g.page_size + g.sink_tokens + j % g.page_size
                    at = kv + token_rows(block_table, token, real, stride_block, stride_token, g)
                else:
                    at = cached_rows(kv, content, reading, j, real, stride_block, stride_token, S)
                there = real[:, None] & (cols < d)[None, :]
                tokens = tl.load(at[:, None] + cols[None, :], mask=there, other=0.0)
                values = tl.load(at[:, None] + d + cols[None, :], mask=there, other=0.0)
                phi = _map_keys(as_operand(tokens), real, key_map, key_bias, key_scale, S, TILE)
                u += tl.sum(phi, 0)
                weights = dot(phi.to(tl.bfloat16), tl.trans(psi), tl.zeros([TILE, M], tl.float32))
                weighted = dot(
                    tl.trans(weights).to(tl.bfloat16), as_operand(values).to(tl.bfloat16), weighted
                )
            tl.store(partial_out + split * S.merge_rows * D + out_at, weighted * value_scale, mask=real_out)
            tl.store(counts + split * S.features + features, u, mask=known)

            tl.debug_barrier()  # all of this program's partial is written before it arrives
            if tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1:
                tl.store(arrived, 0)
                _residual(most, psi, state, partial_out, partial_stats, counts, splits, attenders, S, SPLITS)


@triton.jit
def _residual(
    most,
    psi,
    state,
    partial_out,
    partial_stats,
    counts,
    splits,
    attenders,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Subtract what all programs of a (row, head) retrieved from its summary; write the rest's log-mass and mean value.

    Args:
        most: float32 ``[block_m]``, the largest of ``A q + a``.
        psi: bfloat16 ``[block_m, block_f]``, their exponentials, divided by that of the largest.
    """
    F: tl.constexpr = S.block_f
    M: tl.constexpr = S.block_m
    D: tl.constexpr = S.block_d
    d: tl.constexpr = S.head_size
    heads, features, split = tl.arange(0, M), tl.arange(0, F), tl.arange(0, SPLITS)
    known, asked, there = features < S.features, heads < S.group, split < splits
    retrieved = tl.load(
        counts + split[:, None] * S.features + features[None, :],
        mask=there[:, None] & known[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    u = load_planes(state + S.features * d + features, known, S.state_rows * d) - tl.sum(retrieved, 0)
    mass = tl.sum(psi.to(tl.float32) * tl.maximum(u, SMALLEST_COUNT)[None, :], 1)
    tl.store(partial_stats + heads, most + tl.log2(mass), mask=asked)
    for start in tl.static_range(0, D, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        some = cols < d
        at = heads[:, None] * D + cols[None, :]
        real = asked[:, None] & some[None, :]
        weighted = tl.load(
            partial_out + split[:, None, None] * (S.merge_rows * D) + at[None, :, :],
            mask=there[:, None, None] & real[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        rows = tl.load(
            state + features[:, None] * d + cols[None, :], mask=known[:, None] & some[None, :], other=0.0
        )
        value = dot(psi, rows, -tl.sum(weighted, 0)) / mass[:, None]
        tl.store(partial_out + attenders * (S.merge_rows * D) + at, value, mask=real)
