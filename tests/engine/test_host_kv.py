"""KV pages in host memory: the same answers as with all pages on the device, whatever the page cache holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rc_backend.config import OptionError
from vllm_rc_backend.observability import meter
from vllm_rc_backend.observability.meter import Counts

from ..harness import SCENARIOS, SMALL, Answer, Prompt, answers, engine, greedy
from .conftest import Audit
from .test_refusals import TINY, _chain

BLOCK_GIB = 6 * 128 * 2 * 2 * 64 * 4 / 2**30
"""One block of the example model: 6 layers, 128 tokens, 2 KV heads, K and V of 64, float32."""

ENTRY_GIB = 6 * 16 * 2 * 64 * 4 / 2**30
"""One entry of the page cache in each layer."""

HOST = SMALL | {"kv_residency": "host", "host_kv_gib": 60 * BLOCK_GIB}

CACHES = {
    "no cache": {"page_cache_gib": 0},
    "smaller than one step's pages": {"page_cache_gib": 20 * ENTRY_GIB},
    "default": {},
}


def host_engine(options: dict[str, Any], **kwargs: Any) -> Any:
    """An engine whose pool is as large as the options say."""
    return engine(
        "rc_topk", options, **({"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.1} | kwargs)
    )


@pytest.fixture(scope="module")
def resident(prompt: Prompt) -> dict[str, list[Answer]]:
    """What the same options answer with every page on the device."""
    with engine("rc_topk", SMALL, num_gpu_blocks_override=60) as llm:
        return {scenario.__name__: answers(scenario(llm, prompt)) for scenario in SCENARIOS}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_same_answers(
    cache: dict[str, float], resident: dict[str, list[Answer]], prompt: Prompt, audit: Audit
) -> None:
    before = meter.get().counts.copy()
    with host_engine(HOST | cache) as llm:
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == 60
        for scenario in SCENARIOS:
            assert answers(scenario(llm, prompt)) == resident[scenario.__name__], scenario.__name__
    audit.assert_right()
    traffic(meter.get().counts.since(before), cache)


def traffic(counts: Counts, cache: dict[str, float]) -> None:
    """The cache did what a cache of this size does."""
    assert counts.pages_wanted > 0
    assert counts.host_bytes_fetched > 0
    found = counts.pages_found / counts.pages_wanted
    if cache.get("page_cache_gib") == 0:
        assert counts.pages_found == counts.pages_evicted == 0
    elif cache:
        assert 0 < found < 0.7
        assert counts.pages_evicted > 0
    else:
        assert found > 0.7


def test_preemption_and_heavy_reuse(prompt: Prompt, audit: Audit) -> None:
    """A pool that cannot hold the running sequences, and a cache much smaller than that."""
    prompts = [prompt(500 + 60 * i, i) for i in range(6)]
    settings = {"max_model_len": 1024, "enable_prefix_caching": False}

    def run(llm: Any) -> tuple[list[Answer], int]:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempted = []
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda r, *a, **k: (preempted.append(r.request_id), preempt(r, *a, **k))[
            1
        ]
        return answers(llm.generate(prompts, greedy(80), use_tqdm=False)), len(preempted)

    with engine("rc_topk", SMALL, num_gpu_blocks_override=22, **settings) as llm:
        expected, preempted = run(llm)
    assert preempted, "the pool was large enough; the test tests nothing"
    options = {"host_kv_gib": 22 * BLOCK_GIB, "page_cache_gib": 50 * ENTRY_GIB}
    with host_engine(HOST | options, **settings) as llm:
        assert run(llm) == (expected, preempted)
    audit.assert_right()


def test_pages_of_part_of_a_block_and_every_statistic(prompt: Prompt) -> None:
    options = SMALL | {"page_size": 32, "sink_tokens": 32, "budget": 256, "selection": "box"}
    prompts = [prompt(900, 1), prompt(410, 2)]
    with engine("rc_topk", options, num_gpu_blocks_override=60) as llm:
        expected = answers(llm.generate(prompts, greedy(40), use_tqdm=False))
    with host_engine(HOST | options | {"page_cache_gib": 30 * ENTRY_GIB}) as llm:
        assert answers(llm.generate(prompts, greedy(40), use_tqdm=False)) == expected


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({"host_kv_gib": 1e6}, {}, ["host_kv_gib", "1000000.0", "GiB of host memory", "spared"]),
        ({}, {"kv_cache_memory_bytes": 1 << 25}, ["--kv-cache-memory-bytes", "host_kv_gib"]),
        ({}, {"num_gpu_blocks_override": 20}, ["--num-gpu-blocks-override", "host_kv_gib"]),
    ],
    ids=["host memory", "pool bytes", "blocks"],
)
def test_refused(options: dict[str, Any], settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Exception) as error, host_engine(HOST | options, max_model_len=1024, **settings):  # noqa: PT011
        pass
    text = _chain(error.value)
    assert all(word in text for word in words), text


def test_layers_that_stay_dense_are_refused(tmp_path: Path) -> None:
    model = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(TINY | model))
    settings = {
        "model": str(tmp_path),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
    }
    with pytest.raises(Exception) as error, host_engine(HOST, **settings):  # noqa: PT011
        pass
    assert "needs every layer to decode sparsely; 2 do not (sliding windows" in _chain(error.value)


def test_an_fp8_cache_on_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_rc_backend import layer

    config = SimpleNamespace(
        additional_config={"rc_topk": HOST}, device_config=SimpleNamespace(device_type="cuda")
    )
    monkeypatch.setattr(layer, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(layer.compat, "check_engine", lambda config: None)
    with pytest.raises(OptionError, match="kv_residency: got 'host'; allowed: gpu with --kv-cache-dtype fp8"):
        layer.SparseLayer(layer.LayerShape(8, 2, 64, "fp8"), None, None)
