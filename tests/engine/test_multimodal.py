"""Prompts with sound in them, through vLLM's own processing: a tiny Qwen2-Audio with random weights.

vLLM's models for images need torchvision, of which there is no build for a machine without CUDA (tools/setup_cpu.py).
To the attention of the decoder, both are tokens whose embeddings come from elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import (
    AutoTokenizer,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from ..harness import FULL, MODEL, Prompt, answers, assert_same, engine, greedy
from .conftest import Audit, assert_context_matters

RATE, SECONDS, TOKENS = 16_000, 10, 250
"""Samples per second, length of a sound, and the tokens that it becomes: 15 pages of the KV cache and a rest."""

MARKS = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[int]]:
    """The model's folder, and the three tokens that stand for a sound."""
    folder = tmp_path_factory.mktemp("qwen2_audio")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_tokens(list(MARKS.values()), special_tokens=True)
    audio, begin, end = tokenizer.convert_tokens_to_ids(list(MARKS.values()))
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer, **MARKS).save_pretrained(folder)
    Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128
        ).to_dict(),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
        ).to_dict(),
        audio_token_index=audio,
        architectures=["Qwen2AudioForConditionalGeneration"],
    ).save_pretrained(folder)
    return str(folder), [begin, audio, end]


def noise(seed: int) -> tuple[Any, int]:
    """A sound of its own for each seed."""
    samples = np.random.default_rng(seed).standard_normal(RATE * SECONDS).astype(np.float32)
    return 0.1 * samples.cumsum() / np.arange(1, len(samples) + 1) ** 0.5, RATE


def test_sounds(
    model: tuple[str, list[int]], prompt: Prompt, audit: Audit, always_sparse: None, strong_weights: None
) -> None:
    """The same text around two sounds, which must not share pages, and without one."""
    folder, marks = model
    text = prompt(300)["prompt_token_ids"]
    around = [*text[:50], *marks, *text[50:]]
    prompts: list[dict[str, Any]] = [
        {"prompt_token_ids": around, "multi_modal_data": {"audio": noise(seed)}} for seed in (0, 1, 0)
    ]
    prompts.append({"prompt_token_ids": text})
    settings = {"load_format": "dummy", "max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20}
    found = []
    for backend in ("CPU_ATTN", "rc_topk"):
        with engine(backend, FULL, model=folder, limit_mm_per_prompt={"audio": 1}, **settings) as llm:
            found.append(answers(llm.generate(prompts, greedy(16), use_tqdm=False)))
    dense, sparse = found
    assert [len(answer.prompt) for answer in dense] == [302 + TOKENS] * 3 + [300]
    assert_context_matters(dense[0], dense[1])
    assert_same(sparse, dense)
    audit.assert_right()
