"""A Llama-style model in plain torch, split where an evaluation needs it: prefill, then a window of positions.

Covers the dense decoders that share Llama's layout (Llama, Mistral, Qwen2, Qwen3) from ``config.json`` and
safetensors, and RAT+, which is Llama with a decaying memory over keys and values. The attention of the window is the
caller's, so that dense and sparse runs differ in nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from vllm_rc_backend.decaying_memory import remember
from vllm_rc_backend.evaluation.snapkv import OBSERVED

RAT_PLUS = "RATPlusForCausalLM"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", RAT_PLUS)

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(query ``[batch, window, heads, group, d]`` scaled, keys, values ``[batch, heads, tokens, d]``, layer) -> like query.

float32 queries and result; keys and values hold the whole sequence in the cache's dtype.
"""


@dataclass(frozen=True)
class KVCache:
    """Post-RoPE keys and values of each layer, ``[batch, heads, tokens, d]``, in the cache's dtype.

    ``queries``: those of the last ``OBSERVED`` tokens, scaled, float32 ``[batch, observed, heads, group, d]``.
    ``memories``: of RAT+, each layer's state after the last token, float32 ``[batch, 2, heads * d]``, else None.
    """

    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    memories: list[Tensor | None]

    @property
    def tokens(self) -> int:
        """Tokens held per sequence."""
        return self.keys[0].shape[2]


class Llama:
    """The model. Weights stay in the checkpoint's dtype; the window computes in float32."""

    def __init__(
        self, directory: Path, device: torch.device | str, cache_dtype: torch.dtype | None = None
    ) -> None:
        """``cache_dtype``: of keys and values (default: the checkpoint's)."""
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        architecture = (self.config.get("architectures") or ["?"])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{directory}: architecture {architecture} is not one of {', '.join(ARCHITECTURES)}"
            )
        self.has_memory = architecture == RAT_PLUS
        self.device = torch.device(device)
        self.layers: int = self.config["num_hidden_layers"]
        self.query_heads: int = self.config["num_attention_heads"]
        self.heads: int = self.config.get("num_key_value_heads") or self.query_heads
        self.head_size: int = self.config.get("head_dim") or self.config["hidden_size"] // self.query_heads
        self.weights = {
            name: tensor.to(self.device)
            for file in sorted(directory.glob("*.safetensors"))
            for name, tensor in _read(file)
        }
        self.frequencies = _rope_frequencies(self.config, self.head_size).to(self.device)
        self.cache_dtype = cache_dtype or self.weights["model.embed_tokens.weight"].dtype

    def prefill(self, tokens: Tensor) -> KVCache:
        """Dense causal attention over whole prompts, int64 ``[batch, length]``."""
        positions = torch.arange(tokens.shape[1], device=self.device)
        x = self.weights["model.embed_tokens.weight"][tokens]
        if self.device.type == "cpu":
            x = x.float()
        cache = KVCache([], [], [], [])
        for layer in range(self.layers):
            query, key, value, memory = self._project(layer, x, positions, None)
            cache.memories.append(memory)
            cache.keys.append(key.to(self.cache_dtype))
            cache.values.append(value.to(self.cache_dtype))
            cache.queries.append(self._grouped(query[:, -OBSERVED:].float()))
            if layer + 1 == self.layers:
                break  # nothing needs its output
            out = functional.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, is_causal=True, enable_gqa=True
            )
            x = self._rest(layer, x, out.transpose(1, 2).flatten(2))
        return cache

    def window(self, cache: KVCache, tokens: Tensor, attention: Attention) -> Tensor:
        """Logits of the tokens that follow a cache, each computed with the given attention in every layer.

        Like an engine that decodes them one by one: keys and values of the window are those that this attention
        produced, rounded to the cache's dtype.

        Args:
            tokens: int64 ``[batch, window]``.

        Returns:
            float32 ``[batch, window, vocabulary]``.
        """
        positions = torch.arange(cache.tokens, cache.tokens + tokens.shape[1], device=self.device)
        x = self._weight("model.embed_tokens.weight", torch.float32)[tokens.to(self.device)]
        for layer in range(self.layers):
            query, key, value, _ = self._project(layer, x, positions, cache.memories[layer])
            keys = torch.cat((cache.keys[layer], key.to(cache.keys[layer].dtype)), dim=2)
            values = torch.cat((cache.values[layer], value.to(cache.values[layer].dtype)), dim=2)
            x = self._rest(layer, x, attention(self._grouped(query), keys, values, layer).flatten(2))
        x = self._norm(x, "model.norm.weight")
        return functional.linear(x, self._weight(self._head, torch.float32))

    @property
    def _head(self) -> str:
        return "lm_head.weight" if "lm_head.weight" in self.weights else "model.embed_tokens.weight"

    def _grouped(self, query: Tensor) -> Tensor:
        """``[batch, tokens, query_heads, d]`` -> ``[batch, tokens, heads, group, d]``, times the softmax scale."""
        grouped: Tensor = query.unflatten(2, (self.heads, -1)) * self.head_size**-0.5
        return grouped

    def _project(
        self, layer: int, x: Tensor, positions: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query ``[batch, tokens, query_heads, d]``, key and value ``[batch, heads, tokens, d]``, after RoPE.

        Also RAT+'s memory after the last token. ``memory``: before the first one; None: the sequence begins here.
        """
        prefix = f"model.layers.{layer}."
        x = self._norm(x, prefix + "input_layernorm.weight")
        query, key, value = (
            self._linear(x, f"{prefix}self_attn.{name}_proj").unflatten(-1, (-1, self.head_size))
            for name in "qkv"
        )
        if prefix + "self_attn.q_norm.weight" in self.weights:
            query = self._norm(query, prefix + "self_attn.q_norm.weight")
            key = self._norm(key, prefix + "self_attn.k_norm.weight")
        if self.has_memory:
            gate = self._linear(x, prefix + "self_attn.memory_gate").unflatten(-1, (-1, self.head_size))
            key, value, memory = remember_sequences(key, value, gate, memory)
        angles = positions.unsqueeze(-1).float() * self.frequencies
        return _rotate(query, angles), _rotate(key, angles).transpose(1, 2), value.transpose(1, 2), memory

    def _rest(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward network, both residual."""
        prefix = f"model.layers.{layer}."
        x = x + self._linear(attended, prefix + "self_attn.o_proj")
        y = self._norm(x, prefix + "post_attention_layernorm.weight")
        gate, up = (self._linear(y, f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))
        return x + self._linear(functional.silu(gate) * up, prefix + "mlp.down_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(name + ".bias")
        return functional.linear(
            x, self._weight(name + ".weight", x.dtype), bias if bias is None else bias.to(x.dtype)
        )

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weight(name, torch.float32)
        return functional.rms_norm(x.float(), weight.shape, weight, self.config["rms_norm_eps"]).to(x.dtype)

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weights[name].to(dtype)


def remember_sequences(
    key: Tensor, value: Tensor, gate: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """RAT+'s memory over the keys and values of whole sequences.

    Args:
        key, value, gate: ``[batch, tokens, heads, d]``; the gate as logits, shared by key and value.
        memory: float32 ``[batch, 2, heads * d]``, the state before the first token; None: zeros.

    Returns:
        The remembered key and value, in the key's dtype, and the state after the last token.
    """
    batch, tokens = key.shape[:2]
    x = torch.stack((key, value), dim=2).float().flatten(0, 1).flatten(2)
    gates = gate.float().sigmoid().flatten(0, 1).flatten(1)
    before = torch.zeros_like(x[:batch]) if memory is None else memory
    starts = torch.arange(batch + 1, device=x.device) * tokens
    out = remember(x, gates, starts, before).unflatten(0, (batch, tokens))
    new_key, new_value = out.unflatten(-1, key.shape[2:]).to(key.dtype).unbind(dim=2)
    return new_key, new_value, out[:, -1]


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            yield name, tensors.get_tensor(name)


def _rope_frequencies(config: dict[str, Any], head_size: int) -> Tensor:
    """Radians per position of each pair of dimensions, float32 ``[head_size / 2]``."""
    options = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(options.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = options.get("rope_type", options.get("type", "default"))
    frequencies = torch.exp(torch.arange(0, head_size, 2).float() * (-math.log(theta) / head_size))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(options["factor"])
    if kind == "llama3":
        turns = frequencies * (float(options["original_max_position_embeddings"]) / (2 * math.pi))
        low, high = float(options["low_freq_factor"]), float(options["high_freq_factor"])
        keep: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / float(options["factor"]))
    raise ValueError(f"config.json: rope type {kind!r} is not default, linear or llama3")


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of ``[batch, tokens, heads, d]`` by ``[tokens, d/2]``, as Llama checkpoints do."""
    cos, sin = (f(angles).unsqueeze(1) for f in (torch.cos, torch.sin))
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
