"""Features of vLLM beside which rc_topk decodes: adapters, embeddings as prompts, pipeline and data parallelism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..harness import FULL, MODEL, SMALL, Prompt, answers, assert_same, engine, greedy
from ..serving import serving
from .conftest import Audit

SIZES = {"max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20}


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A LoRA adapter of all q and v projections of the example model, random and large enough to change answers."""
    config = json.loads(Path(MODEL, "config.json").read_text())
    hidden, head, rank = config["hidden_size"], config["head_dim"], 8
    widths = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(rank, hidden, generator=generator)
            weights[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(width, rank, generator=generator)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(widths),
        "bias": "none",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    return str(tmp_path)


def test_lora(adapter: str, prompt: Prompt, audit: Audit, always_sparse: None) -> None:
    """Requests with and without an adapter in one batch; their K and V differ, and so must not share statistics."""
    from vllm.lora.request import LoRARequest

    prompts = [prompt(500, 1), prompt(500, 1)]
    requests = [LoRARequest("adapter", 1, adapter), None]
    found = []
    for backend in ("CPU_ATTN", "rc_topk"):
        # A second, empty slot: to vLLM's CPU kernels, a request without an adapter has that of the last slot.
        with engine(backend, FULL, enable_lora=True, max_loras=2, **SIZES) as llm:
            found.append(answers(llm.generate(prompts, greedy(16), lora_request=requests, use_tqdm=False)))
    assert found[0][0].tokens != found[0][1].tokens
    assert_same(found[1], found[0])
    audit.assert_right()


def test_prompt_embeddings(prompt: Prompt, audit: Audit, always_sparse: None) -> None:
    """Prompts that are vectors, as those of images and audio are: the same answers as from the tokens they are of."""
    table = load_file(Path(MODEL, "model.safetensors"))["model.embed_tokens.weight"]
    tokens = [prompt(n, n)["prompt_token_ids"] for n in (500, 300)]
    embedded = [{"prompt_embeds": table[torch.tensor(ids)].float()} for ids in tokens]
    with engine("rc_topk", FULL, enable_prompt_embeds=True, **SIZES) as llm:
        expected = llm.generate([{"prompt_token_ids": ids} for ids in tokens], greedy(16), use_tqdm=False)
        got = llm.generate(embedded, greedy(16), use_tqdm=False)
        assert_same(answers(got), answers(expected))
    audit.assert_right()


def test_pipeline_parallel_equals_one_rank(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, each with the side stores of its own layers, in processes of their own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one memory node leaves no other choice
    prompts = [prompt(500, 1), prompt(300, 2)]
    with engine("rc_topk", SMALL, **SIZES) as llm:
        expected = answers(llm.generate(prompts, greedy(16), use_tqdm=False))
    # Not eager: vLLM's CPU worker makes the second stage's input buffers only when it warms up compiled code.
    with engine("rc_topk", SMALL, pipeline_parallel_size=2, enforce_eager=False, **SIZES) as llm:
        got = answers(llm.generate(prompts, greedy(16), use_tqdm=False))
    assert_same(got, expected, tolerance=5e-3)


def test_data_parallel_behind_one_endpoint(tmp_path: Path, prompt: Prompt) -> None:
    """Two engines behind one server: both decode sparsely, and /metrics shows the sum of both."""
    tokens = [prompt(400 + 50 * i, i)["prompt_token_ids"] for i in range(8)]
    extra = ("--data-parallel-size", "2", "--kv-cache-memory-bytes", str(16 << 20))
    options = {"budget": 192}
    with serving(tmp_path / "log", options, *extra, VLLM_CPU_OMP_THREADS_BIND="0|1") as server:
        answer = server.client.completions.create(
            model=MODEL, prompt=tokens, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert len(answer.choices) == 8
        assert server.metric_when("vllm_rc_topk_sparse_rows_total", 8 * 7) == 8 * 7
        assert all(server.metrics("vllm:generation_tokens_total"))
        assert len(server.metrics("vllm:generation_tokens_total")) == 2
