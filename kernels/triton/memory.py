"""The memory's recurrence: twin of ``reference.linear_scan``; and all of a served layer's memory in one launch."""

import triton
import triton.language as tl


@triton.jit
def _compose(decay, total, next_decay, next_total):
    """The pair of a stretch and the one after it."""
    return decay * next_decay, next_decay * total + next_total


@triton.jit
def _scan_tile(decay, total, carry, rows, tile: tl.constexpr):
    """y of a tile of tokens after ``carry``, and its last row; tokens beyond the end have decay 1 and total 0."""
    total += tl.where(rows == 0, decay * carry[None, :], 0.0)
    _, y = tl.associative_scan((decay, total), 0, _compose)
    return y, tl.sum(tl.where(rows == tile - 1, y, 0.0), 0)


@triton.jit(do_not_specialize_on_alignment=["starts"])
def linear_scan_kernel(
    decay, total, starts, state, out, groups, channels, tile: tl.constexpr, block: tl.constexpr
):
    """Grid (sequences, groups, blocks of channels): one sequence each, ``tile`` tokens at a time."""
    sequence, group = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    cols = tl.program_id(2) * block + tl.arange(0, block)
    rows = tl.arange(0, tile)[:, None]
    carry = tl.load(state + (sequence * groups + group) * channels + cols, mask=cols < channels, other=0.0)
    for begin in range(first, last, tile):
        tokens = begin + rows.to(tl.int64)
        mask = (tokens < last) & (cols < channels)[None, :]
        place = (tokens * groups + group) * channels + cols[None, :]
        a = tl.load(decay + tokens * channels + cols[None, :], mask=mask, other=1.0)
        b = tl.load(total + place, mask=mask, other=0.0)
        y, carry = _scan_tile(a, b, carry, rows, tile)
        tl.store(out + place, y, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["packed", "out", "state_rows", "starts", "known"])
def remember_kernel(
    packed,
    out,
    states,
    state_rows,
    starts,
    known,
    stride_state,
    channels,
    prefill: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    """Grid (rows, 2, blocks of channels): keys or values of one sequence, from its state to its state.

    ``packed`` holds keys, values and gate logits of each token, ``out`` keys and values. A decode row is one token.
    """
    row, group = tl.program_id(0), tl.program_id(1)
    cols = tl.program_id(2) * block + tl.arange(0, block)
    real = cols < channels
    place = tl.load(state_rows + row).to(tl.int64) * stride_state + group * channels + cols
    carry = tl.load(states + place, mask=real, other=0.0)
    if prefill:
        carry = tl.where(tl.load(known + row) != 0, carry, 0.0)
        first, last = tl.load(starts + row), tl.load(starts + row + 1)
        rows = tl.arange(0, tile)[:, None]
        for begin in range(first, last, tile):
            tokens = begin + rows.to(tl.int64)
            mask = (tokens < last) & real[None, :]
            inputs = packed + tokens * 3 * channels + cols[None, :]
            gate = tl.sigmoid(tl.load(inputs + 2 * channels, mask=mask, other=0.0).to(tl.float32))
            x = tl.load(inputs + group * channels, mask=mask, other=0.0).to(tl.float32)
            decay = tl.where(mask, gate, 1.0)
            y, carry = _scan_tile(decay, (1 - decay) * x, carry, rows, tile)
            outputs = out + (tokens * 2 + group) * channels + cols[None, :]
            tl.store(outputs, y.to(out.dtype.element_ty), mask=mask)
    else:
        inputs = packed + row.to(tl.int64) * 3 * channels + cols
        gate = tl.sigmoid(tl.load(inputs + 2 * channels, mask=real, other=0.0).to(tl.float32))
        x = tl.load(inputs + group * channels, mask=real, other=0.0).to(tl.float32)
        carry = gate * carry + (1 - gate) * x
        outputs = out + (row.to(tl.int64) * 2 + group) * channels + cols
        tl.store(outputs, carry.to(out.dtype.element_ty), mask=real)
    tl.store(states + place, carry, mask=real)
