"""Families of models, tiny and with random weights: with the whole context as budget, vLLM's own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..families import COMMON, FAMILIES, GPT_OSS, Family
from ..harness import FULL, Prompt, answers, assert_same, engine, greedy
from .conftest import Audit, assert_context_matters


def settings(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of an engine with random weights of this configuration."""
    (folder / "config.json").write_text(json.dumps(COMMON | config))
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 32 << 20,
    }


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(
    family: Family, tmp_path: Path, prompt: Prompt, audit: Audit, always_sparse: None, strong_weights: None
) -> None:
    arguments = settings(family.config, tmp_path)
    whole = prompt(300, 1)["prompt_token_ids"]
    prompts = [{"prompt_token_ids": ids} for ids in (whole, whole[100:])]
    params = greedy(12, detokenize=False)
    with engine("CPU_ATTN", **arguments) as llm:
        expected = answers(llm.generate(prompts, params, use_tqdm=False))
    assert_context_matters(*expected)
    with engine("rc_topk", FULL, **arguments) as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert tuple(layer.impl.sparse_layer.sparse for layer in context.values()) == family.sparse
        assert_same(answers(llm.generate(prompts, params, use_tqdm=False)), expected)
    if any(family.sparse):
        audit.assert_right()
    else:
        assert not audit.checked_pages


def test_gpt_oss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="sink"), engine("rc_topk", **settings(GPT_OSS, tmp_path)):
        pass
