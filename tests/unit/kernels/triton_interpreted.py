"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: the Triton kernels against the reference."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import astuple
from typing import Any

import pytest
import torch

from tests.unit.kernels.cases import FEATURES, LARGE_POOL, RUNS, SHARE
from tests.unit.kernels.remember_check import check_remember
from tests.unit.kernels.shared_step_check import COMPLETIONS, check_shared_step
from tests.unit.kernels.update_check import UPDATES, check_update
from tests.unit.kernels.warm_up_check import WARM, check_warm_up
from vllm_rc_backend.attention_triton import Tuning
from vllm_rc_backend.decaying_memory import launch_linear_scan
from vllm_rc_backend.evaluation.kernel_check import Case, Runner, check
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.reference import SummaryTags
from vllm_rc_backend.summaries_triton import SummaryPlanner

# In two levels: a long row has more groups than pages to choose, so that the first level has something to leave out.
CASES = {
    "default": (Case(**RUNS, completion="paged", head_size=128), 3),
    "runs, head size 64, ragged, padding row": (
        Case(**RUNS, completion="paged", seq_lens=(300, 208, 0, 90)),
        2,
    ),
    "runs, head size 96, mean over the group, fp16, 7 query heads": (
        Case(**RUNS, group_rule="mean", dtype=torch.float16, head_size=96, group=7, heads=1),
        1,
    ),
    "runs, head size 256, pages of 32, fp8 cache with scales": (
        Case(
            **RUNS,
            completion="paged",
            head_size=256,
            page_size=32,
            sink_tokens=32,
            budget=256,
            heads=1,
            kv_dtype=torch.float8_e4m3fn,
            key_scale=0.5,
            value_scale=2.0,
            seq_lens=(480,),
        ),
        1,
    ),
    "runs in two levels": (
        Case(
            **RUNS,
            completion="paged",
            seq_lens=(2400, 600),
            heads=1,
            budget=150,
            sink_tokens=0,
            max_model_len=40_000,
        ),
        1,
    ),
    "moba, mass from the scores": (Case(selection="moba", completion="paged", heads=1), 1),
    "a large pool": (Case(**LARGE_POOL, group=2), 1),
    "two levels, a budget of two pages": (
        Case(head_size=256, heads=1, sink_tokens=0, budget=50, seq_lens=(900,), max_model_len=70_000),
        1,
    ),
    "runs, sum over the group, 5 query heads": (
        Case(**RUNS, group_rule="sum", completion="paged", group=5, heads=1),
        2,
    ),
    "share, ragged, padding row": (
        Case(**SHARE, completion="paged", seq_lens=(300, 208, 0, 90)),
        2,
    ),
    "share, head size 128, 5 query heads, fp8 cache with scales": (
        Case(
            **SHARE,
            completion="paged",
            head_size=128,
            group=5,
            heads=1,
            kv_dtype=torch.float8_e4m3fn,
            key_scale=0.5,
            value_scale=2.0,
        ),
        1,
    ),
    "share in two levels, 16 query heads": (
        Case(
            **SHARE,
            completion="paged",
            seq_lens=(2400, 600),
            heads=1,
            group=16,
            budget=150,
            sink_tokens=0,
            max_model_len=40_000,
        ),
        1,
    ),
    "share in two levels, 5 query heads, and fewer groups than pages to choose": (
        Case(
            **SHARE,
            completion="linear",
            seq_lens=(2400, 300),
            heads=1,
            group=5,
            budget=150,
            max_model_len=40_000,
        ),
        1,
    ),
    "share, moba, selection only, 1 query head": (
        Case(selection="moba", group_rule="share", completion="none", group=1),
        1,
    ),
    "share, features, selection in two levels": (
        Case(
            **SHARE, completion="features", seq_lens=(2400, 0, 600), heads=2, budget=150, max_model_len=40_000
        ),
        1,
    ),
    "share, through a page cache": (
        Case(**SHARE, completion="paged", seq_lens=(300, 0, 90), cache_slots=40, group=5),
        2,
    ),
    "share, features, through a page cache, selection in two levels": (
        Case(
            **SHARE,
            completion="features",
            seq_lens=(2400,),
            heads=2,
            budget=150,
            max_model_len=40_000,
            cache_slots=40,
        ),
        1,
    ),
    "box": (Case(), 2),
    "8-bit statistics, ragged, padding row": (Case(seq_lens=(300, 208, 0, 90), statistics_bits=8), 2),
    "mean_var, mean over the group, fp16, head size 96": (
        Case(selection="mean_var", group_rule="mean", dtype=torch.float16, head_size=96, group=1),
        1,
    ),
    "moba, token-major blocks of several pages, 5 query heads": (
        Case(selection="moba", head_first=False, pages_per_block=4, group=5, heads=1),
        2,
    ),
    "fp8 cache with scales, 6 query heads": (
        Case(kv_dtype=torch.float8_e4m3fn, key_scale=0.5, value_scale=2.0, group=6, heads=1),
        1,
    ),
    "selection only, 16 query heads": (Case(completion="none", group=16, heads=1, statistics_bits=8), 1),
    "budget a share of the context, too few slots": (
        Case(budget=0.3, heads=1, slots=1, seq_lens=(300, 400)),
        2,
    ),
    "pages of 32, head size 256, 7 query heads": (
        Case(page_size=32, sink_tokens=32, budget=256, head_size=256, heads=1, group=7, seq_lens=(480,)),
        1,
    ),
    "merged by columns, paged, head size 96": (
        Case(
            heads=1,
            head_size=96,
            completion="paged",
            selection="runs",
            statistics_bits=2,
            tuning=Tuning(merge_columns=32, merge_elements=1024),
        ),
        2,
    ),
    "pages of 64, no sink": (Case(page_size=64, sink_tokens=0, budget=256, heads=1, seq_lens=(500,)), 1),
    "pages of 128": (Case(page_size=128, sink_tokens=128, budget=512, heads=1, seq_lens=(1000,)), 1),
    "selection in two levels": (
        Case(
            seq_lens=(2400, 600), heads=1, budget=150, sink_tokens=0, max_model_len=40_000, statistics_bits=8
        ),
        1,
    ),
    "through a page cache": (Case(seq_lens=(300, 0, 90), cache_slots=64), 3),
    "through a page cache without room, paged": (
        Case(heads=1, cache_slots=5, completion="paged", selection="runs", statistics_bits=2),
        2,
    ),
    "without a page cache, all from the pool": (Case(heads=1, cache_slots=0, head_first=False), 1),
    "through a page cache, fp8, blocks of several pages, selection in two levels": (
        Case(
            seq_lens=(2400,),
            heads=1,
            budget=150,
            max_model_len=40_000,
            cache_slots=40,
            kv_dtype=torch.float8_e4m3fn,
            key_scale=0.5,
            value_scale=2.0,
            pages_per_block=4,
            statistics_bits=8,
        ),
        2,
    ),
    "features, head size 128, ragged, padding row": (
        Case(**FEATURES, head_size=128, features=48, seq_lens=(300, 0, 90, 230)),
        3,
    ),
    "features, head size 64, fp8 cache with scales, pages of 32, 7 query heads": (
        Case(
            **FEATURES,
            features=100,
            page_size=32,
            sink_tokens=32,
            budget=256,
            heads=1,
            group=7,
            kv_dtype=torch.float8_e4m3fn,
            key_scale=0.5,
            value_scale=2.0,
            seq_lens=(480,),
        ),
        2,
    ),
    "features, head size 96, token-major blocks of several pages, fp16, 1 query head, box": (
        Case(
            completion="features",
            head_size=96,
            group=1,
            head_first=False,
            pages_per_block=4,
            dtype=torch.float16,
            statistics_bits=8,
        ),
        2,
    ),
    "features, head size 256, pages of 64, no sink, 16 query heads": (
        Case(
            **FEATURES,
            features=128,
            head_size=256,
            group=16,
            heads=1,
            page_size=64,
            sink_tokens=0,
            budget=256,
            seq_lens=(500,),
        ),
        1,
    ),
    "features, pages of 128, 5 query heads": (
        Case(**FEATURES, page_size=128, sink_tokens=128, budget=512, heads=1, group=5, seq_lens=(1000,)),
        1,
    ),
    "features, fewer than an instruction takes, a share of the context, too few slots": (
        Case(**FEATURES, features=5, budget=0.3, heads=1, slots=1, seq_lens=(300, 400)),
        2,
    ),
    "features, more than elements of a head, selection in two levels": (
        Case(
            **FEATURES,
            features=200,
            seq_lens=(2400, 600),
            heads=1,
            budget=150,
            sink_tokens=0,
            max_model_len=40_000,
        ),
        1,
    ),
    "features, through a page cache": (Case(**FEATURES, seq_lens=(300, 0, 90), cache_slots=5), 3),
    "prefilled in many chunks, each shared out among programs, head size 96, token-major blocks of several pages": (
        Case(
            seq_lens=(300, 0, 97, 230),
            head_size=96,
            head_first=False,
            pages_per_block=4,
            chunk=93,
            tuning=Tuning(absorb_tokens=16, absorb_elements=4096),
        ),
        2,
    ),
    "prefilled at once, shared out among programs, fp8 cache with scales": (
        Case(
            **RUNS,
            completion="paged",
            kv_dtype=torch.float8_e4m3fn,
            key_scale=0.5,
            value_scale=2.0,
            seq_lens=(900, 130),
            heads=1,
            chunk=1000,
            tuning=Tuning(absorb_tokens=64),
        ),
        1,
    ),
    "features, prefilled in chunks that are shared out among programs": (
        Case(
            **FEATURES,
            features=100,
            head_size=128,
            seq_lens=(300, 0, 180),
            chunk=121,
            tuning=Tuning(absorb_tokens=32),
        ),
        2,
    ),
    "dense up to a threshold": (Case(dense_threshold=250, seq_lens=(200, 250, 251), heads=1), 2),
    "the budget covers the context": (Case(budget=512, heads=1), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    case, steps = CASES[name]
    check(case, "cpu", steps)


@pytest.mark.parametrize("name", WARM)
def test_warming_up_reads_and_counts_nothing(name: str) -> None:
    check_warm_up("cpu", WARM[name])


@pytest.mark.parametrize("options", [{}, SHARE], ids=["box", "share"])
@pytest.mark.parametrize("max_model_len", [2560, 40_000], ids=["one level", "two levels"])
def test_ties_go_to_the_earlier_page(max_model_len: int, options: dict[str, Any]) -> None:
    case = Case(**options, seq_lens=(2400,), heads=1, max_model_len=max_model_len, budget=150)
    runner = Runner(case, "cpu")
    runner.tokens[:] = runner.tokens[:, :1]
    runner.prefill()
    runner.decode([2400])
    count = case.geometry.retrieved_pages(2400)
    assert runner.workspace.chosen[0, 0, :count].tolist() == list(range(count))


@pytest.mark.parametrize("rule", ["max", "share"])
@pytest.mark.parametrize("group", [1, 3])
def test_keys_that_do_not_fit_into_registers(group: int, rule: str) -> None:
    case = Case(
        **RUNS,
        group_rule=rule,
        completion="paged",
        seq_lens=(2400,),
        heads=1,
        max_model_len=40_000 if group > 1 else 512,
        budget=150,
        tuning=Tuning(select_keys=16),
    )
    runner = Runner(case, "cpu")
    selection = runner.workspace.selection(1)
    assert (selection["GROUP"] > 1) == (group > 1)
    assert not selection["SINGLE"]
    runner.prefill()
    runner.decode([2400])


@pytest.mark.parametrize("completion", ["linear", "features"])
def test_sequences_that_share_a_prefix_part(completion: str) -> None:
    case = Case(seq_lens=(300, 300), heads=1, slots=4, completion=completion)
    runner = Runner(case, "cpu", steps=40)
    shared = 288 // case.page_size  # whole blocks; what follows is each row's own
    runner.block_table[1, :shared] = runner.block_table[0, :shared]
    runner.tokens[1, : shared * case.page_size] = runner.tokens[0, : shared * case.page_size]
    runner.prefill()
    assert runner.planner is not None
    for seq_len in range(300, 340):
        if seq_len in (300, 301, 304, 312, 313, 320, 328, 329, 336, 339):
            runner.decode([seq_len, seq_len])
        else:
            runner.skip([seq_len, seq_len])
    first, second = runner.planner.current.slot.tolist()
    assert first != second


@pytest.mark.parametrize("name", UPDATES)
def test_update_of_several_layers(name: str) -> None:
    check_update("cpu", name)


@pytest.mark.parametrize("chunk", [350, 64], ids=["whole prompt", "last chunk"])
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_decode_beside_the_prefill_that_fills_its_pages(completion: str, chunk: int) -> None:
    check_shared_step("cpu", completion, chunk)


def test_plans_are_those_of_the_reference() -> None:
    """Chats whose turns come back, some with a prefix of another, and that lose their slots to others at times."""
    geometry, rows, width = Case().geometry, 4, 700
    tags = [SummaryTags.empty(3, 4 * width) for _ in range(2)]
    planner = SummaryPlanner(geometry, tags[0], rows)
    table = torch.randperm(rows * width, dtype=torch.int32).view(rows, width)
    table[1, :150] = table[0, :150]
    random.seed(1)
    lengths, found = [random.randint(3000, 9000) for _ in range(rows)], Counter[str]()
    for _ in range(150):
        turn = random.random() < 0.4
        query_lens = [random.choice((0, 1, 1, 1, 40 if turn else 1, 600 if turn else 1)) for _ in range(rows)]
        for row, count in enumerate(query_lens):
            cached = 160 if random.random() < 0.1 else 0  # by another sequence
            length = lengths[row] + cached + count
            lengths[row] = length if length < 10_000 else 3000
        seq_lens = [n if count else 0 for n, count in zip(lengths, query_lens, strict=True)]
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        got = planner.plan(table, torch.tensor(seq_lens, dtype=torch.int32), starts)
        expected = reference.plan_summaries(tags[1], geometry, table, seq_lens, query_lens)
        for mine, theirs in zip(astuple(got), astuple(expected), strict=True):
            assert mine[:rows].tolist() == theirs.tolist()
        for row in range(rows):
            pages = int(expected.last[row] - expected.first[row])
            if expected.slot[row] >= 0 and pages:
                kind = "built" if expected.source[row] < 0 else "far" if pages > 1 else "next"
                found[kind if query_lens[row] == 1 else f"{kind} in a prefill"] += 1
        assert torch.equal(tags[0].slot_page, tags[1].slot_page)
    kinds = "built", "far", "next", "built in a prefill", "far in a prefill"
    assert min(found[kind] for kind in kinds) >= 5, found


@pytest.mark.parametrize(
    ("lengths", "channels"), [((1,), 3), ((63, 64, 65), 40), ((200, 1, 1, 130), 32)], ids=str
)
def test_linear_scan(lengths: tuple[int, ...], channels: int) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    decay, total = torch.rand(sum(lengths), channels), torch.randn(sum(lengths), 2, channels)
    state = torch.randn(len(lengths), 2, channels)
    expected = reference.linear_scan(decay, total, starts, state)
    torch.testing.assert_close(
        launch_linear_scan(decay, total, starts, state), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 40])
def test_remember(channels: int, dtype: torch.dtype) -> None:
    check_remember("cpu", channels, dtype)
