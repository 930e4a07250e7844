"""Other shapes of model and machine: sliding windows, tensor parallelism. Tiny random weights, real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..harness import FULL, SMALL, Prompt, answers, assert_same, engine, greedy, with_features
from .conftest import Audit

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "max_position_embeddings": 4096,
    "sliding_window": 128,
    "layer_types": [*(["sliding_attention"] * 5), "full_attention"],
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture
def gemma3(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3))
    return str(tmp_path)


def test_sliding_window_layers_stay_dense(
    gemma3: str, prompt: Prompt, audit: Audit, always_sparse: None, strong_weights: None
) -> None:
    settings: dict[str, Any] = {"model": gemma3, "load_format": "dummy", "skip_tokenizer_init": True}
    prompts = [prompt(600, 1), prompt(300, 2), prompt(900, 3)]
    params = greedy(40, detokenize=False)
    with engine("CPU_ATTN", **settings) as llm:
        expected = answers(llm.generate(prompts, params, use_tqdm=False))
    with engine("rc_topk", FULL, **settings) as llm:
        config = llm.llm_engine.vllm_config
        impls = [layer.impl for layer in config.compilation_config.static_forward_context.values()]
        assert [impl.sparse_layer.sparse for impl in impls] == [False] * 5 + [True]
        assert_same(answers(llm.generate(prompts, params, use_tqdm=False)), expected)
    audit.assert_right()


@pytest.mark.parametrize("completion", ["default", "features"])
def test_tensor_parallel_equals_one_rank(
    completion: str, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two ranks, each with its own KV heads, statistics, summaries and maps, in processes of their own."""
    options = SMALL if completion == "default" else SMALL | with_features(tmp_path)
    monkeypatch.setenv(
        "VLLM_CPU_OMP_THREADS_BIND", "0|1"
    )  # a machine with one memory node has no other choice
    prompts = [prompt(700, 1), prompt(450, 2)]
    settings = {"kv_cache_memory_bytes": 64 << 20}
    with engine("rc_topk", options, **settings) as llm:
        expected = answers(llm.generate(prompts, greedy(16), use_tqdm=False))
    with engine("rc_topk", options, tensor_parallel_size=2, **settings) as llm:
        got = answers(llm.generate(prompts, greedy(16), use_tqdm=False))
    assert_same(got, expected, tolerance=5e-3)


def test_fp8_kv_cache(prompt: Prompt, audit: Audit, always_sparse: None) -> None:
    """vLLM's CPU kernels quantise K and V; ours must read the same numbers."""
    import torch

    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM's CPU kernels hold fp8 only with AVX-512 or AMX")
    prompts = [prompt(400, 1), prompt(600, 2)]
    with engine("CPU_ATTN", kv_cache_dtype="fp8", dtype="bfloat16") as llm:
        expected = answers(llm.generate(prompts, greedy(1), use_tqdm=False))
    with engine("rc_topk", FULL, kv_cache_dtype="fp8", dtype="bfloat16") as llm:
        got = answers(llm.generate(prompts, greedy(8), use_tqdm=False))
    assert [a.tokens[0] for a in got] == [a.tokens[0] for a in expected]
    audit.assert_right()
