"""How a decode step is launched: programs that wait for each other must all find room."""

from __future__ import annotations

import importlib.util
from itertools import product
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.unit.kernels.cases import FEATURES, RUNS
from tests.unit.kernels.triton_compiled import Recorder, step_kernels
from vllm_rc_backend.attention_triton import (
    MPS_VARIABLES,
    TritonAttention,
    Workspace,
    launch_rows,
    make_shape,
)
from vllm_rc_backend.evaluation.kernel_check import Case
from vllm_rc_backend.host_kv.page_cache import DevicePages
from vllm_rc_backend.host_kv.staging import Staging
from vllm_rc_backend.kernels.reference import SummaryPlan, SummaryTags
from vllm_rc_backend.kernels.triton.overlap import ARRIVAL
from vllm_rc_backend.side_store import SideStore
from vllm_rc_backend.summaries_triton import SummaryPlanner, SummaryUpdater
from vllm_rc_backend.warm_up_triton import warm_up

PAGED: dict[str, Any] = {**RUNS, "completion": "paged"}


def workspace(**case: Any) -> Workspace:
    """Of a layer, for as many rows as ``most``."""
    most = case.pop("most", 8)
    made = Case(**case)
    shape = make_shape(made.layout, made.group, made.group_rule)
    return Workspace(shape, most, made.max_model_len, "cpu", made.statistics_bits)


@pytest.mark.parametrize("heads", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("max_model_len", [64, 4096, 131072])
def test_one_launch_only_where_all_of_its_programs_fit(heads: int, max_model_len: int) -> None:
    work = workspace(**PAGED, heads=heads, max_model_len=max_model_len, most=1)
    joint = {rows: work.processors * work.joint(rows) for rows in range(1, 1025) if work.joint(rows)}
    assert max(joint) < 1024
    for rows, room in joint.items():
        assert max(work.scorers(rows), work.attenders(rows)) * rows * heads <= room
        # Two for each, of which more would fit, or one for each and most of the room taken.
        taken = work.attenders(rows) * launch_rows(rows) * heads
        assert room >= 2 * rows * heads or taken >= 0.7 * room
    # As few to a multiprocessor as will do, whose registers and tiles are the larger.
    assert sorted(joint.values()) == [joint[rows] for rows in sorted(joint)]


class Launches:
    """Records, in place of launching them, what kernels Triton would compile for all launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorders = {at: Recorder(getattr(*at)) for at in step_kernels()}
        for at, recorder in self.recorders.items():
            monkeypatch.setattr(*at, recorder)

    def kernels(self) -> frozenset[Any]:
        """Those since the last call."""
        found = set()
        for (_, name), recorder in self.recorders.items():
            for values, options in recorder.launches:
                compiled = tuple(map(compiled_as, values, recorder.kernel.params))
                found.add((name, compiled, tuple(sorted((k, str(v)) for k, v in options.items()))))
            recorder.launches.clear()
        return frozenset(found)


def compiled_as(value: object, parameter: Any) -> object:
    """What of an argument that is not a constant a kernel is compiled for."""
    if isinstance(value, torch.Tensor):
        aligned = parameter.do_not_specialize_on_alignment or value.data_ptr() % 16 == 0
        return value.dtype, aligned
    if type(value) is int:
        size = value.bit_length() > 31
        return size if parameter.do_not_specialize else (size, value == 1, value % 16 == 0)
    return type(value)


def kernels_of(monkeypatch: pytest.MonkeyPatch, work: Workspace, layer: TritonAttention, most: int) -> Any:
    """A function of a number of rows: the kernels of their decode."""
    launches = Launches(monkeypatch)
    query = torch.zeros(most, work.shape.heads * work.shape.group, work.shape.head_size)
    table, lengths = torch.zeros(most, 16, dtype=torch.int32), torch.zeros(most, dtype=torch.int32)
    kv_cache = torch.zeros(1, work.shape.heads, work.shape.geometry.block_size, 2 * work.shape.head_size)

    def kernels(rows: int) -> frozenset[Any]:
        slots = lengths[:rows]
        plan = SummaryPlan(slots, slots, slots, slots)
        layer.decode(query[:rows], kv_cache, table[:rows], slots, plan, query[:rows])
        return launches.kernels()

    return kernels


def keep_pages(case: Case, work: Workspace, layers: list[TritonAttention]) -> tuple[DevicePages, Staging]:
    """Give layers their page caches, whose directories begin anywhere, and what prefills read the host through."""
    sizes = case.heads, 3403, case.head_size, case.dtype, "cpu", work.max_rows
    pages = DevicePages(work.shape.geometry, len(layers), 7, *sizes, case.max_model_len)
    for layer, own in zip(layers, pages.layers, strict=True):
        layer.pages = own
    return pages, Staging(case.geometry, case.heads, case.head_size, case.dtype, "cpu", work.max_rows)


@pytest.mark.parametrize("on_host", [False, True], ids=["pages on the device", "pages in host memory"])
@pytest.mark.parametrize("max_rows", [1, 21, 64])
@pytest.mark.parametrize(
    "options", [PAGED, FEATURES, {"completion": "none"}], ids=["paged", "features", "none"]
)
def test_no_step_needs_a_kernel_that_the_start_has_not_compiled(
    options: dict[str, Any], max_rows: int, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes beside prefills, whose rows begin anywhere; a block table of 63 columns; three layers."""
    case = Case(**options, heads=2, head_size=128, max_model_len=1000, slots=max_rows + 2)
    shape = make_shape(case.layout, case.group, case.group_rule)
    work = Workspace(shape, max_rows, case.max_model_len, "cpu", case.statistics_bits)
    layers = [TritonAttention(SideStore(case.layout, 8, "cpu"), work, 1.0) for _ in range(3)]
    planner = None
    if case.layout.slots:
        planner = SummaryPlanner(case.geometry, SummaryTags.empty(case.layout.slots, 8), max_rows)
    pages, staging = keep_pages(case, work, layers) if on_host else (None, None)
    launches = Launches(monkeypatch)
    warm_up(layers[0], planner, case.dtype, staging)
    compiled = launches.kernels()

    updater, updaters = SummaryUpdater(layers), [SummaryUpdater([layer]) for layer in layers]
    head_first = torch.zeros(8, 2, case.page_size, 256, dtype=case.dtype)
    token_first = torch.zeros(8, case.page_size, 2, 256, dtype=case.dtype).transpose(1, 2)
    query = torch.zeros(max_rows, 2 * case.group, 128, dtype=case.dtype)
    tables, starts = (
        torch.zeros(max_rows, 63, dtype=torch.int32),
        torch.zeros(max_rows + 1, dtype=torch.int32),
    )
    steps = [(decodes, rows) for rows in range(1, max_rows + 1) for decodes in {0, rows - 1, rows}]
    for (decodes, rows), cache in product(steps, (head_first, token_first)):
        for layer in layers:
            layer.bind(cache, 1.0, 1.0)
        table, lengths, plan = tables[:rows], starts[:rows], None
        if planner is not None:
            plan = planner.plan(table, lengths, starts[: rows + 1])
        if decodes == rows and plan is not None:
            updater.update(table, plan)
        if pages is not None:
            pages.begin_step(table, lengths, starts[: rows + 1], 100)
        for layer, own in zip(layers, updaters, strict=True):
            prefills = table[decodes:], lengths[decodes:], starts[decodes : rows + 1]
            if decodes < rows:
                rest = None if plan is None else plan.from_row(decodes)
                layer.update_prefill(cache, *prefills, 100, rest)
                if decodes and plan is not None:
                    own.update(table[:decodes], plan)
            if decodes:
                layer.decode(
                    query[:decodes], cache, table[:decodes], lengths[:decodes], plan, query[:decodes]
                )
            if decodes < rows and staging is not None:
                room = staging.room(rows - decodes)
                for first in (0, room, 2 * room):
                    staging.copy(cache, *prefills, first)
        assert launches.kernels() <= compiled, (decodes, rows)
    names = {name for name, *_ in compiled}
    assert {"decode_kernel", "finish_pages_kernel"} <= names
    assert (planner is not None) == ({"plan_kernel", "update_kernel", "absorb_kernel"} <= names)
    layer_by_layer = {"choose_kernel", "find_pages_kernel", "take_slots_kernel", "fetch_pages_kernel"}
    assert on_host == (layer_by_layer | {"truncate_pages_kernel", "stage_kernel"} <= names)


@pytest.mark.parametrize("max_model_len", [8192, 131072])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("options", [PAGED, FEATURES, {}], ids=["paged", "features", "box"])
def test_captured_batches_compile_what_any_other_needs(
    options: dict[str, Any], heads: int, max_model_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = [1, 2, 4, *range(8, 513, 8)]  # vLLM's default, up to there
    assert {launch_rows(rows) for rows in range(1, 513)} == set(captured)
    assert [launch_rows(rows, [6, 12, 64]) for rows in (3, 5, 6, 7, 9, 13, 60, 65)] == [
        4,
        6,
        6,
        8,
        12,
        16,
        64,
        72,
    ]
    case = Case(**options, heads=heads, head_size=128, max_model_len=max_model_len)
    work = workspace(**options, heads=heads, head_size=128, max_model_len=max_model_len, most=512)
    layer = TritonAttention(SideStore(case.layout, 1, "cpu"), work, 1.0)
    kernels = kernels_of(monkeypatch, work, layer, 512)
    each = {rows: kernels(rows) for rows in range(1, 513)}
    every = set(each.values())
    assert {each[rows] for rows in captured} == every
    compiled = work.compiled_for()
    assert {each[rows] for rows in compiled} == every
    assert len(compiled) == len(every) < 20
    keep_pages(case, work, [layer])
    cached = {rows: kernels(rows) for rows in range(1, 513)}
    assert {cached[rows] for rows in compiled} == set(cached.values())


@pytest.mark.parametrize(("head_size", "group"), [(256, 4), (128, 16)])
def test_wide_heads_and_large_groups_have_registers_for_three(head_size: int, group: int) -> None:
    wide, usual = workspace(**PAGED, head_size=head_size, group=group), workspace(**PAGED, head_size=128)
    rows = range(1, 1025)
    assert {wide.joint(n) for n in rows} == {0, 3}
    assert {usual.joint(n) for n in rows} == {0, 3, 4}


def test_several_launches_for_other_policies_features_and_shared_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert workspace(**PAGED).joint(1)
    assert not workspace(statistics_bits=8).joint(1)
    assert not workspace(**FEATURES).joint(1)
    for name in MPS_VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "50")
            assert not workspace(**PAGED).joint(1)


@pytest.mark.parametrize(("head_size", "most"), [(64, 256), (96, 256), (128, 256), (256, 128)])
def test_more_features_than_fit_are_refused(head_size: int, most: int) -> None:
    case = FEATURES | {"head_size": head_size}
    assert workspace(**case, features=most).shape.features == most
    with pytest.raises(ValueError, match=rf"features_file has {most + 1} features .* --features {most}$"):
        workspace(**case, features=most + 1)


@pytest.mark.parametrize(
    ("selection", "words"), [("box", "selection=box"), ("mean_var", "selection=mean_var")]
)
def test_share_is_refused_without_scores_that_are_masses(selection: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"group_rule=share .* {words} do not"):
        workspace(selection=selection, group_rule="share")


def test_share_keeps_no_keys() -> None:
    case = PAGED | {"heads": 8, "most": 1, "max_model_len": 131072}
    largest, share = workspace(**case), workspace(**case, group_rule="share")
    keys, maxima = largest.keys.nbytes, largest.maxima.nbytes
    assert share.keys is share.head_scores
    assert share.maxima.nbytes == 2 * maxima  # four heads of 2 bytes instead of one of 4
    assert share.nbytes == largest.nbytes - keys + maxima


def test_the_buffers_hold_the_partial_results_of_any_batch() -> None:
    work = workspace(**PAGED, heads=8, most=48, max_model_len=8192)
    for rows in range(1, 49):
        assert rows * 8 * (work.attenders(rows) + 1) <= len(work.partial_out) == len(work.partial_stats)
        assert rows * 8 * work.scorers(rows) <= len(work.masses)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_no_program_of_one_launch_merges_twice(heads: int) -> None:
    work = workspace(**PAGED, heads=heads, head_size=128, max_model_len=131072, most=200 // heads)
    for rows in range(1, 200 // heads + 1):
        splits, columns = work.merge_tile(rows)
        assert splits * work.shape.merge_rows * columns <= work.tuning.merge_elements
        if work.joint(rows):
            assert work.shape.block_d // columns <= work.attenders(rows)


@pytest.mark.parametrize("case", [PAGED, FEATURES | {"features": 256}], ids=["paged", "features"])
@pytest.mark.parametrize("head_size", [64, 96, 128])
def test_a_chunk_of_one_sequence_fills_the_gpu(case: dict[str, Any], head_size: int) -> None:
    work = workspace(**case, heads=8, most=300, head_size=head_size)
    assert work.absorb_tiles <= ARRIVAL.value, "a counter for each"
    for rows in range(1, 301):
        programs = rows * 8 * work.absorb_tiles * work.absorbers(rows)
        assert work.absorbers(rows) == 1 or programs <= min(len(work.sums), 2 * work.processors)
    assert 8 * work.absorb_tiles * work.absorbers(1) > 1.5 * work.processors
