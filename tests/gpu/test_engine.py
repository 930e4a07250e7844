"""Real vLLM on the GPU: captured decode graphs, the side store under every event, memory, agreement with dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm_rc_backend.attention_triton import COUNTERS
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.reference import PagedKV

from ..harness import FULL, SCENARIOS, SMALL, Answer, Prompt, answers, engine, greedy

GPU = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None, "max_num_seqs": 16}


def model_runner(llm: Any) -> Any:
    """The model runner of an engine that lives in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def sparse_layers(llm: Any) -> dict[str, Any]:
    """Our layers by name, with vLLM's layer objects."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {n: layer for n, layer in context.items() if layer.impl.sparse_layer.sparse}


def counters(llm: Any) -> dict[str, int]:
    """What the kernels counted, per layer."""
    layers = sparse_layers(llm)
    workspace = next(iter(layers.values())).impl.sparse_layer.workspace
    torch.cuda.synchronize()
    return {n: v // len(layers) for n, v in zip(COUNTERS, workspace.counters.tolist(), strict=True)}


def planners(llm: Any) -> list[Any]:
    """The summary planners of all attention groups."""
    builders = [g.get_metadata_builder() for groups in model_runner(llm).attn_groups for g in groups]
    return [builder.planner for builder in builders if builder.planner is not None]


class Audit:
    """Compares the side store of running requests with a recomputation from their cache pages."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.pages = self.summaries = 0

    def check(self) -> None:
        """Statistics bit for bit, and every summary that some running request's tag finds."""
        torch.cuda.synchronize()
        for request in self.core.scheduler.running:
            (blocks,) = self.core.scheduler.kv_cache_manager.get_block_ids(request.request_id)
            for layer in sparse_layers(self.llm).values():
                self._check(layer, torch.tensor(blocks, device="cuda"), request.num_computed_tokens)

    def _check(self, layer: Any, table: torch.Tensor, computed: int) -> None:
        store = layer.impl.sparse_layer.store
        layout, geometry = store.layout, store.layout.geometry
        kv = PagedKV.packed(layer.kv_cache, geometry.page_size)
        # Tokens that are scheduled but whose forward pass may still be under way are left out.
        finished = torch.arange(max(computed - 1, 0) // geometry.page_size, device="cuda")
        if len(finished) == 0:
            return
        ids = kv.page_ids(table, finished)
        keys, _ = kv.read(ids.unsqueeze(0))
        codes, scales = reference.encode_statistics(
            layout.policy.statistics(keys).transpose(0, 1), store.codes.dtype
        )
        # Bit for bit, except that runs are rotated by sums whose order differs: an element at the edge of a level.
        differ = (store.codes[ids] != codes).float().mean()
        assert differ < (1e-3 if codes.dtype == torch.uint8 else 1e-9), differ
        if scales is not None:
            assert torch.allclose(store.scales[ids].float(), scales.float(), rtol=1e-3)
        self.pages += len(ids)
        for planner in planners(self.llm):
            for m in range(geometry.sink_pages + 1, len(finished) + 1):
                slot = planner.tags.find(int(ids[m - 1]))
                if slot < 0:
                    continue
                span = kv.read_range(table, geometry.sink_tokens, m * geometry.page_size)
                expected = layout.completion.contribution(*span)
                held = store.states[slot].float().sum(dim=1)
                error = (held - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
                assert bool((error < 2e-3).all()), (m, error)
                self.summaries += 1


@pytest.fixture(scope="module")
def dense(prompt: Prompt) -> dict[str, list[Answer]]:
    """What vLLM's FlashAttention answers in each scenario."""
    with engine("FLASH_ATTN", **GPU) as llm:
        found = {}
        for scenario in SCENARIOS:
            found[scenario.__name__] = answers(scenario(llm, prompt))
            llm.reset_prefix_cache()
        return found


def assert_close(got: list[Answer], expected: list[Answer]) -> None:
    """bfloat16 answers: the same up to a tie, and probabilities close until then."""
    assert len(got) == len(expected)
    same = 0
    for mine, theirs in zip(got, expected, strict=True):
        split = next(
            (i for i, (a, b) in enumerate(zip(mine.tokens, theirs.tokens, strict=False)) if a != b), None
        )
        end = len(mine.tokens) if split is None else split
        assert mine.logprobs[:end] == pytest.approx(theirs.logprobs[:end], abs=0.25)
        same += split is None
    assert same >= len(got) / 2


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_full_budget_equals_dense(eager: bool, dense: dict[str, list[Answer]], prompt: Prompt) -> None:
    with engine("rc_topk", FULL, enforce_eager=eager, **GPU) as llm:
        for scenario in SCENARIOS:
            if scenario.__name__ == "shared_then_parted":  # sampled: a tie changes everything after it
                continue
            assert_close(answers(scenario(llm, prompt)), dense[scenario.__name__])
            llm.reset_prefix_cache()
        assert counters(llm)["dense_rows"] > 0


@pytest.fixture(scope="module")
def small_engine() -> Iterator[Any]:
    with engine("rc_topk", SMALL, num_gpu_blocks_override=420, **GPU) as llm:
        yield llm


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_side_store_is_right(
    scenario: Any, small_engine: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit, core = Audit(small_engine), small_engine.llm_engine
    step, steps = core.step, 0

    def audited() -> Any:
        nonlocal steps
        outputs = step()
        steps += 1
        if steps % 7 == 0:
            audit.check()
        return outputs

    monkeypatch.setattr(core, "step", audited)
    before = counters(small_engine)
    assert all(a.tokens for a in answers(scenario(small_engine, prompt)))
    after = counters(small_engine)
    assert audit.pages > 0
    assert audit.summaries > 0
    assert after["sparse_rows"] > before["sparse_rows"]
    assert after["rows_without_summary"] == before["rows_without_summary"]


def test_counters_under_replay_prove_what_was_read(prompt: Prompt) -> None:
    """Full decode graphs are captured, and under replay the kernels read exactly what the geometry says."""
    from vllm.config import CUDAGraphMode

    lengths, tokens = (1000, 1500, 150), 33
    with engine("rc_topk", SMALL, enable_prefix_caching=False, **GPU) as llm:
        mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
        assert mode.decode_mode() == CUDAGraphMode.FULL
        before = counters(llm)
        llm.generate([prompt(n, i) for i, n in enumerate(lengths)], greedy(tokens), use_tqdm=False)
        got = {name: value - before[name] for name, value in counters(llm).items()}
        layout = next(iter(sparse_layers(llm).values())).impl.sparse_layer.store.layout
        geometry = layout.geometry
        decoded = [n + i for n in lengths for i in range(1, tokens)]
        sparse = [n for n in decoded if geometry.is_sparse(n)]
        assert got["sparse_rows"] == len(sparse)
        assert got["dense_rows"] == len(decoded) - len(sparse)
        assert got["tokens_held"] == sum(decoded)
        assert got["tokens_read"] == sum(geometry.tokens_read(n) for n in decoded)
        assert got["pages_scored"] == sum(geometry.mid_end(n) - geometry.sink_pages for n in sparse)
        assert got["rows_without_summary"] == 0


def test_needles(prompt: Prompt) -> None:
    from pathlib import Path

    from vllm_rc_backend.evaluation.tasks import make_prompts
    from vllm_rc_backend.evaluation.text import Corpus

    from ..harness import MODEL

    corpus, _ = Corpus.installed(Path(MODEL))
    made = make_prompts("multi_key", corpus, "comments", 8192, 16, seed=3)
    questions = [{"prompt_token_ids": p.tokens[: p.answer.index(True)]} for p in made]
    wanted = [p.tokens[p.answer.index(True) :] for p in made]
    settings = GPU | {"max_model_len": 8704, "max_num_batched_tokens": 8192}
    with engine("rc_topk", {"budget": 512}, **settings) as llm:
        got = [
            list(o.outputs[0].token_ids)
            for o in llm.generate(questions, greedy(len(wanted[0])), use_tqdm=False)
        ]
    assert sum(g == w for g, w in zip(got, wanted, strict=True)) >= 15


def test_side_memory_is_inside_the_limit(prompt: Prompt) -> None:
    """The KV pool shrinks by what the plugin holds, and the whole stays under the limit when it is full."""
    settings = GPU | {"gpu_memory_utilization": 0.92, "max_model_len": 32768, "max_num_seqs": 64}
    with engine("FLASH_ATTN", **settings) as llm:
        plain = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    with engine("rc_topk", {}, **settings) as llm:
        ours = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        held = sum(layer.impl.sparse_layer.store.nbytes for layer in sparse_layers(llm).values())
        layer = next(iter(sparse_layers(llm).values()))
        block = layer.kv_cache[0].nbytes * len(sparse_layers(llm))
        assert ours < plain
        assert (plain - ours) * block == pytest.approx(held, rel=0.25)
        llm.generate([prompt(2000, i) for i in range(64)], greedy(8), use_tqdm=False)
        total = torch.cuda.mem_get_info()[1]
        assert torch.cuda.max_memory_reserved() < 0.93 * total


def test_fp8_kv_cache(prompt: Prompt) -> None:
    prompts = [prompt(900, 1), prompt(400, 2)]
    settings = GPU | {"kv_cache_dtype": "fp8"}
    with engine("FLASH_ATTN", **settings) as llm:
        expected = answers(llm.generate(prompts, greedy(12), use_tqdm=False))
    with engine("rc_topk", FULL, **settings) as llm:
        assert_close(answers(llm.generate(prompts, greedy(12), use_tqdm=False)), expected)
    with engine("rc_topk", SMALL, **settings) as llm:
        assert all(len(a.tokens) == 12 for a in answers(llm.generate(prompts, greedy(12), use_tqdm=False)))
