"""The decaying memory's recurrence as an operator of torch: by Triton on a GPU, with a gradient, opaque to compilers.

What trains a model with a memory and what serves it both call ``linear_scan``; ``kernels.reference`` defines it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_rc_backend.kernels import reference

TILE, BLOCK = 64, 32
"""Tokens and channels that one Triton program holds at a time."""


def remember(x: Tensor, gate: Tensor, starts: Tensor, state: Tensor) -> Tensor:
    """y_t = g_t y_{t-1} + (1 - g_t) x_t; shapes as ``kernels.reference.linear_scan``, all float32."""
    y: Tensor = linear_scan(gate, (1 - gate).unsqueeze(1) * x, starts, state)
    return y


@torch.library.custom_op("rc_topk::linear_scan", mutates_args=(), device_types="cpu")
def linear_scan(decay: Tensor, total: Tensor, starts: Tensor, state: Tensor) -> Tensor:
    """``kernels.reference.linear_scan``."""
    return reference.linear_scan(decay, total, starts, state).clone()  # an operator returns no input


@linear_scan.register_kernel("cuda")
def launch_linear_scan(decay: Tensor, total: Tensor, starts: Tensor, state: Tensor) -> Tensor:
    """The same by Triton."""
    import triton

    from vllm_rc_backend.kernels.triton.memory import linear_scan_kernel

    out = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    groups, channels = total.shape[1:]
    grid = (len(state), groups, triton.cdiv(channels, BLOCK))
    linear_scan_kernel[grid](
        decay.contiguous(),
        total.contiguous(),
        starts,
        state.contiguous(),
        out,
        groups,
        channels,
        tile=TILE,
        block=BLOCK,
    )
    return out


def launch_remember(
    packed: Tensor,
    out: Tensor,
    states: Tensor,
    rows: Tensor,
    starts: Tensor | None = None,
    known: Tensor | None = None,
) -> None:
    """A served layer's memory on a GPU, in one launch that reads no value on the host.

    Args:
        packed: ``[tokens, 3 * channels]``: keys, values, logits of the gates.
        out: ``[tokens, 2 * channels]``, written: keys and values.
        states: float32 ``[blocks, 2, channels]`` of any first stride, updated in place.
        rows: int, each sequence's place among them.
        starts: int ``[sequences + 1]`` of a prefill; without it, every token is a decode row of its own.
        known: bool, of a prefill: whether a sequence has a state yet; otherwise it begins at zero.
    """
    import triton

    from vllm_rc_backend.kernels.triton.memory import remember_kernel

    channels = states.shape[-1]
    grid = (len(rows), 2, triton.cdiv(channels, BLOCK))
    remember_kernel[grid](
        packed,
        out,
        states,
        rows.contiguous(),
        starts,
        known,
        states.stride(0),
        channels,
        prefill=starts is not None,
        tile=TILE,
        block=BLOCK,
    )


@linear_scan.register_fake
def _shape(decay: Tensor, total: Tensor, starts: Tensor, state: Tensor) -> Tensor:
    return torch.empty_like(total, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
    """The gradient runs through the same recurrence from the end: h_t = grad_t + decay_{t+1} h_{t+1}."""
    decay, _, starts, state, y = ctx.saved_tensors
    first = starts[:-1].long()
    later = decay.roll(-1, 0)  # a sequence's last token meets another's decay here, times a state of zero
    backwards = (len(decay) - starts).flip(0)
    h = linear_scan(later.flip(0), grad.flip(0), backwards, torch.zeros_like(state)).flip(0)
    before = y.roll(1, 0).index_copy(0, first, state)
    return (h * before).sum(dim=1), h, None, h[first] * decay[first].unsqueeze(1)


linear_scan.register_autograd(_gradient, setup_context=_keep)
