"""Holds the Triton kernels to the reference: random paged caches, decode steps, every intermediate compared.

Used by the tests, under Triton's interpreter and on GPUs, and by ``rc-topk bench`` before it prints a speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.attention_triton import COUNTERS, SummaryPlanner, TritonAttention, Workspace, make_shape
from vllm_rc_backend.completion import make_completion
from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import PagedKV, SummaryTags
from vllm_rc_backend.selection import make_policy
from vllm_rc_backend.side_store import SideStore, StoreLayout


@dataclass(frozen=True)
class Case:
    """A batch of sequences and a layer.

    Attributes:
        seq_lens: tokens of each sequence after the first decode step; 0 makes a padding row.
        head_first: whether a block holds head after head (HND), or token after token (NHD).
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
    statistics_bits: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
    head_first: bool = True
    slots: int | None = None
    max_model_len: int = 512
    max_rows: int | None = None

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
        completion = make_completion(self.completion)
        slots = (
            (len(self.seq_lens) + 1 if self.slots is None else self.slots) if completion.state_rows(1) else 0
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
        blocks = 1 + rows * blocks_a_row
        kv_dtype = case.kv_dtype or case.dtype

        middle = (case.heads, size) if case.head_first else (size, case.heads)
        storage = torch.full((blocks, *middle, 2 * d), torch.nan, dtype=torch.float32).to(kv_dtype)
        self.kv_cache = storage.to(self.device)
        if not case.head_first:
            self.kv_cache = self.kv_cache.transpose(1, 2)
        table = torch.randperm(blocks - 1)[: rows * blocks_a_row].view(rows, blocks_a_row) + 1
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
        self.workspace = Workspace(self.shape, max_rows, max(case.max_model_len, length), self.device)
        scale = d**-0.5
        self.attention = TritonAttention(self.store, self.workspace, scale, case.key_scale, case.value_scale)
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

    def prefill(self) -> None:
        """All tokens before the first decode step; compares the page statistics."""
        seq_lens = [max(n - 1, 0) for n in self.case.seq_lens]
        self.write(seq_lens, seq_lens)
        starts = self.tensor([0, *torch.tensor(seq_lens).cumsum(0).tolist()])
        self.attention.update_prefill(
            self.kv_cache, self.block_table, self.tensor(seq_lens), starts, max(seq_lens)
        )
        self._finish(seq_lens, seq_lens)
        self._compare_statistics()

    def decode(self, seq_lens: list[int]) -> float:
        """One decode step; compares everything. Returns the relative error of the output."""
        query = self.new_query(len(seq_lens))
        self.write(seq_lens, [min(n, 1) for n in seq_lens])
        out = torch.full_like(query, torch.nan)
        plan = None
        if self.planner is not None:
            starts = self.tensor([0, *torch.tensor([min(n, 1) for n in seq_lens]).cumsum(0).tolist()])
            plan = self.planner.plan(self.block_table, self.tensor(seq_lens), starts)
        self.attention.decode(query, self.kv_cache, self.block_table, self.tensor(seq_lens), plan, out)
        return self.compare(query, seq_lens, out)

    def new_query(self, rows: int) -> Tensor:
        """A random query, loud enough that softmax is not flat."""
        size = (rows, self.case.heads * self.case.group, self.case.head_size)
        return (torch.randn(size) * 1.5).to(self.case.dtype).to(self.device)

    def compare(self, query: Tensor, seq_lens: list[int], out: Tensor) -> float:
        """Hold one step's results, side store and selection to the reference.

        Raises:
            AssertionError: what differs and by how much.
        """
        case, geometry = self.case, self.case.geometry
        self._finish(seq_lens, [min(n, 1) for n in seq_lens])
        self._compare_statistics()
        expected = torch.zeros(query.shape, device=self.device)
        for row, seq_len in enumerate(seq_lens):
            if not seq_len:
                continue
            q = query[row].float().unflatten(0, (case.heads, -1)) * self.scale
            self.expected_counts["tokens_held"] += seq_len
            self.expected_counts["tokens_read"] += geometry.tokens_read(seq_len)
            if not geometry.is_sparse(seq_len):
                keys, values = self.kv.read_range(self.block_table[row], 0, seq_len)
                expected[row] = reference.decode_dense(q, keys, values).flatten(0, 1)
                self.expected_counts["dense_rows"] += 1
                continue
            self.expected_counts["sparse_rows"] += 1
            pages = self._compare_selection(q, row, seq_len)
            state = self._compare_state(row, seq_len)
            output, _ = reference.decode_sparse(
                q,
                self.kv,
                self.block_table[row],
                seq_len,
                geometry,
                pages,
                self.store.layout.completion,
                state,
            )
            expected[row] = output.flatten(0, 1)
        assert not out.isnan().any(), "output holds NaN or was not written"
        error = float((out.float() - expected).norm() / expected.norm().clamp(min=1e-6))
        assert error < 1e-2, f"output differs from the reference by {error:.2e}"
        return error

    def compare_counters(self) -> None:
        """Hold the device counters to what the steps so far must have added."""
        counted = dict(zip(COUNTERS, self.workspace.counters.tolist(), strict=True))
        assert 0 <= counted.pop("residual_share_millionths") <= 1_000_000 * counted["sparse_rows"]
        expected = {name: value for name, value in self.expected_counts.items() if name in counted}
        assert counted == expected, f"counters {counted}, expected {expected}"

    def _finish(self, seq_lens: list[int], query_lens: list[int]) -> None:
        twin, policy = self.twin, self.twin.layout.policy
        reference.finish_pages(
            self.kv, self.block_table, seq_lens, query_lens, policy, twin.codes, twin.scales
        )

    def _compare_statistics(self) -> None:
        stores = (self.store, self.twin)
        ours, theirs = (reference.decode_statistics(s.codes, s.scales) for s in stores)
        # Sums in another order may round to the neighbouring code.
        step = theirs.abs().amax(dim=-1, keepdim=True).clamp(min=1e-3) / 100
        assert bool(((ours - theirs).abs() <= step).all()), "page statistics differ"

    def _compare_selection(self, q: Tensor, row: int, seq_len: int) -> Tensor:
        """Logical pages ``[heads, count]`` that the kernel chose, each as good as the reference's choice."""
        geometry, layout = self.case.geometry, self.store.layout
        count = geometry.retrieved_pages(seq_len)
        mid = torch.arange(geometry.sink_pages, geometry.mid_end(seq_len), device=self.device)
        ids = self.kv.page_ids(self.block_table[row], mid)
        scales = None if self.store.scales is None else self.store.scales[ids]
        statistics = reference.decode_statistics(self.store.codes[ids], scales).transpose(0, 1)
        scores = reference.score_pages(q, statistics, layout.policy, self.case.group_rule)
        best = reference.select_pages(scores, count)

        chosen = self.workspace.selected[row, :, :count].long()
        where = (chosen.unsqueeze(-1) == ids).int()
        assert bool((where.sum(-1) == 1).all()), f"row {row}: selected pages outside the mid region"
        places = where.argmax(-1)
        assert bool((places.diff(dim=-1) > 0).all()), f"row {row}: selected pages repeat or are out of order"
        worst = scores.gather(1, places).amin(-1)
        needed = scores.gather(1, best).amin(-1)
        slack = 2e-3 * scores.abs().amax(-1)
        assert bool((worst >= needed - slack).all()), f"row {row}: pages {worst} where {needed} was to be had"
        self.expected_counts["pages_scored"] += len(mid)
        return places + geometry.sink_pages

    def _compare_state(self, row: int, seq_len: int) -> Tensor | None:
        """The state that the kernel used, if it is the sum over the mid region."""
        geometry, completion = self.case.geometry, self.store.layout.completion
        if self.planner is None:
            return None
        slot = int(self.planner.current.slot[row])
        if slot < 0:
            self.expected_counts["rows_without_summary"] += 1
            return None
        first, last = (x * geometry.page_size for x in (geometry.sink_pages, geometry.mid_end(seq_len)))
        exact = completion.contribution(*self.kv.read_range(self.block_table[row], first, last))
        planes = self.store.states[slot]
        error = (planes.float().sum(dim=1) - exact).norm() / exact.norm()
        assert error < 2e-4, f"row {row}: summary differs by {error:.2e}"
        return reference.read_state(planes, completion.precise_rows)


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
    return max(errors)
