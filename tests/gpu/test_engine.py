"""Real vLLM on the GPU: captured decode graphs, the side store under every event, agreement with dense."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm_rc_backend.attention_triton import COUNTERS
from vllm_rc_backend.evaluation.kernel_check import assert_same_scales
from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.tasks import make_prompts
from vllm_rc_backend.evaluation.text import Corpus
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.reference import PagedKV
from vllm_rc_backend.observability.device import INTERVAL

from ..harness import (
    FULL,
    MODEL,
    SCENARIOS,
    SMALL,
    Answer,
    Prompt,
    answers,
    assert_close,
    engine,
    greedy,
    run,
    sparse_layers,
    with_features,
)
from ..rat_plus import assert_plain, write_rat_plus
from ..unit.kernels.triton_compiled import kernels_compiled

GPU = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None, "max_num_seqs": 16}


def model_runner(llm: Any) -> Any:
    """The model runner of an engine that lives in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def counters(llm: Any) -> dict[str, int]:
    """What the kernels counted, per layer."""
    layers = sparse_layers(llm)
    workspace = next(iter(layers.values())).impl.sparse_layer.workspace
    torch.cuda.synchronize()
    return {n: v // len(layers) for n, v in zip(COUNTERS, workspace.counters.tolist(), strict=True)}


def builders(llm: Any) -> list[Any]:
    """The metadata builders of all attention groups."""
    return [g.get_metadata_builder() for groups in model_runner(llm).attn_groups for g in groups]


class Audit:
    """Compares the side store of running requests with a recomputation from their cache pages."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.pages = self.summaries = self.prompts = 0
        self.differing = 0.0  # sum over pages of the share of their statistics' bytes

    def check(self) -> None:
        """All finished pages' statistics, and every summary that some running request's tag finds."""
        torch.cuda.synchronize()
        for request in self.core.scheduler.running:
            (blocks,) = self.core.scheduler.kv_cache_manager.get_block_ids(request.request_id)
            for layer in sparse_layers(self.llm).values():
                self._check(layer, torch.tensor(blocks, device="cuda"), request.num_computed_tokens)

    def prompt_done(self) -> bool:
        """Whether some running request's prompt, and nothing else of it, has been computed."""
        return any(r.num_computed_tokens == r.num_prompt_tokens for r in self.core.scheduler.running)

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
        # Runs are rotated by sums whose order differs, which now and then takes an element over the edge of a level.
        # A page of other tokens differs in nearly all bytes.
        differ = (store.codes[ids] != codes).flatten(1).float().mean(dim=1)
        assert differ.max() <= (0.02 if codes.dtype == torch.uint8 else 0), differ
        self.differing += float(differ.sum())
        if scales is not None:
            if codes.dtype == torch.uint8:
                assert_same_scales((store.codes[ids], store.scales[ids]), (codes, scales))
            else:
                assert torch.allclose(store.scales[ids].float(), scales.float(), rtol=2e-3)
        self.pages += len(ids)
        for planner in (b.planner for b in builders(self.llm) if b.planner is not None):
            for m in range(geometry.sink_pages + 1, len(finished) + 1):
                slot = planner.tags.find(int(ids[m - 1]))
                if slot < 0:
                    continue
                span = kv.read_range(table, geometry.sink_tokens, m * geometry.page_size)
                expected = store.completion.contribution(*span)
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


@pytest.mark.parametrize(
    ("eager", "completion"),
    [(False, None), (True, None), (False, "features")],
    ids=["graphs", "eager", "features"],
)
def test_full_budget_equals_dense(
    eager: bool,
    completion: str | None,
    dense: dict[str, list[Answer]],
    prompt: Prompt,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    options = FULL | (with_features(tmp_path) if completion == "features" else {})
    with engine("rc_topk", options, enforce_eager=eager, **GPU) as llm:
        for scenario in SCENARIOS:
            if scenario.__name__ == "shared_then_parted":  # sampled: a tie changes everything after it
                continue
            assert_close(answers(scenario(llm, prompt)), dense[scenario.__name__])
            llm.reset_prefix_cache()
        assert counters(llm)["dense_rows"] > 0
    assert "allocating anew" not in caplog.text, (
        "the side store was reserved for fewer pages than the pool has"
    )


@pytest.fixture(scope="module", params=["default", "features"])
def small_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of use only until another engine of this process is shut down: that takes the process groups of all."""
    options: dict[str, Any] = dict(SMALL)
    if request.param == "features":
        options |= with_features(tmp_path_factory.mktemp("maps"))
    with engine("rc_topk", options, num_gpu_blocks_override=420, **GPU) as llm:
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
        if audit.prompt_done():
            before = audit.summaries
            audit.check()
            audit.prompts += audit.summaries > before
        elif steps % 7 == 0:
            audit.check()
        return outputs

    monkeypatch.setattr(core, "step", audited)
    before = counters(small_engine)
    assert all(a.tokens for a in answers(scenario(small_engine, prompt)))
    after = counters(small_engine)
    assert audit.pages > 0
    assert audit.differing < 1e-3 * audit.pages
    assert audit.summaries > 0
    assert audit.prompts > 0, "no summary was found at the end of a prompt"
    assert after["sparse_rows"] > before["sparse_rows"]
    assert after["rows_without_summary"] == before["rows_without_summary"]


def test_metering_costs_less_than_a_hundredth_of_a_step(
    small_engine: Any, prompt: Prompt, record_property: Any
) -> None:
    """On the host, where it could hold up the next launch: the usual call, and the one in ``INTERVAL`` that copies."""
    (meter,) = (b.meter for b in builders(small_engine) if b.meter is not None)
    prompts = [prompt(400, i) for i in range(8)]

    def decode_seconds(tokens: int) -> float:
        start = time.perf_counter()
        small_engine.generate(prompts, greedy(tokens), use_tqdm=False)
        return time.perf_counter() - start

    decode_seconds(8)  # fills the prefix cache
    step = min((decode_seconds(160) - decode_seconds(10)) / 150 for _ in range(3))

    def call_seconds(copies: bool) -> float:
        start = time.perf_counter()
        for _ in range(1000):
            meter.due = 0.0 if copies else float("inf")
            meter.step()
        return (time.perf_counter() - start) / 1000

    idle, copying = call_seconds(False), call_seconds(True)
    torch.cuda.synchronize()
    meter.due = 0.0
    share = idle / step + copying / INTERVAL
    for name, value in {"step_us": step, "idle_us": idle, "copy_us": copying}.items():
        record_property(name, round(value * 1e6, 2))
    print(f"step {step * 1e6:.0f} us, meter {idle * 1e6:.2f} us, copying {copying * 1e6:.2f} us: {share:.3%}")
    assert share < 0.01


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
        assert got["summaries_built"] == 0, "prefill left a summary to a decode"


def test_no_kernel_is_compiled_while_it_serves(prompt: Prompt) -> None:
    """Prompts come one by one, beside any number of decodes, and only one size of batches has been captured."""
    captured = {"cudagraph_capture_sizes": [16]}
    arrivals = [(2 * i, str(i), prompt(700 + 10 * i, i), greedy(40)) for i in range(16)]
    with engine("rc_topk", SMALL, compilation_config=captured, **GPU) as llm:
        before = kernels_compiled()
        run(llm, arrivals, {})
        assert kernels_compiled() == before > 0


def test_needles_at_a_sixteenth() -> None:
    """What dense attention finds among 8K tokens, 512 of them find, but for one in sixteen."""
    corpus, packages = Corpus.installed(Path(MODEL))
    assert packages
    made = make_prompts("multi_key", corpus, "comments", 8192, 16, seed=3)
    starts = [p.answer.index(True) for p in made]
    questions = [{"prompt_token_ids": p.tokens[:start]} for p, start in zip(made, starts, strict=True)]
    wanted = [tuple(p.tokens[start:]) for p, start in zip(made, starts, strict=True)]
    params = [greedy(len(answer)) for answer in wanted]
    settings = GPU | {"max_model_len": 8704, "max_num_batched_tokens": 8192}
    found = []
    for backend, options in (("FLASH_ATTN", None), ("rc_topk", {"budget": 512})):
        with engine(backend, options, **settings) as llm:
            got = answers(llm.generate(questions, params, use_tqdm=False))
        found.append([answer.tokens == want for answer, want in zip(got, wanted, strict=True)])
    dense, sparse = found
    assert sum(dense) >= 15
    assert sum(d and not s for d, s in zip(dense, sparse, strict=True)) <= 1


def test_fp8_kv_cache(prompt: Prompt) -> None:
    prompts = [prompt(300 + 150 * i, i) for i in range(6)]
    settings = GPU | {"kv_cache_dtype": "fp8"}
    with engine("FLASH_ATTN", **settings) as llm:
        expected = answers(llm.generate(prompts, greedy(12), use_tqdm=False))
    with engine("rc_topk", FULL, **settings) as llm:
        # FlashAttention rounds the softmax's weights to 8 bits as well, which ours does not.
        assert_close(answers(llm.generate(prompts, greedy(12), use_tqdm=False)), expected, tolerance=0.5)
    with engine("rc_topk", SMALL, **settings) as llm:
        assert all(len(a.tokens) == 12 for a in answers(llm.generate(prompts, greedy(12), use_tqdm=False)))


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "rc_topk"])
def test_rat_plus_is_plain_torch(backend: str, prompt: Prompt, tmp_path: Path) -> None:
    """The memory under captured decode graphs, chunked prefill, and prefix hits, whose states a kernel copies."""
    model = write_rat_plus(tmp_path)
    plain = Llama(model, "cuda")
    with engine(backend, FULL, model=str(model), **GPU) as llm:
        for scenario in SCENARIOS:
            # bfloat16 beside float32: what assert_close allows two engines.
            assert_plain(scenario(llm, prompt), plain, worst=0.25, mean=0.05)
