"""The Triton kernels on this machine's GPU against the reference: every shape they claim, and under graph replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.kernels.cases import FEATURES, LARGE_POOL, RUNS, SHARE
from tests.unit.kernels.shared_step_check import COMPLETIONS, check_shared_step
from tests.unit.kernels.update_check import UPDATES, check_update
from tests.unit.kernels.warm_up_check import WARM, check_warm_up
from vllm_rc_backend.evaluation.kernel_check import Case, Runner, check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RAGGED = (500, 1, 0, 131, 333)
FP8 = {"kv_dtype": torch.float8_e4m3fn, "key_scale": 0.5, "value_scale": 2.0}
CASES = {
    "default": Case(**RUNS, completion="paged", head_size=128, seq_lens=RAGGED, heads=8),
    "runs, head size 64, 1 query head": Case(**RUNS, completion="paged", group=1, seq_lens=RAGGED),
    "runs, head size 96, 5 query heads, token-major, fp16": Case(
        **RUNS, completion="paged", head_size=96, group=5, head_first=False, dtype=torch.float16
    ),
    "runs, head size 256, 16 query heads, pages of 32 in blocks of 2": Case(
        **RUNS,
        completion="paged",
        head_size=256,
        group=16,
        page_size=32,
        pages_per_block=2,
        sink_tokens=32,
        budget=256,
    ),
    "runs, fp8, mean over the group": Case(
        **RUNS, **FP8, head_size=128, group=8, group_rule="mean", seq_lens=RAGGED
    ),
    "runs, sum over the group": Case(
        **RUNS, completion="paged", head_size=128, group=8, group_rule="sum", seq_lens=RAGGED
    ),
    "runs in two levels": Case(
        **RUNS,
        completion="paged",
        head_size=128,
        seq_lens=(6000, 700),
        budget=150,
        max_model_len=70_000,
        heads=1,
    ),
    "share": Case(**SHARE, completion="paged", head_size=128, seq_lens=RAGGED, heads=8),
    "share, head size 64, 5 query heads, fp8": Case(
        **SHARE, **FP8, completion="paged", group=5, seq_lens=RAGGED
    ),
    "share, 16 query heads, selection only": Case(
        **SHARE, completion="none", head_size=128, group=16, seq_lens=RAGGED
    ),
    "share, many rows": Case(
        **SHARE, completion="paged", head_size=128, seq_lens=tuple(range(40, 680, 8)), heads=4
    ),
    "share in two levels": Case(
        **SHARE,
        completion="paged",
        head_size=128,
        seq_lens=(6000, 700),
        budget=150,
        max_model_len=70_000,
        heads=1,
    ),
    "share in two levels, many rows, 8 query heads": Case(
        **SHARE,
        completion="paged",
        head_size=128,
        seq_lens=tuple(range(1200, 2600, 20)),
        budget=150,
        max_model_len=70_000,
        heads=4,
        group=8,
    ),
    "share, moba, linear": Case(selection="moba", group_rule="share", completion="linear", seq_lens=RAGGED),
    "share, features, two levels": Case(
        **SHARE, completion="features", head_size=128, seq_lens=(6000, 700), budget=150, max_model_len=70_000
    ),
    "share, through a page cache": Case(**SHARE, completion="paged", seq_lens=RAGGED, cache_slots=20),
    "share, features, through a page cache": Case(
        **SHARE, completion="features", seq_lens=RAGGED, cache_slots=20
    ),
    "runs, many rows": Case(
        **RUNS,
        completion="paged",
        head_size=128,
        seq_lens=tuple(range(40, 680, 8)),
        heads=4,
        dtype=torch.float16,
    ),
    "runs, in one launch with more programs on a multiprocessor": Case(
        **RUNS, completion="paged", head_size=128, seq_lens=tuple(range(40, 640, 20)), heads=8
    ),
    "runs, in one launch with one program for each": Case(
        **RUNS, completion="paged", head_size=128, seq_lens=tuple(range(40, 660, 10)), heads=8
    ),
    "share, in one launch with one program for each, two levels": Case(
        **SHARE,
        completion="paged",
        head_size=128,
        seq_lens=tuple(range(1200, 2440, 20)),
        budget=150,
        max_model_len=70_000,
        heads=8,
        group=8,
    ),
    "moba, mass from the scores": Case(selection="moba", completion="paged", seq_lens=RAGGED),
    "features": Case(**FEATURES, head_size=128, features=128, seq_lens=RAGGED, heads=8),
    "features, head size 64, 100 of them, 7 query heads, fp8, pages of 32": Case(
        **FEATURES, **FP8, features=100, group=7, page_size=32, sink_tokens=32, budget=256
    ),
    "features, head size 96, 5 query heads, token-major blocks of 4 pages, fp16": Case(
        **FEATURES,
        head_size=96,
        features=48,
        group=5,
        head_first=False,
        pages_per_block=4,
        dtype=torch.float16,
        seq_lens=RAGGED,
    ),
    "features, head size 256, 128 of them, 16 query heads, pages of 64": Case(
        **FEATURES,
        head_size=256,
        features=128,
        group=16,
        page_size=64,
        sink_tokens=0,
        budget=320,
        seq_lens=(700, 650),
    ),
    "features, 5 of them, pages of 128, 1 query head, box": Case(
        completion="features",
        features=5,
        group=1,
        page_size=128,
        sink_tokens=128,
        budget=640,
        seq_lens=(1500,),
    ),
    "features, 256 of them, two levels, long": Case(
        **FEATURES,
        head_size=128,
        features=256,
        seq_lens=(6000, 700),
        budget=150,
        max_model_len=70_000,
        heads=1,
    ),
    "features, many rows, too few slots": Case(
        **FEATURES, head_size=128, seq_lens=tuple(range(40, 680, 8)), heads=4, slots=30
    ),
    "features, through a page cache": Case(**FEATURES, seq_lens=RAGGED, cache_slots=20),
    "head size 64, 1 query head": Case(head_size=64, group=1),
    "head size 96, 2 query heads, fp16": Case(head_size=96, group=2, dtype=torch.float16, seq_lens=RAGGED),
    "head size 128, 5 query heads, token-major": Case(
        head_size=128, group=5, head_first=False, seq_lens=RAGGED
    ),
    "head size 256, 6 query heads, 8 bits": Case(head_size=256, group=6, statistics_bits=8),
    "7 query heads, fp8": Case(group=7, **FP8, seq_lens=RAGGED),
    "8 query heads, 8 bits, fp8, blocks of 4 pages": Case(
        group=8, **FP8, statistics_bits=8, pages_per_block=4
    ),
    "16 query heads, mean_var, mean": Case(
        group=16, selection="mean_var", group_rule="mean", statistics_bits=8
    ),
    "moba, fp16": Case(selection="moba", dtype=torch.float16, statistics_bits=8),
    "pages of 32 in blocks of 2": Case(page_size=32, pages_per_block=2, sink_tokens=32, budget=256),
    "pages of 64": Case(page_size=64, sink_tokens=0, budget=320, seq_lens=(700, 650)),
    "pages of 128": Case(page_size=128, sink_tokens=128, budget=640, seq_lens=(1500,)),
    "a large pool": Case(**LARGE_POOL, head_first=False),
    "a large pool, features": Case(**{**LARGE_POOL, "completion": "features"}, features=64),
    "share of the context": Case(budget=0.3, seq_lens=RAGGED),
    "selection only": Case(completion="none", seq_lens=RAGGED, statistics_bits=8),
    "too few slots": Case(slots=1, seq_lens=(300, 400)),
    "selection in two levels": Case(
        seq_lens=(6000, 700), budget=150, max_model_len=70_000, statistics_bits=8, heads=1
    ),
    "budget covers the context": Case(budget=600, seq_lens=RAGGED),
    "many rows": Case(seq_lens=tuple(range(40, 520, 8)), heads=1),
    "long chunks, each shared out among programs": Case(
        **RUNS, completion="paged", head_size=128, seq_lens=(9000, 700, 0, 5003), heads=8, chunk=4001
    ),
    "long chunks, head size 256, fp8": Case(
        **FP8, head_size=256, statistics_bits=8, seq_lens=(9000,), heads=4, chunk=9000
    ),
    "long chunks, features": Case(
        **FEATURES, head_size=128, features=128, seq_lens=(7000, 3000), heads=8, chunk=4001
    ),
    "long chunks, 256 features": Case(
        **FEATURES, head_size=128, features=256, seq_lens=(7000,), heads=2, chunk=4001
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    check(CASES[name], "cuda", steps=2)


@pytest.mark.parametrize("name", WARM)
def test_warming_up_reads_and_counts_nothing(name: str) -> None:
    check_warm_up("cuda", WARM[name])


@pytest.mark.parametrize(("completion", "rule"), [("paged", "max"), ("paged", "share"), ("features", "max")])
def test_graph_replay_follows_changing_lengths(completion: str, rule: str) -> None:
    """One captured graph; rows come, go, finish pages and cross from dense to sparse."""
    case = Case(**RUNS, group_rule=rule, completion=completion, head_size=128, seq_lens=(100, 300, 0, 150))
    runner = Runner(case, "cuda", steps=40)
    runner.prefill()
    rows = len(case.seq_lens)
    lengths, starts = runner.tensor([0] * rows), runner.tensor([0] * (rows + 1))
    query = runner.new_query(rows)
    out = torch.full_like(query, torch.nan)
    assert runner.planner is not None

    def step() -> None:
        plan = runner.planner.plan(runner.block_table, lengths, starts)
        runner.updater.update(runner.block_table, plan)
        runner.attention.decode(query, runner.kv_cache, runner.block_table, lengths, plan, out)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    for i in range(40):
        now = [n + i if n else 0 for n in case.seq_lens]
        counts = [min(n, 1) for n in now]
        runner.write(now, counts)
        lengths.copy_(runner.tensor(now))
        starts[1:] = runner.tensor(counts).cumsum(0)
        query.copy_(runner.new_query(rows))
        out.fill_(torch.nan)
        graph.replay()
        runner.compare(query, now, out)
    runner.compare_counters()
    assert runner.expected_counts["sparse_rows"] > 40
    assert runner.expected_counts["dense_rows"] > 0


@pytest.mark.parametrize("name", UPDATES)
def test_update_of_several_layers(name: str) -> None:
    check_update("cuda", name)


@pytest.mark.parametrize("chunk", [350, 64], ids=["whole prompt", "last chunk"])
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_decode_beside_the_prefill_that_fills_its_pages(completion: str, chunk: int) -> None:
    check_shared_step("cuda", completion, chunk)


@pytest.mark.parametrize("completion", ["paged", "features"])
def test_a_chunks_summary_is_the_same_every_time(completion: str) -> None:
    """Whatever order the programs that share a chunk out arrive in."""
    case = Case(**RUNS, completion=completion, head_size=128, seq_lens=(9000, 4000), heads=8)
    runner = Runner(case, "cuda")
    lengths = list(case.seq_lens)
    runner.extend(lengths, lengths)
    assert runner.planner is not None
    plan, states = runner.planner.current, runner.store.states
    assert plan.slot.tolist() == [0, 1]
    assert runner.workspace.absorbers(2) > 1
    first = states.clone()
    for _ in range(20):
        states[:2] = torch.nan
        runner.attention.absorb(runner.kv_cache, runner.block_table, plan)
        assert torch.equal(states[:2], first[:2])


@pytest.mark.parametrize("options", [{}, SHARE], ids=["box", "share"])
def test_ties_go_to_the_earlier_page(options: dict[str, Any]) -> None:
    for max_model_len in (1024, 70_000):
        case = Case(**options, seq_lens=(900,), heads=1, max_model_len=max_model_len)
        runner = Runner(case, "cuda")
        runner.tokens[:] = runner.tokens[:, :1]
        runner.prefill()
        runner.decode([900])
        count = case.geometry.retrieved_pages(900)
        assert runner.workspace.chosen[0, 0, :count].tolist() == list(range(count))


@pytest.mark.parametrize("rule", ["max", "share"])
def test_the_result_is_the_same_every_time(rule: str) -> None:
    """Whatever order the programs of a row arrive in."""
    case = Case(
        **RUNS, group_rule=rule, completion="none", head_size=128, seq_lens=(3000, 700), heads=4, budget=512
    )
    runner = Runner(case, "cuda")
    runner.prefill()
    query, lengths = runner.new_query(2), runner.tensor([3000, 700])
    runner.write([3000, 700], [1, 1])
    outs = []
    for _ in range(20):
        out = torch.full_like(query, torch.nan)
        runner.attention.decode(query, runner.kv_cache, runner.block_table, lengths, None, out)
        outs.append(out)
    assert all(torch.equal(out, outs[0]) for out in outs)
