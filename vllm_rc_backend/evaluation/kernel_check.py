"""Holds the Triton kernels to the reference: random paged caches, decode steps, every intermediate compared.

Used by the tests, under Triton's interpreter and on GPUs, and by ``rc-topk bench`` before it prints a speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vllm_rc_backend.attention_triton import COUNTERS, TritonAttention, Tuning, Workspace, make_shape
from vllm_rc_backend.completion import LEARNED, Completion, make_completion
from vllm_rc_backend.completion.features import Features
from vllm_rc_backend.host_kv.page_cache import DevicePages
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import PagedKV, SummaryPlan, SummaryTags
from vllm_rc_backend.selection import make_policy
from vllm_rc_backend.selection.runs import rotate
from vllm_rc_backend.side_store import SideStore, StoreLayout
from vllm_rc_backend.summaries_triton import SummaryPlanner, SummaryUpdater


def random_maps(heads: int, features: int, head_size: int) -> Features:
    """Untrained maps, the same at every call: soft clusters around random centres, and the centres' scores."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(heads, features, head_size, generator=draw)
    key_bias, query_bias = torch.randn(2, heads, features, generator=draw)
    keys = (centres * (2 / head_size**0.5)).bfloat16().float()  # kernels round maps to the cache's type
    return Features(keys, key_bias, centres.bfloat16().float(), query_bias / 4)


@dataclass(frozen=True)
class Case:
    """A batch of sequences and a layer.

    Attributes:
        seq_lens: tokens of each sequence after the first decode step; 0 makes a padding row.
        head_first: whether a block holds head after head (HND), or token after token (NHD).
        features: of a KV head, with the completion ``features``.
        chunk: tokens of each sequence that a step of the prefill adds.
        cache_slots: decode through a page cache of so many slots; None: without one.
        other_blocks: of the pool, before those of the sequences.
    """

    seq_lens: tuple[int, ...] = (300,)
    heads: int = 2
    group: int = 4
    head_size: int = 64
    page_size: int = 16
    pages_per_block: int = 1
    sink_tokens: int = 16
    tail_tokens: int = 24
    budget: float = 128
    dense_threshold: int = 0
    selection: str = "box"
    group_rule: str = "max"
    completion: str = "linear"
    features: int = 32
    statistics_bits: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
    head_first: bool = True
    slots: int | None = None
    chunk: int = 150
    max_model_len: int = 512
    max_rows: int | None = None
    cache_slots: int | None = None
    other_blocks: int = 0
    tuning: Tuning | None = None

    @property
    def geometry(self) -> Geometry:
        """The regions."""
        return Geometry(
            page_size=self.page_size,
            block_size=self.page_size * self.pages_per_block,
            sink_tokens=self.sink_tokens,
            tail_tokens=self.tail_tokens,
            budget=self.budget,
            dense_threshold=self.dense_threshold,
        )

    @property
    def layout(self) -> StoreLayout:
        """The side store's sizes."""
        kv_dtype = self.kv_dtype or self.dtype
        completion: Completion
        if self.completion == LEARNED:
            completion = random_maps(self.heads, self.features, self.head_size)
        else:
            completion = make_completion(self.completion)
        slots = (
            (len(self.seq_lens) + 1 if self.slots is None else self.slots)
            if completion.state_rows(self.head_size)
            else 0
        )
        return StoreLayout(
            heads=self.heads,
            head_size=self.head_size,
            kv_bytes=kv_dtype.itemsize,
            slots=slots,
            statistics_bits=self.statistics_bits,
            geometry=self.geometry,
            policy=make_policy(self.selection),
            completion=completion,
        )


class Runner:
    """The same steps through the Triton kernels and through the reference.

    The cache is NaN wherever no token of the batch has been written yet.
    """

    def __init__(self, case: Case, device: torch.device | str, steps: int = 1) -> None:
        self.case = case
        self.device = torch.device(device)
        layout = case.layout
        geometry = layout.geometry
        rows = len(case.seq_lens)
        size, d = geometry.block_size, case.head_size
        blocks_a_row = -(-(max(case.seq_lens) + steps) // size)
        first = 1 + case.other_blocks
        blocks = first + rows * blocks_a_row
        kv_dtype = case.kv_dtype or case.dtype

        middle = (case.heads, size) if case.head_first else (size, case.heads)
        self.kv_cache = torch.empty(blocks, *middle, 2 * d, dtype=kv_dtype, device=self.device)
        nothing = torch.tensor(torch.nan).to(kv_dtype).to(self.device)
        self.kv_cache[0] = nothing  # other blocks are not touched: on a CPU there is no memory behind them
        self.kv_cache[first:] = nothing
        if not case.head_first:
            self.kv_cache = self.kv_cache.transpose(1, 2)
        table = torch.randperm(rows * blocks_a_row).view(rows, blocks_a_row) + first
        self.block_table = table.to(torch.int32).to(self.device)

        length = max(case.seq_lens) + steps
        # A drifting mean and a few large channels: keys as models make them, not all pages alike.
        drift = torch.randn(rows, length, case.heads, d).cumsum(dim=1) / max(length, 1) ** 0.5
        loud = 1 + 3 * (torch.rand(case.heads, d) < 0.05)
        keys = (torch.randn(rows, length, case.heads, d) * 0.7 + drift) * loud
        values = torch.randn(rows, length, case.heads, d) + drift.flip(-1)
        self.tokens = (
            torch.cat((keys / case.key_scale, values / case.value_scale), dim=-1).to(kv_dtype).to(self.device)
        )

        max_rows = case.max_rows or rows
        pages = blocks * geometry.pages_per_block
        self.shape = make_shape(layout, case.group, case.group_rule)
        self.store = SideStore(layout, pages, self.device)
        self.workspace = Workspace(
            self.shape,
            max_rows,
            max(case.max_model_len, length),
            self.device,
            case.statistics_bits,
            case.tuning,
        )
        scale = d**-0.5
        self.pages: DevicePages | None = None
        if case.cache_slots is not None:
            self.pages = DevicePages(
                self.shape.geometry,
                1,
                pages,
                case.heads,
                case.cache_slots,
                d,
                kv_dtype,
                self.device,
                max_rows,
                self.workspace.max_pages * case.page_size,
            )
        self.attention = TritonAttention(
            self.store, self.workspace, scale, None if self.pages is None else self.pages.layers[0]
        )
        self.attention.bind(self.kv_cache, case.key_scale, case.value_scale)
        self.updater = SummaryUpdater([self.attention])
        self.planner: SummaryPlanner | None = None
        if layout.slots:
            self.planner = SummaryPlanner(
                geometry, SummaryTags.empty(layout.slots, pages, self.device), max_rows
            )
        self.scale = scale
        self.twin = SideStore(layout, pages, self.device)
        for store in (self.store, self.twin):
            store.states.fill_(torch.nan)
        self.kv = PagedKV.packed(self.kv_cache, geometry.page_size, case.key_scale, case.value_scale)
        self.expected_counts = dict.fromkeys(COUNTERS, 0)

    def tensor(self, values: list[int]) -> Tensor:
        """int32 on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def write(self, seq_lens: list[int], query_lens: list[int]) -> None:
        """Put this step's tokens into the cache."""
        size = self.case.geometry.block_size
        for row, (seq_len, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
            position = torch.arange(seq_len - query_len, seq_len, device=self.device)
            block = self.block_table[row].long()[position // size]
            self.kv_cache[block, :, position % size] = self.tokens[row, position]
        if self.pages is not None:
            starts = self.tensor(self._starts(query_lens))
            self.pages.begin_step(self.block_table, self.tensor(seq_lens), starts, max(query_lens))

    def chunks(self) -> Iterator[tuple[list[int], list[int]]]:
        """Lengths after each step of the prefill of all tokens before the first decode step, and what it adds."""
        ends = [max(n - 1, 0) for n in self.case.seq_lens]
        for start in range(0, max(ends), self.case.chunk):
            counts = [min(max(end - start, 0), self.case.chunk) for end in ends]
            yield [start + count if count else 0 for count in counts], counts

    def prefill(self) -> None:
        """All of these steps; compares the page statistics and summaries."""
        for step in self.chunks():
            self.extend(*step)

    def run_prefill(self, seq_lens: list[int], query_lens: list[int]) -> SummaryPlan | None:
        """The kernels of one step of a prefill."""
        self.write(seq_lens, query_lens)
        lengths, starts = self.tensor(seq_lens), self.tensor(self._starts(query_lens))
        plan = None
        if self.planner is not None:
            plan = self.planner.plan(self.block_table, lengths, starts)
        longest = max(query_lens)
        self.attention.update_prefill(self.kv_cache, self.block_table, lengths, starts, longest, plan)
        return plan

    def extend(self, seq_lens: list[int], query_lens: list[int]) -> None:
        """One step of a prefill; compares the page statistics, and the summaries that its rows were given."""
        plan = self.run_prefill(seq_lens, query_lens)
        self.finish(seq_lens, query_lens)
        self._compare_statistics()
        if plan is None:
            return
        for row, seq_len in enumerate(seq_lens):
            if (slot := int(plan.slot[row])) >= 0:
                check_summary(self.case, self.store, self.kv, self.block_table[row], row, seq_len, slot)

    @staticmethod
    def _starts(query_lens: list[int]) -> list[int]:
        return list(accumulate(query_lens, initial=0))

    def decode(self, seq_lens: list[int]) -> float:
        """One decode step; compares everything. Returns the relative error of the output."""
        query = self.new_query(len(seq_lens))
        return self.compare(query, seq_lens, self.run_decode(query, seq_lens))

    def run_decode(self, query: Tensor, seq_lens: list[int]) -> Tensor:
        """The kernels of one decode step; the output, which was NaN before."""
        plan = self.begin(seq_lens)
        out = torch.full_like(query, torch.nan)
        self.attention.decode(query, self.kv_cache, self.block_table, self.tensor(seq_lens), plan, out)
        return out

    def begin(self, seq_lens: list[int]) -> SummaryPlan | None:
        """What a decode step does before any layer: its plan, None without a completion."""
        counts = [min(n, 1) for n in seq_lens]
        self.write(seq_lens, counts)
        if self.planner is None:
            return None
        plan = self.planner.plan(self.block_table, self.tensor(seq_lens), self.tensor(self._starts(counts)))
        self.updater.update(self.block_table, plan)
        return plan

    def skip(self, seq_lens: list[int]) -> None:
        """Advance by a step that completes no page, side store and all, without decoding or comparing anything."""
        assert all(n % self.case.page_size for n in seq_lens if n)
        self.begin(seq_lens)
        self._count_built()

    def new_query(self, rows: int) -> Tensor:
        """A random query, loud enough that softmax is not flat."""
        size = (rows, self.case.heads * self.case.group, self.case.head_size)
        return (torch.randn(size) * 1.5).to(self.case.dtype).to(self.device)

    def compare(self, query: Tensor, seq_lens: list[int], out: Tensor) -> float:
        """Hold one step's results, side store and selection to the reference.

        Raises:
            AssertionError: what differs and by how much.
        """
        case, geometry, counts = self.case, self.case.geometry, self.expected_counts
        self.finish(seq_lens, [min(n, 1) for n in seq_lens])
        self._count_built()
        self._compare_statistics()
        errors = [0.0]
        for row, seq_len in enumerate(seq_lens):
            if not seq_len:
                assert bool((out[row] == 0).all()), f"padding row {row} is not zero"
                continue
            slot = -1 if self.planner is None else int(self.planner.current.slot[row])
            sparse = geometry.is_sparse(seq_len)
            counts["sparse_rows" if sparse else "dense_rows"] += 1
            counts["tokens_held"] += seq_len
            counts["tokens_read"] += geometry.tokens_read(seq_len)
            if sparse:
                counts["pages_scored"] += geometry.mid_end(seq_len) - geometry.sink_pages
                counts["rows_without_summary"] += self.planner is not None and slot < 0
            error = check_row(
                case,
                self.attention,
                self.kv_cache,
                self.block_table[row],
                row,
                seq_len,
                slot if sparse else -1,
                query[row],
                out[row],
            )
            errors.append(error)
        return max(errors)

    def compare_counters(self) -> None:
        """Hold the device counters to what the steps so far must have added, and those of arrivals to zero."""
        assert not self.workspace.arrivals.any(), "counters of arrivals are not zero between launches"
        counted = dict(zip(COUNTERS, self.workspace.counters.tolist(), strict=True))
        assert 0 <= counted.pop("residual_share_millionths") <= 1_000_000 * counted["sparse_rows"]
        expected = {name: value for name, value in self.expected_counts.items() if name in counted}
        assert counted == expected, f"counters {counted}, expected {expected}"

    def _count_built(self) -> None:
        """Expect those summaries of the current step's plan to be counted that start from nothing."""
        if self.planner is not None:
            self.expected_counts["summaries_built"] += int(self.planner.current.built.sum())

    def finish(self, seq_lens: list[int], query_lens: list[int]) -> None:
        """The reference's statistics of the pages that a step has finished."""
        twin, policy = self.twin, self.twin.layout.policy
        reference.finish_pages(
            self.kv, self.block_table, seq_lens, query_lens, policy, twin.codes, twin.scales
        )

    def _compare_statistics(self) -> None:
        stores = (self.store, self.twin)
        if self.store.codes.dtype == torch.uint8:
            # A level that sums in another order push over its edge is another code; that is rare.
            assert self.store.scales is not None
            assert self.twin.scales is not None
            written = self.twin.scales > 0
            assert_same_scales(
                (self.store.codes[written], self.store.scales[written]),
                (self.twin.codes[written], self.twin.scales[written]),
            )
            differ = (self.store.codes != self.twin.codes).float().mean()
            assert differ < 1e-3, f"page statistics differ in {differ:.2e} of their bytes"
            return
        ours, theirs = (reference.decode_statistics(s.codes, s.scales) for s in stores)
        # Sums in another order may round to the neighbouring code.
        step = theirs.abs().amax(dim=-1, keepdim=True).clamp(min=1e-3) / 100
        assert bool(((ours - theirs).abs() <= step).all()), "page statistics differ"


def assert_same_scales(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Hold the scales of 2-bit vectors to others', which were fitted to the codes: another code, another scale.

    Args:
        ours, theirs: uint8 codes ``[..., head_size / 4]`` and float16 scales ``[...]``.
    """
    (codes, scales), (expected_codes, expected) = ours, theirs
    error = (scales.float() / expected.float() - 1).abs()
    allowed = torch.where((codes == expected_codes).all(dim=-1), 2e-3, 0.1)
    assert bool((error <= allowed).all()), (
        f"scales differ by up to {float((error / allowed).max()):.1f} times what may be"
    )


def stored_statistics(store: SideStore, ids: Tensor) -> Tensor:
    """float32 ``[heads, pages, vectors, head_size]`` of physical pages."""
    scales = None if store.scales is None else store.scales[ids]
    return reference.decode_statistics(store.codes[ids], scales).transpose(0, 1)


def compare_selection(
    case: Case, attention: TritonAttention, ids: Tensor, row: int, seq_len: int, query: Tensor
) -> Tensor:
    """The pages that the kernel chose for a row, if each is as good as the reference's choice.

    Args:
        ids: int64, physical pages of the mid region.
        query: float32 ``[heads, group, head_size]``, scaled.

    Returns:
        int64 ``[heads, count]``, places in the mid region.
    """
    store, count = attention.store, case.geometry.retrieved_pages(seq_len)
    page_statistics = stored_statistics(store, ids)
    slack: Tensor | float = 0.0
    if case.selection == "runs":
        rotated = rotate(query)
        query = rotate(reference.round_query(rotated))
        # The kernel sums the rotation up in another order, and then one element in a thousand is rounded to the other
        # neighbour: four units, 0.04 of the largest element at most, times a level. Two pages' scores are compared.
        level = page_statistics.abs().amax((-1, -2, -3))
        slack = 2 * 0.04 * rotated.abs().amax((-1, -2)) * level
    head_scores = store.layout.policy.score(query, page_statistics)
    scores = reference.reduce_group(head_scores, case.group_rule)
    places = attention.workspace.chosen[row, :, :count].long()
    assert bool(((places >= 0) & (places < len(ids))).all()), f"row {row}: pages outside the mid region"
    assert bool((places.diff(dim=-1) > 0).all()), f"row {row}: pages repeat or are out of order"
    # Errors are those of the heads' scores, whatever the rule takes off them.
    slack = slack + 2e-3 * head_scores.abs().amax((-1, -2))
    _compare_choice(scores, places, slack, f"row {row}")
    if attention.shape.by_share:
        kept = attention.workspace.head_scores[row, :, : len(ids)].float().transpose(1, 2) * math.log(2)
        scores = reference.reduce_group(kept, case.group_rule)
        _compare_choice(
            scores, places, 1e-5 * kept.abs().amax((-1, -2)), f"row {row}, by the kernel's scores"
        )
    return places


def _compare_choice(scores: Tensor, places: Tensor, slack: Tensor, what: str) -> None:
    """Hold places chosen ``[heads, count]`` to the best by scores ``[heads, pages]``, up to ``slack`` ``[heads]``."""
    needed = reference.select_pages(scores, places.shape[-1])
    worst, lowest = (scores.gather(1, x).amin(-1) for x in (places, needed))
    assert bool((worst >= lowest - slack).all()), f"{what}: took a page of {worst} and left one of {lowest}"


def check_summary(
    case: Case, store: SideStore, kv: PagedKV, block_table: Tensor, row: int, seq_len: int, slot: int
) -> None:
    """Hold a row's summary to what its mid region's pages give.

    Raises:
        AssertionError: by how much it differs.
    """
    geometry = case.geometry
    first, last = (x * case.page_size for x in (geometry.sink_pages, geometry.mid_end(seq_len)))
    exact = store.completion.contribution(*kv.read_range(block_table, first, last))
    wrong = (store.states[slot].float().sum(dim=1) - exact).norm() / exact.norm()
    assert wrong < 2e-4, f"row {row} at {seq_len}: summary differs by {wrong:.2e}"


def check_row(
    case: Case,
    attention: TritonAttention,
    kv_cache: Tensor,
    block_table: Tensor,
    row: int,
    seq_len: int,
    slot: int,
    query: Tensor,
    out: Tensor,
) -> float:
    """Hold one row of a decode step to the reference.

    Args:
        block_table: int32 ``[max_blocks]``, of this row.
        slot: the row's summary, -1 for none.
        query, out: ``[heads * group, head_size]``.

    Returns:
        The relative error of the output.

    Raises:
        AssertionError: what differs.
    """
    geometry, completion = case.geometry, attention.store.completion
    kv = PagedKV.packed(kv_cache, case.page_size, case.key_scale, case.value_scale)
    q = query.float().unflatten(0, (case.heads, -1)) * attention.scale
    if not geometry.is_sparse(seq_len):
        expected = reference.decode_dense(q, *kv.read_range(block_table, 0, seq_len))
    else:
        mid = torch.arange(geometry.sink_pages, geometry.mid_end(seq_len), device=query.device)
        ids = kv.page_ids(block_table, mid)
        places = compare_selection(case, attention, ids, row, seq_len, q)
        unread = None
        if completion.needs_mass:
            scores = case.layout.policy.score(q, stored_statistics(attention.store, ids))
            unread = reference.unread_log_mass(scores, places, case.page_size)
        state = None
        if slot >= 0:
            check_summary(case, attention.store, kv, block_table, row, seq_len, slot)
            state = reference.read_state(attention.store.states[slot], completion.precise_rows)
        pages = places + geometry.sink_pages
        expected, _ = reference.decode_sparse(
            q, kv, block_table, seq_len, geometry, pages, completion, state, unread
        )
    expected = expected.flatten(0, 1)
    assert not out.isnan().any(), f"row {row}: output holds NaN or was not written"
    error = float((out.float() - expected).norm() / expected.norm())
    assert error < 1e-2, f"row {row}: output differs by {error:.2e}"
    return error


def check(case: Case, device: torch.device | str, steps: int = 1) -> float:
    """Prefill and some decode steps of a case.

    Returns:
        The largest relative error of an output.

    Raises:
        AssertionError: what differs from the reference.
    """
    runner = Runner(case, device, steps)
    runner.prefill()
    errors = [runner.decode([n + step if n else 0 for n in case.seq_lens]) for step in range(steps)]
    runner.compare_counters()
    if case.layout.slots >= len(case.seq_lens):
        # The prefill has left none to build but of rows that were not sparse then.
        sparse = case.geometry.is_sparse
        late = sum(not sparse(n - 1) and sparse(n + steps - 1) for n in case.seq_lens if n)
        built = runner.expected_counts["summaries_built"]
        assert built == late, f"{built} summaries were built by decodes, expected {late}"
    return max(errors)
