"""Tiny configurations of model families, for random weights; and what rc_topk does with each."""

from __future__ import annotations

from typing import Any, NamedTuple

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


class Family(NamedTuple):
    """A family of models.

    Attributes:
        config: its ``config.json``, in small.
        sparse: for each attention layer, whether it decodes sparsely.
    """

    name: str
    config: dict[str, Any]
    sparse: tuple[bool, ...]
    note: str = ""


FAMILIES = (
    Family("Llama", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, (True, True)),
    Family(
        "Llama with one KV head (MQA)",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 1},
        (True, True),
    ),
    Family("Qwen2", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, (True, True)),
    Family("Qwen3", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, (True, True)),
    Family(
        "Mistral",
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
        (True, True),
    ),
    Family(
        "Mistral with a sliding window",
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128},
        (False, False),
        "every layer has a window: dense, with a warning",
    ),
    Family(
        "Phi3", {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "head_dim": 32}, (True, True)
    ),
    Family(
        "Gemma3",
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 64,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_activation": "gelu_pytorch_tanh",
        },
        (False, True),
        "layers with a window stay dense, the others decode sparsely",
    ),
    Family(
        "Llama 4",
        {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 3,  # of two layers none
            "num_local_experts": 1,
            "attention_chunk_size": 128,
            "no_rope_layers": [1, 0],
        },
        (False, True),
        "layers that attend in chunks stay dense, the others decode sparsely",
    ),
)

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""Has attention sinks (a learned logit per head in the softmax), which is refused."""
