"""What decodes add to the summaries: in a step of decodes alone before any layer, for all layers in one launch.

A page enters a row's mid region at the earliest one step after its last token was written (``tail_tokens`` is at least
2), so what is summed up here has been in the cache of every layer since an earlier step. Beside prefills that does not
hold, see ``summaries_triton.SummaryUpdater``. In most steps no row has anything to add, and every program ends at once.
"""

import triton
import triton.language as tl

from vllm_rc_backend.kernels.triton.absorb import add_sums, sum_tokens
from vllm_rc_backend.kernels.triton.launched import launched


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    """An address as what lies there."""
    return tl.load(address).to(tl.pointer_type(dtype))


@launched
def update_kernel(
    addresses,
    factors,
    block_table,
    plan_slot,
    plan_source,
    plan_first,
    plan_last,
    counters,
    stride_block,
    stride_head,
    stride_token,
    stride_table,
    rows,
    layers,
    S: tl.constexpr,
    DTYPE: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Any number of programs: they share the work out evenly, whichever rows have some.

    Args:
        addresses: int64 ``[layers, 4]``, of the layer's cache ``[block, head, token, K then V]`` of DTYPE, of its side
            store's states, and of the key weights and biases of ``completion.Features``.
        factors: float32 ``[layers, 2]``, of a quantised cache's K and V.
        block_table: ``[rows, max_blocks]``.
        plan_slot, plan_source, plan_first, plan_last: of these rows, from ``SummaryPlanner.plan``.
        counters: int64, see ``attention_triton.COUNTERS``.
        ROWS: at least ``rows``.
    """
    g: tl.constexpr = S.geometry
    PARTS: tl.constexpr = (S.head_size + COLS - 1) // COLS
    row = tl.arange(0, ROWS)
    slots = tl.load(plan_slot + row, mask=row < rows, other=-1)
    first = tl.load(plan_first + row, mask=row < rows, other=0)
    last = tl.load(plan_last + row, mask=row < rows, other=0)
    busy = ((slots >= 0) & (first < last)).to(tl.int32)
    nth = tl.cumsum(busy, 0)  # of the rows with work, counted from 1
    each = layers * S.heads * PARTS
    program, programs = tl.program_id(0), tl.num_programs(0)
    for turn in range(tl.cdiv(tl.max(nth, 0) * each - program, programs)):
        item = program + turn * programs
        # Neighbours have the same keys to read, which the second-level cache then has.
        part, head, layer = item % PARTS, item // PARTS % S.heads, item // PARTS // S.heads % layers
        i = tl.max(tl.where((nth == item // each + 1) & (busy > 0), row, 0), 0)
        slot, source = tl.load(plan_slot + i), tl.load(plan_source + i)
        # What Triton would see of an address that it is launched with: vectors of several elements can be loaded.
        own = addresses + layer * 4
        kv = tl.multiple_of(_pointer(own, DTYPE), 16) + head.to(tl.int64) * stride_head
        state = tl.multiple_of(_pointer(own + 1, tl.bfloat16), 16)
        key_weight, key_bias = None, None
        if S.completion == "features":
            key_weight = tl.multiple_of(_pointer(own + 2, tl.float32), 16)
            key_bias = _pointer(own + 3, tl.float32)
        if (source < 0) & (part == 0) & (head == 0):
            tl.atomic_add(counters + 7, 1, sem="relaxed")
        matrix, vector = sum_tokens(
            kv,
            block_table + i.to(tl.int64) * stride_table,
            key_weight,
            key_bias,
            head,
            tl.load(plan_first + i) * g.page_size,
            tl.load(plan_last + i) * g.page_size,
            part * COLS,
            tl.load(factors + 2 * layer),
            tl.load(factors + 2 * layer + 1),
            stride_block,
            stride_token,
            S,
            COLS,
            TILE,
        )
        add_sums(matrix, vector, state, slot, source, head, part * COLS, S, COLS)
