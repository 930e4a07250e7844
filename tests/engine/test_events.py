"""Every scheduling event on real vLLM: equal to dense attention with a full budget, and a right side store.

Each scenario runs on vLLM's own CPU backend and on ours. With the whole context as budget the sparse path must return
dense attention; with a small one the side store must hold, at every step and layer, what the cache pages say.
"""

from __future__ import annotations

from typing import Any

import pytest

from vllm_rc_backend.observability import meter

from ..harness import FULL, SCENARIOS, SMALL, Answer, Prompt, answers, assert_same, engine, greedy
from .conftest import Audit


@pytest.fixture(scope="module")
def dense(prompt: Prompt) -> dict[str, list[Answer]]:
    """What vLLM's own attention answers in each scenario."""
    with engine("CPU_ATTN") as llm:
        found = {}
        for scenario in SCENARIOS:
            found[scenario.__name__] = answers(scenario(llm, prompt))
            llm.reset_prefix_cache()
        return found


@pytest.fixture(scope="module")
def small_engine() -> Any:
    """One engine with a small budget for all scenarios: blocks are reused from one to the next, nothing is reset."""
    with engine("rc_topk", SMALL, num_gpu_blocks_override=60) as llm:
        yield llm


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_side_store_is_right(scenario: Any, small_engine: Any, prompt: Prompt, audit: Audit) -> None:
    missing = meter.get().counts.missing_summaries
    outputs = answers(scenario(small_engine, prompt))
    assert all(len(a.tokens) > 0 for a in outputs)
    audit.assert_right()
    assert meter.get().counts.missing_summaries == missing


def test_full_budget_equals_dense(
    dense: dict[str, list[Answer]], prompt: Prompt, audit: Audit, always_sparse: None
) -> None:
    with engine("rc_topk", FULL) as llm:
        for scenario in SCENARIOS:
            assert_same(answers(scenario(llm, prompt)), dense[scenario.__name__])
            llm.reset_prefix_cache()
    audit.assert_right()


def test_preemption_and_heavy_reuse(prompt: Prompt, audit: Audit) -> None:
    """A pool that cannot hold the running sequences: they are preempted, recomputed, and end as if alone."""
    prompts = [prompt(500 + 60 * i, i) for i in range(6)]
    params = greedy(100)
    with engine(
        "rc_topk", SMALL, max_model_len=1024, num_gpu_blocks_override=22, enable_prefix_caching=False
    ) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempted = []
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda request, *a, **k: (
            preempted.append(request.request_id),
            preempt(request, *a, **k),
        )[1]
        together = answers(llm.generate(prompts, params, use_tqdm=False))
        assert preempted, "the pool was large enough; the test tests nothing"
        audit.assert_right()
        alone = answers([llm.generate(p, params, use_tqdm=False)[0] for p in prompts])
    # A preempted sequence's recomputed tokens are prefilled densely, the first time they were decoded sparsely: only
    # those never preempted must be equal.
    untouched = [
        i for i in range(len(prompts)) if not any(name.split("-")[0] == str(i) for name in preempted)
    ]
    assert untouched
    assert_same([together[i] for i in untouched], [alone[i] for i in untouched])


def test_preemption_with_full_budget(prompt: Prompt, audit: Audit, always_sparse: None) -> None:
    """The same with the whole context as budget: every answer must be dense's."""
    prompts = [prompt(500 + 60 * i, i) for i in range(6)]
    with engine("CPU_ATTN") as llm:
        expected = answers(llm.generate(prompts, greedy(60), use_tqdm=False))
    with engine("rc_topk", FULL, max_model_len=1024, num_gpu_blocks_override=22) as llm:
        assert_same(answers(llm.generate(prompts, greedy(60), use_tqdm=False)), expected)
    audit.assert_right()


def test_fewer_slots_than_sequences_is_counted(prompt: Prompt, audit: Audit) -> None:
    before = meter.get().totals()
    with engine("rc_topk", SMALL | {"summary_slots": 2}) as llm:
        llm.generate([prompt(600, i) for i in range(5)], greedy(8), use_tqdm=False)
    audit.assert_right()
    counted = meter.get().totals().since(before)
    assert counted.missing_summaries > 0
    assert counted.sparse_rows > counted.missing_summaries


def test_prefill_leaves_no_summary_to_build(prompt: Prompt, audit: Audit) -> None:
    """Not after a prompt, nor at a later turn; but where the slot has been taken in between."""
    before = meter.get().totals()

    def built() -> int:
        return meter.get().totals().since(before).summaries_built

    with engine("rc_topk", SMALL | {"summary_slots": 1}) as llm:
        # The mid region ends with token 640, a full block, which vLLM keeps for the next turn.
        (first,) = llm.generate([prompt(600)], greedy(58), use_tqdm=False)
        history = [*first.prompt_token_ids, *first.outputs[0].token_ids]
        more = {"prompt_token_ids": history + prompt(150, 3)["prompt_token_ids"][1:]}
        llm.generate([more], greedy(20), use_tqdm=False)
        assert built() == 0
        llm.generate([prompt(700, 7)], greedy(20), use_tqdm=False)
        assert built() == 0
        # All but one token of it are in the prefix cache: there is no prefill.
        llm.generate([{"prompt_token_ids": history[:513]}], greedy(4), use_tqdm=False)
        assert built() == 1
    audit.assert_right()


def test_beams_share_and_part(prompt: Prompt, always_sparse: None) -> None:
    """Beam search copies and drops sequences that share most of their pages: to vLLM, new requests at every token."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=20, ignore_eos=True)

    def beams(llm: Any) -> list[list[int]]:
        (output,) = llm.beam_search([prompt(500, 6)], params)
        return [list(sequence.tokens) for sequence in output.sequences]

    with engine("CPU_ATTN") as llm:
        expected = beams(llm)
    with engine("rc_topk", FULL) as llm:
        assert beams(llm) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "moba"},
        {"selection": "mean_var", "statistics_bits": 8},
        {"selection": "box", "statistics_bits": 8, "selection_weight": 1.0, "group_rule": "mean"},
        {"selection": "oracle", "completion": "none"},
        {"page_size": 32, "sink_tokens": 32, "budget": 256, "group_rule": "softmax"},
        {"budget": 0.25, "dense_layers": [0, 5], "dense_threshold": 300},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], prompt: Prompt, audit: Audit) -> None:
    with engine("rc_topk", SMALL | options) as llm:
        llm.generate([prompt(900, 1), prompt(310, 2), prompt(40, 3)], greedy(20), use_tqdm=False)
    audit.assert_right(summaries=options.get("completion") != "none")


def test_torch_compile(prompt: Prompt, audit: Audit, always_sparse: None) -> None:
    prompts = [prompt(300, 1), prompt(700, 2)]
    with engine("CPU_ATTN") as llm:
        expected = answers(llm.generate(prompts, greedy(20), use_tqdm=False))
    with engine("rc_topk", FULL, enforce_eager=False) as llm:
        assert_same(answers(llm.generate(prompts, greedy(20), use_tqdm=False)), expected)
    audit.assert_right()
