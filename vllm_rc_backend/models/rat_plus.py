"""RAT+ (arXiv 2602.18196) for vLLM: Llama whose keys and values pass through a decaying memory before RoPE.

``config.json`` is Llama's with ``"architectures": ["RATPlusForCausalLM"]``. The checkpoint has one more matrix and bias
per layer, ``self_attn.memory_gate``: hidden size to KV heads times head size, the logits of the gates. The output gate
of the paper's model is not part of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM

from vllm_rc_backend.compat import UnsupportedError
from vllm_rc_backend.models.memory import DecayingMemory


class RATPlusAttention(LlamaAttention):
    """Llama's attention over remembered keys and values."""

    def __init__(self, config: Any, hidden_size: int, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, hidden_size, *args, prefix=prefix, **kwargs)
        self.memory_gate = ColumnParallelLinear(
            hidden_size,
            self.total_num_kv_heads * self.head_dim,
            bias=True,
            prefix=f"{prefix}.memory_gate",
        )
        self.memory = DecayingMemory(self.kv_size, f"{prefix}.memory")

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        gate, _ = self.memory_gate(hidden_states)
        query, keys_values = qkv.split([self.q_size, 2 * self.kv_size], dim=-1)
        key, value = self.memory(keys_values, gate).split(self.kv_size, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output


class RATPlusForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid):
    """The model that vLLM loads. Hybrid in vLLM's sense: every layer has a KV cache and a recurrent state.

    Raises:
        UnsupportedError: speculative decoding, or more ranks than can share the KV heads.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.speculative_config is not None:
            raise UnsupportedError(
                "RATPlusForCausalLM does not work with --speculative-config: the memory of rejected tokens cannot be "
                "taken back. Start without it."
            )
        ranks = vllm_config.parallel_config.tensor_parallel_size
        heads = vllm_config.model_config.get_total_num_kv_heads()
        if heads % ranks:
            raise UnsupportedError(
                f"RATPlusForCausalLM: --tensor-parallel-size {ranks} does not divide the model's {heads} KV heads, and "
                "a head's gates are not split between ranks. Use a divisor."
            )
        layer = partial(LlamaDecoderLayer, attn_layer_type=RATPlusAttention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, int]]:
        """As ``DecayingMemory``; vLLM asks before there is a layer."""
        model = vllm_config.model_config
        return ((2, model.get_num_kv_heads(vllm_config.parallel_config) * model.get_head_size()),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype]:
        """As ``DecayingMemory``."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any]:
        """How the prefix cache copies a state: all of it."""
        return (get_temporal_copy_spec,)
