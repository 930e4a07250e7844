"""A gated, exponentially decaying memory over a sequence: y_t = g_t y_{t-1} + (1 - g_t) x_t, channel by channel.

RAT+ (arXiv 2602.18196) puts it over keys and values before RoPE; arXiv 2605.28640 decodes such models sparsely. All of
it is float32: in bfloat16 the state stops moving where gates are near one (docs/decisions.md).
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_step(x: Tensor, gate: Tensor, state: Tensor) -> Tensor:
    """One step of every row.

    Args:
        x, state: float32 ``[rows, groups, channels]``.
        gate: float32 ``[rows, channels]`` from 0 to 1, shared by the groups (keys and values).

    Returns:
        The new state, which is also the output.
    """
    gate = gate.unsqueeze(1)
    return gate * state + (1 - gate) * x


def linear_scan(decay: Tensor, total: Tensor, starts: Tensor, state: Tensor) -> Tensor:
    """y_t = decay_t y_{t-1} + total_t over several sequences laid end to end: log2(tokens) passes, not one per token.

    A pair (decay a, total b) stands for y -> a y + b; composing it with the pair of the tokens before it gives the pair
    of the longer stretch, so that stretches double. A sequence's first token takes the state before it into its total
    and has decay zero: no stretch reaches across. The memory is the case decay = g, total = (1 - g) x.

    Args:
        decay: float32 ``[tokens, channels]``, shared by the groups.
        total: float32 ``[tokens, groups, channels]``.
        starts: int ``[sequences + 1]``, the first token of each sequence (of at least one token), and the end.
        state: float32 ``[sequences, groups, channels]``, y before each sequence.

    Returns:
        float32, like ``total``. A sequence's state after its last token is its last row.
    """
    first = starts[:-1].long()
    decay = decay.unsqueeze(1)
    total = total.index_add(0, first, decay[first] * state)
    decay = decay.index_fill(0, first, 0.0)
    reach = 1
    while reach < len(total):
        # Masked, not only multiplied: another sequence's infinity times zero would be NaN.
        carried = torch.where(decay[reach:] == 0, 0.0, decay[reach:] * total[:-reach])
        total = torch.cat((total[:reach], total[reach:] + carried))
        decay = torch.cat((decay[:reach], decay[reach:] * decay[:-reach]))
        reach *= 2
    return total
