"""The memory's recurrence: twin of ``reference.linear_scan``."""

import triton
import triton.language as tl


@triton.jit
def _compose(decay, total, next_decay, next_total):
    """The pair of a stretch and the one after it."""
    return decay * next_decay, next_decay * total + next_total


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
        b += tl.where(rows == 0, a * carry[None, :], 0.0)
        _, y = tl.associative_scan((a, b), 0, _compose)
        tl.store(out + place, y, mask=mask)
        carry = tl.sum(tl.where(rows == tile - 1, y, 0.0), 0)
