"""The decaying memory as a layer of vLLM: its state lives where vLLM keeps the states of Mamba layers.

vLLM thereby allocates a float32 state for every sequence, moves it under preemption, and keeps copies for its prefix
cache, whatever attention backend reads the keys and values. The layer runs inside vLLM's ``short_conv`` operator, the
only one with a state and no further contract, so that torch.compile splits its graph there and CUDA graphs capture it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.short_conv import ShortConv  # noqa: F401 - defines torch.ops.vllm.short_conv
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from vllm_rc_backend.decaying_memory import launch_remember, remember
from vllm_rc_backend.kernels.reference import memory_step


class DecayingMemory(nn.Module, MambaBase):
    """Keys and values of one layer, each mixed with those before by a gate per channel that both share."""

    def __init__(self, channels: int, prefix: str) -> None:
        """``channels``: KV heads of this rank times head size."""
        super().__init__()
        self.channels, self.prefix = channels, prefix
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"duplicate layer name: {prefix}")
        layers[prefix] = self
        self.kv_cache = (torch.tensor([]),)

    def forward(self, keys_values: Tensor, gate: Tensor) -> Tensor:
        """The memory after every token.

        Args:
            keys_values: ``[tokens, 2 * channels]``, keys before values, in the model's dtype.
            gate: ``[tokens, channels]``, logits.

        Returns:
            Like ``keys_values``.
        """
        packed = torch.cat((keys_values, gate), dim=-1)  # the operator takes one tensor
        output = torch.empty_like(keys_values, memory_format=torch.contiguous_format)
        torch.ops.vllm.short_conv(packed, output, self.prefix)
        return output

    def forward_native(self, hidden_states: Tensor, output: Tensor) -> None:
        """What the operator runs on a CPU: ``hidden_states`` is ``packed`` above."""
        step = self._step()
        if step is None:
            output.zero_()
            return
        x, gate = hidden_states.float().split((2 * self.channels, self.channels), dim=-1)
        x, gate = x.unflatten(-1, (2, self.channels)), gate.sigmoid()
        out, states = output.unflatten(-1, (2, self.channels)), self.kv_cache[0]
        # Decode rows come first.
        decodes, end = step.num_decode_tokens, step.num_decode_tokens + step.num_prefill_tokens
        if decodes:
            rows = step.state_indices_tensor_d[:decodes, 0].long()
            new = memory_step(x[:decodes], gate[:decodes], states[rows])
            states[rows] = new
            out[:decodes] = new.to(out.dtype)
        if step.num_prefills:
            rows, starts = step.state_indices_tensor_p.long(), step.query_start_loc_p
            before = states[rows].where(step.has_initial_states_p.view(-1, 1, 1), 0.0)
            new = remember(x[decodes:end], gate[decodes:end], starts, before)
            states[rows] = new[starts[1:].long() - 1]
            out[decodes:end] = new.to(out.dtype)

    def forward_cuda(self, hidden_states: Tensor, output: Tensor) -> None:
        """The same on a GPU, in a launch for the decode rows and one for the prefills. Reads no device value."""
        step, states = self._step(), self.kv_cache[0]
        if (
            step is None
        ):  # no state yet: one sequence of all tokens, so that the kernel is compiled before it serves
            ends = torch.arange(2, dtype=torch.int32, device=output.device)
            states = torch.zeros(1, 2, self.channels, dtype=torch.float32, device=output.device)
            launch_remember(hidden_states, output, states, ends[:1], ends * len(output), ends[:1] > 0)
            return
        decodes = step.num_decode_tokens
        if decodes:
            # The padding rows of a captured batch share block 0, which no sequence owns.
            rows = step.state_indices_tensor_d[:decodes, 0]
            launch_remember(hidden_states, output, states, rows)
        if step.num_prefills:
            rest = (hidden_states[decodes:], output[decodes:], states, step.state_indices_tensor_p)
            launch_remember(*rest, step.query_start_loc_p, step.has_initial_states_p)

    def _step(self) -> Any:
        """vLLM's metadata of this layer; None while it profiles."""
        metadata = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.prefix]

    def get_state_shape(self) -> tuple[tuple[int, int]]:
        return ((2, self.channels),)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        return (torch.float32,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        # Decides the metadata only: which rows decode, their states' blocks, which prefills go on from a state.
        return MambaAttentionBackendEnum.SHORT_CONV
