"""Sparse decoding by the Triton kernels, for full CUDA graphs: fixed grids and buffers, no host reads.

Per step and KV-cache group: see ``summaries_triton``. Per step and layer: ``TritonAttention.update_prefill`` for rows
with more than one new token, and after it ``TritonAttention.decode`` for all others, sparse or not.
"""

from __future__ import annotations

import dataclasses
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_rc_backend.completion.features import Features
from vllm_rc_backend.host_kv.page_cache import LayerPages
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference.select import check_group_rule
from vllm_rc_backend.kernels.reference.summary import SummaryPlan
from vllm_rc_backend.kernels.triton.absorb import absorb_kernel
from vllm_rc_backend.kernels.triton.decode import decode_kernel
from vllm_rc_backend.kernels.triton.features import features_kernel
from vllm_rc_backend.kernels.triton.matmul import INTERPRETED
from vllm_rc_backend.kernels.triton.merge import PARTIAL_STATS
from vllm_rc_backend.kernels.triton.overlap import ARRIVAL
from vllm_rc_backend.kernels.triton.page_cache import choose_kernel
from vllm_rc_backend.kernels.triton.shape import Shape, next_power_of_2
from vllm_rc_backend.kernels.triton.statistics import finish_pages_kernel
from vllm_rc_backend.side_store import SideStore, StoreLayout

COUNTERS = (
    "sparse_rows",
    "dense_rows",
    "rows_without_summary",
    "tokens_held",
    "tokens_read",
    "pages_scored",
    "residual_share_millionths",
    "summaries_built",
)
"""What the kernels add to ``Workspace.counters``, once per decode row and layer: rows by kind (of the sparse ones, how
many had no summary), tokens in their contexts, tokens whose K and V one KV head read exactly, pages whose statistics it
read, the residual's share of the softmax mass (of KV head 0, in millionths), and summaries that a decode summed up from
all pages of a mid region because none was there to go on from."""

GROUP_RULES = ("max", "mean", "sum", "share")
COMPLETIONS = ("linear", "paged", "features", "none")


def most_features(head_size: int) -> int:
    """Of a KV head, whose map a program keeps in shared memory (a test compiles it to see)."""
    return min(256, 2**15 // next_power_of_2(head_size))


POLICY_QUERY_MAPS = {"box": "abs", "mean_var": "square", "moba": "none", "runs": "runs"}


def make_shape(layout: StoreLayout, group: int, group_rule: str) -> Shape:
    """What the kernels are compiled for.

    Raises:
        ValueError: a policy, group rule, completion or number of features that these kernels do not have.
    """
    policy = layout.policy
    if policy.name not in POLICY_QUERY_MAPS:
        raise ValueError(
            f"selection={policy.name} has no GPU kernel; allowed: {', '.join(POLICY_QUERY_MAPS)}"
        )
    if group_rule not in GROUP_RULES:
        raise ValueError(f"group_rule={group_rule} has no GPU kernel; allowed: {', '.join(GROUP_RULES)}")
    check_group_rule(group_rule, policy)
    if policy.name == "runs" and layout.statistics_bits != 2:
        raise ValueError(
            f"statistics_bits={layout.statistics_bits} has no GPU kernel with selection=runs; allowed: 2"
        )
    if layout.completion.name not in COMPLETIONS:
        raise ValueError(
            f"completion={layout.completion.name} has no GPU kernel; allowed: {', '.join(COMPLETIONS)}"
        )
    features = layout.completion.features if isinstance(layout.completion, Features) else 0
    if features > (most := most_features(layout.head_size)):
        raise ValueError(
            f"features_file has {features} features of a KV head, which no GPU kernel takes with head size "
            f"{layout.head_size}; allowed: up to {most}. Make it with: rc-topk calibrate --features {most}"
        )
    geometry = layout.geometry
    if geometry.budget >= 1:
        geometry = dataclasses.replace(geometry, budget=int(geometry.budget))
    return Shape(
        geometry=geometry,
        heads=layout.heads,
        group=group,
        head_size=layout.head_size,
        query_map=POLICY_QUERY_MAPS[policy.name],
        spread_weight=float(getattr(policy, "weight", 0.0)),
        group_rule=group_rule,
        completion=layout.completion.name,
        vectors=layout.vectors,
        features=features,
        damping=layout.completion.damping,
    )


def most_retrieved_pages(geometry: Geometry, max_model_len: int) -> int:
    """The largest ``Geometry.retrieved_pages`` of a sparse row up to this length."""
    pages = max_model_len // geometry.page_size
    budget = int(geometry.budget) if geometry.budget >= 1 else int(geometry.budget * max_model_len)
    shortest_anchors = geometry.sink_tokens + geometry.tail_tokens
    return max(1, min((budget - shortest_anchors) // geometry.page_size, pages))


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured on an H200 (docs/performance.md)."""

    score_elements: int = 16384  # bytes of statistics, padding included, at a time
    score_warps: int = 4
    score_stages: int = 3  # one more than the tiles in shared memory
    score_programs: int = 4  # per multiprocessor
    decode_elements: int = 16384  # of K, and as many of V, at a time
    joint_score_elements: int = 16384  # the same two in one launch, where registers are fewer
    joint_elements: int = 8192
    joint_few_elements: int = 16384  # of rows with ``most_splits`` programs, whose tokens are two tiles then
    decode_warps: int = 4
    decode_stages: int = 2  # one more than the tiles in shared memory
    decode_programs: int = 3  # per multiprocessor
    most_splits: int = 16
    joint_programs: tuple[int, ...] = (3, 4)  # per multiprocessor, more only where fewer do not do
    joint_least: int = 2  # of those, for each (row, head)
    joint_filled: float = 0.7  # of the room, which one program for each must fill where there is none for two
    joint_warps: int = 4
    features_elements: int = 8192  # features of tokens at a time
    select_keys: int = 4096  # that a program looks at at a time
    select_few: int = 1024  # of these all pages' keys at once, in one level
    select_most: int = 2048  # the same of rows with ``most_splits`` programs
    merge_elements: int = 8192  # of partial results at a time
    merge_columns: int = 256  # of a head, that a program merges at a time
    joint_columns: int = 16
    update_columns: int = 32
    update_programs: int = 3  # per multiprocessor
    finish_elements: int = 4096  # of a page, that one warp holds
    absorb_programs: int = 2  # per multiprocessor
    absorb_elements: int = 8192  # of a summary, that a program sums up
    absorb_tokens: int = 512  # that it sums up at least
    overlap: bool = True  # programmatic dependent launch, where the GPU has it


MPS_VARIABLES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
MPS_FOLDER = "/tmp/nvidia-mps"
"""Where the service listens unless a variable says otherwise."""

JOINT_SHARED_BYTES = 228 * 1024
"""Shared memory that a multiprocessor's programs of both phases take at most with the policy runs (a test compiles them
to see)."""


def shares_gpu() -> bool:
    """Whether CUDA's multi-process service may run other processes' kernels beside ours, or ours on a part of it."""
    return any(name in os.environ for name in MPS_VARIABLES) or Path(MPS_FOLDER).exists()


def launch_rows(rows: int, captured: Sequence[int] = ()) -> int:
    """Rows that a launch's parameters are chosen for: those of the next larger batch that vLLM captures, here
    (``captured``, in order) or by default.

    What is compiled for those batches serves all others, too: one that has decodes beside prompts is launched as it is,
    and compiling a kernel for it would keep its requests waiting for seconds.
    """
    usual = rows if rows <= 2 else 4 if rows <= 4 else -(-rows // 8) * 8
    at = bisect_left(captured, rows)
    return min([usual, *captured[at : at + 1]])


class Workspace:
    """Buffers that hold nothing between layers: allocate once and share among all layers of the same shape.

    Attributes:
        counters: int64 ``[len(COUNTERS)]`` that the kernels add to.
    """

    def __init__(
        self,
        shape: Shape,
        max_rows: int,
        max_model_len: int,
        device: torch.device | str,
        statistics_bits: int,
        tuning: Tuning | None = None,
        captured: Sequence[int] = (),
    ) -> None:
        self.shape = shape
        self.captured = sorted(captured)
        self.tuning = tuning = tuning or Tuning()
        self.max_rows = max_rows
        geometry, heads = shape.geometry, shape.heads
        cuda = torch.device(device).type == "cuda"
        properties = torch.cuda.get_device_properties(device) if cuda else None
        self.processors = properties.multi_processor_count if properties else 132
        shared = properties.shared_memory_per_multiprocessor if properties else JOINT_SHARED_BYTES
        # Programs that wait for each other must all be running, so nobody else may keep a part of the GPU; and Triton's
        # interpreter runs one after the other.
        self.may_wait = (
            shape.query_map == "runs"
            and not shape.features
            and shared >= JOINT_SHARED_BYTES
            and not shares_gpu()
            and not INTERPRETED.value
        )
        self.overlap = tuning.overlap and cuda and torch.cuda.get_device_capability(device) >= (9, 0)
        if shape.query_map == "runs":
            self.page_bytes = shape.vectors * shape.block_q
        else:
            self.page_bytes = shape.block_d * statistics_bits // 8
        self.max_pages = max(max_model_len // geometry.page_size, 1)
        self.max_selected = most_retrieved_pages(geometry, max_model_len)
        # Neighbours per maximum, so that the two levels of the selection have about equally much to look at; they are
        # scored together.
        self.neighbours = 1
        if self.max_pages > tuning.select_few:
            most = min(self.score_tile(joint) for joint in (False, True))
            while self.neighbours < most and self.neighbours**2 * self.max_selected * 2 < self.max_pages:
                self.neighbours *= 2
        self.max_groups = -(-self.max_pages // self.neighbours)

        def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        kept = shape.keeps_scores
        self.head_scores = empty(
            max_rows, heads, self.max_pages if kept else 0, shape.group, dtype=torch.float16
        )
        self.keys = self.head_scores if shape.by_share else empty(max_rows, heads, self.max_pages)
        groups = max_rows, heads, self.max_groups if self.neighbours > 1 else 0, shape.key_width
        self.maxima = empty(*groups, dtype=self.keys.dtype)
        self.chosen = empty(max_rows, heads, self.max_selected)
        every = range(1, max_rows + 1)
        most_scorers = max(rows * self.scorers(rows) for rows in every) * heads
        self.masses = empty(most_scorers if kept else 0, 2, shape.block_n, dtype=torch.float32)
        most_splits = max(rows * self.attenders(rows) for rows in every) * heads
        self.groups = empty(most_splits if self.neighbours > 1 else 0, self.max_selected)
        most_partials = most_splits + max_rows * heads
        self.partial_out = empty(most_partials, shape.merge_rows, shape.block_d, dtype=torch.float32)
        self.counts = empty(most_splits, shape.features, dtype=torch.float32)
        self.partial_stats = empty(most_partials, PARTIAL_STATS.value, shape.merge_rows, dtype=torch.float32)
        sharing = [rows for rows in every if shape.completion != "none" and self.absorbers(rows) > 1]
        most_sums = max((rows * self.absorbers(rows) for rows in sharing), default=0)
        vector = shape.block_f if shape.features else 2 * self.absorb_columns
        self.sums = empty(
            most_sums * heads * self.absorb_tiles,
            shape.sum_rows * self.absorb_columns + vector,
            dtype=torch.float32,
        )
        self.arrivals = torch.zeros(3, max_rows, heads, ARRIVAL.value, dtype=torch.int32, device=device)
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = {x.data_ptr(): x.nbytes for x in vars(self).values() if isinstance(x, Tensor)}
        return sum(tensors.values())

    def constants(self, rows: int, joint: bool) -> dict[str, int]:
        """What ``decode_kernel`` is compiled with, as far as it depends on the batch."""
        splits, columns = self.merge_tile(rows)
        return self.selection(rows) | {
            "SCORE_TILE": self.score_tile(joint),
            "MASSES": next_power_of_2(self.scorers(rows)),
            "TILE": self.decode_tile(rows, joint),
            "PAGES": self.most_pages(rows),
            "MERGE": splits,
            "MERGE_ALL": splits >= self.attenders(rows),
            "COLS": columns,
        }

    def selection(self, rows: int) -> dict[str, int]:
        """Neighbouring pages that the first level of the selection takes as one, 1 if there is one level; keys that are
        looked at at a time, and whether that is all of a level."""
        tuning, group, keys = self.tuning, self.neighbours, self.max_pages
        # Two levels have fewer keys, one has fewer steps: better while each program has a multiprocessor for itself.
        if self.max_pages <= tuning.select_most and self.few(rows):
            group = 1
        if group > 1:
            keys = max(self.max_groups, self.max_selected * group)
        keys = max(next_power_of_2(keys), 16)
        return {
            "GROUP": group,
            "BLOCK": min(keys, tuning.select_keys),
            "SINGLE": keys <= tuning.select_keys,
        }

    def compiled_for(self) -> list[int]:
        """Numbers of rows, up to the most there are, for which the kernels of a decode step are not the same ones."""

        def kernels(rows: int) -> tuple[int, ...]:
            joint = self.joint(rows)
            splits = next_power_of_2(self.attenders(rows))  # of ``features_kernel``
            return joint, splits, *self.constants(rows, joint > 0).values()

        first = {kernels(rows): rows for rows in range(self.max_rows, 0, -1)}
        return sorted(first.values())

    def _lanes(self, rows: int) -> int:
        """(Row, head)s that a launch's parameters are chosen for."""
        return launch_rows(rows, self.captured) * self.shape.heads

    def most_registers(self, rows: int, joint: bool) -> int:
        """Registers of a thread with which the programs that score fit into a multiprocessor as often as they should:
        65536, given out by eights."""
        tuning = self.tuning
        programs = self.joint(rows) if joint else tuning.score_programs
        warps = tuning.joint_warps if joint else tuning.score_warps
        return min(65536 // (programs * 32 * warps) // 8 * 8, 255)

    def joint(self, rows: int) -> int:
        """Programs on a multiprocessor with which both phases of a decode are one launch, for which all must find room
        at the same time; 0 where the phases are two launches."""
        if not self.may_wait:
            return 0
        lanes, tuning, shape = self._lanes(rows), self.tuning, self.shape
        # With fewer registers wide heads and large groups would spill hundreds of bytes.
        wide = shape.block_d > 128 or shape.block_n > 8
        choices = tuning.joint_programs[:1] if wide else tuning.joint_programs
        for programs in choices:
            if tuning.joint_least * lanes <= self.processors * programs:
                return programs
        room = self.processors * choices[-1]
        # One program for each does where that leaves few multiprocessors without work.
        return choices[-1] if tuning.joint_filled * room <= lanes <= room else 0

    def score_tile(self, joint: bool) -> int:
        """Pages that a program scores at a time."""
        elements = self.tuning.joint_score_elements if joint else self.tuning.score_elements
        return max(32, min(elements // self.page_bytes, 128))

    def decode_tile(self, rows: int, joint: bool) -> int:
        """Tokens that a program attends to at a time."""
        tuning, elements = self.tuning, self.tuning.decode_elements
        if joint:
            # Wide heads' queries, which are kept all the time, leave room for the smaller tile only.
            few = self.few(rows) and self.shape.block_d <= 128
            elements = tuning.joint_few_elements if few else tuning.joint_elements
            if self.shape.block_n > 8:
                # The partial results of more heads need the room: all programs must fit at the same time.
                elements //= 2
        return max(16, min(elements // self.shape.block_d, 128))

    def most_pages(self, rows: int) -> int:
        """Pages of which a program asks for the scores before it attends to them, if it can all of them."""
        return max(16, min(next_power_of_2(-(-self.max_selected // self.attenders(rows)) + 1), 64))

    @property
    def features_tile(self) -> int:
        """Tokens whose features a program computes at a time."""
        return max(16, min(self.tuning.features_elements // self.shape.block_f, 64))

    def scorers(self, rows: int) -> int:
        """Programs that score the pages of one (row, head)."""
        lanes, joint = self._lanes(rows), self.joint(rows)
        most = -(-self.max_pages // self.score_tile(joint > 0))
        # As many as find room at the same time: a second wave would leave most of the GPU idle at its end.
        room = self.processors * (joint or self.tuning.score_programs)
        return max(1, min(room // lanes, most))

    def attenders(self, rows: int) -> int:
        """Programs that attend to the tokens of one (row, head)."""
        lanes, tuning, joint = self._lanes(rows), self.tuning, self.joint(rows)
        if joint:
            return min(self.processors * joint // lanes, tuning.most_splits)
        return max(1, min(-(-self.processors * tuning.decode_programs // lanes), tuning.most_splits))

    def few(self, rows: int) -> bool:
        """Whether each (row, head) has the most programs there can be: they then have multiprocessors to themselves."""
        return self.attenders(rows) == self.tuning.most_splits

    @property
    def absorb_columns(self) -> int:
        """Columns of a summary that a program sums up in a prefill."""
        return min(self.shape.block_d, self.tuning.absorb_elements // self.shape.sum_rows)

    @property
    def absorb_tiles(self) -> int:
        """Programs that share out the columns of a summary in a prefill."""
        return -(-self.shape.head_size // self.absorb_columns)

    @property
    def finish_warps(self) -> int:
        """Warps of a program that makes one page's statistics: one, unless they are rotated or registers are short."""
        elements = self.shape.geometry.page_size * self.shape.block_d
        return 4 if self.shape.query_map == "runs" or elements > self.tuning.finish_elements else 1

    def absorbers(self, rows: int) -> int:
        """Programs among which the pages of a (row, head, column tile) are shared out in a prefill."""
        lanes = rows * self.shape.heads * self.absorb_tiles
        return max(1, self.processors * self.tuning.absorb_programs // lanes)

    @property
    def absorb_tile(self) -> int:
        """Tokens whose K and V a program adds to a summary at a time in a prefill."""
        return max(16, self.features_tile // 2) if self.shape.features else self.update_tile

    def update_columns(self, over_bus: bool) -> int:
        """Columns of a summary that a program adds decodes' pages to; ``over_bus`` if those are in host memory."""
        if over_bus and not self.shape.features:
            # Each program of a summary reads all its keys. Over the bus that costs more than having few programs does;
            # with more columns than this, a multiprocessor has registers for one program only.
            return min(64, 8192 // self.shape.block_d)
        return self.tuning.update_columns

    @property
    def update_tile(self) -> int:
        """Tokens that such a program sums up at a time."""
        return self.features_tile if self.shape.features else 32 if self.shape.block_d > 128 else 64

    def merge_tile(self, rows: int) -> tuple[int, int]:
        """Partial results, and columns of them, that a program merges at a time."""
        shape, tuning, attenders = self.shape, self.tuning, self.attenders(rows)
        columns = tuning.merge_columns
        if self.joint(rows):
            # Not more parts than there are programs: one that has two of them keeps all others waiting.
            columns = max(tuning.joint_columns, shape.block_d // (next_power_of_2(attenders + 1) // 2))
        columns = min(columns, shape.block_d)
        room = max(1, tuning.merge_elements // (shape.merge_rows * columns))
        return min(next_power_of_2(attenders), room), columns


@dataclass(frozen=True)
class CachePlace:
    """Where a layer's KV cache lies: its address, the strides of block, head and token, and its elements' type."""

    address: int
    strides: tuple[int, ...]
    dtype: torch.dtype


class TritonAttention:
    """Sparse attention of one layer.

    Attributes:
        cache: where the layer's KV cache lies; None before ``bind``.
        key_scale, value_scale: factors of a quantised cache.
    """

    def __init__(
        self, store: SideStore, workspace: Workspace, scale: float, pages: LayerPages | None = None
    ) -> None:
        """
        Args:
            store: this layer's page statistics and summaries.
            workspace: shared by all layers.
            pages: this layer's page cache, with the KV pages in host memory.
            scale: the softmax scale.
        """
        self.store = store
        self.workspace = workspace
        self.shape = workspace.shape
        self.scale = scale
        self.cache: CachePlace | None = None
        self.key_scale = self.value_scale = 1.0
        self.pages = pages
        completion = store.completion
        self.maps: tuple[Tensor | None, ...] = (None,) * 4
        if isinstance(completion, Features):
            maps = completion.key_weight, completion.key_bias, completion.query_weight, completion.query_bias
            self.maps = tuple(x.contiguous() for x in maps)

    def bind(self, kv_cache: Tensor, key_scale: float, value_scale: float) -> None:
        """Say where the layer's KV cache is, see ``update_prefill``, and what its numbers are multiplied with."""
        kv = self._cache(kv_cache)
        self.cache = CachePlace(kv.data_ptr(), kv.stride()[:3], kv.dtype)
        self.key_scale, self.value_scale = key_scale, value_scale

    def update_prefill(
        self,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        max_query_len: int,
        plan: SummaryPlan | None,
    ) -> None:
        """Statistics of all pages that this step finished, and the summaries' part of the plan.

        Args:
            kv_cache: ``[blocks, heads, block_size, 2 * head_size]``, any strides, this step's tokens written.
            block_table: int32 ``[rows, max_blocks]``.
            seq_lens: int32 ``[rows]``.
            query_start: int32 ``[rows + 1]``.
            max_query_len: an upper bound of the new tokens of a row.
            plan: of these rows, from ``SummaryPlanner.plan``; None without a completion.
        """
        kv = self._cache(kv_cache)
        pages = -(-max_query_len // self.shape.geometry.page_size)
        finish_pages_kernel[(pages, self.shape.heads, len(seq_lens))](
            kv,
            block_table,
            seq_lens,
            query_start,
            self.store.codes,
            self.store.scales,
            self.key_scale,
            *kv.stride()[:3],
            block_table.stride(0),
            S=self.shape,
            num_warps=self.workspace.finish_warps,
        )
        if plan is not None:
            self.absorb(kv, block_table, plan)

    def absorb(self, kv: Tensor, block_table: Tensor, plan: SummaryPlan) -> None:
        """Add each row's pages to its summary: many pages of few rows, unlike ``SummaryUpdater.update``."""
        shape, work, rows = self.shape, self.workspace, len(block_table)
        absorb_kernel[(work.absorb_tiles * work.absorbers(rows), shape.heads, rows)](
            kv,
            block_table,
            self.store.states,
            plan.slot,
            plan.source,
            plan.first,
            plan.last,
            work.sums,
            work.arrivals[0],
            *self.maps[:2],
            self.key_scale,
            self.value_scale,
            *kv.stride()[:3],
            block_table.stride(0),
            S=shape,
            COLS=work.absorb_columns,
            TILE=work.absorb_tile,
            LEAST=max(1, work.tuning.absorb_tokens // shape.geometry.page_size),
            num_warps=4,
        )

    def decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        plan: SummaryPlan | None,
        out: Tensor,
    ) -> None:
        """One decode step of rows with one new token each: side store, selection, attention.

        Args:
            query: ``[rows, heads * group, head_size]``, unscaled.
            kv_cache: see ``update_prefill``.
            block_table: int32 ``[rows, max_blocks]``.
            seq_lens: int32 ``[rows]``, this step's token included; 0 in padding rows.
            plan: of these rows and maybe more, from ``SummaryPlanner.plan``; None without a completion.
            out: ``[rows, heads * group, head_size]``; zeros are written to padding rows.
        """
        kv = self._cache(kv_cache)
        if self.pages is not None:
            self.launch(query, kv, block_table, seq_lens, plan, out, attends=False)
            self.choose(seq_lens)
            self.pages.fetch(self.workspace.chosen, kv, block_table, seq_lens)
            self.complete(query, kv, block_table, seq_lens, plan)
            self.launch(query, kv, block_table, seq_lens, plan, out, scores=False)
        elif self.workspace.joint(len(seq_lens)):
            self.launch(query, kv, block_table, seq_lens, plan, out)
        else:
            self.launch(query, kv, block_table, seq_lens, plan, out, attends=False)
            self.complete(query, kv, block_table, seq_lens, plan)
            self.launch(query, kv, block_table, seq_lens, plan, out, scores=False)

    def warm_up(self, kv_cache: Tensor, dtype: torch.dtype, plan: SummaryPlan | None) -> None:
        """Compile all kernels that a decode step may take: launch each on rows of padding, which read nothing.

        Args:
            kv_cache: see ``update_prefill``; of any number of blocks.
            dtype: of queries.
            plan: of no row, see ``decode``.
        """
        device = kv_cache.device
        for rows in self.workspace.compiled_for():
            table = torch.zeros(rows, 16, dtype=torch.int32, device=device)
            lengths = table.new_zeros(rows)
            size = rows, self.shape.heads * self.shape.group, self.shape.head_size
            query = torch.zeros(size, dtype=dtype, device=device)
            self.decode(query, kv_cache, table, lengths, plan, torch.empty_like(query))

    def choose(self, seq_lens: Tensor) -> None:
        """The pages of all rows, as a launch of its own: what is read must be known before it is fetched."""
        work, scorers = self.workspace, self.workspace.scorers(len(seq_lens))
        choose_kernel[(self.shape.heads, len(seq_lens))](
            work.keys,
            work.maxima,
            work.masses,
            work.groups,
            work.chosen,
            seq_lens,
            work.max_pages,
            work.max_groups,
            work.max_selected,
            scorers,
            S=self.shape,
            MASSES=next_power_of_2(scorers),
            **work.selection(len(seq_lens)),
            num_warps=4,
        )

    def complete(
        self, query: Tensor, kv: Tensor, block_table: Tensor, seq_lens: Tensor, plan: SummaryPlan | None
    ) -> None:
        """For ``features`` only: the pages of all rows, and what they leave of the summary."""
        if not self.shape.features:
            return
        assert plan is not None
        work, pages, rows = self.workspace, self.pages, len(seq_lens)
        scorers, attenders = work.scorers(rows), work.attenders(rows)
        features_kernel[(self.shape.heads, attenders, rows)](
            query,
            kv,
            None if pages is None else pages.content,
            None if pages is None else pages.group.reading,
            *self.maps,
            self.store.states,
            block_table,
            seq_lens,
            plan.slot,
            work.keys,
            work.maxima,
            work.masses,
            work.groups,
            work.chosen,
            work.partial_out,
            work.partial_stats,
            work.counts,
            work.arrivals[0],
            self.scale,
            self.key_scale,
            self.value_scale,
            query.stride(0),
            query.stride(1),
            *kv.stride()[:3],
            block_table.stride(0),
            work.max_pages,
            work.max_groups,
            work.max_selected,
            0 if pages is None else pages.group.max_read,
            scorers,
            attenders,
            S=self.shape,
            MASSES=next_power_of_2(scorers),
            **work.selection(rows),
            TILE=work.features_tile,
            SPLITS=next_power_of_2(attenders),
            OVERLAP=work.overlap,
            num_warps=4,
            launch_pdl=work.overlap,
        )

    def launch(
        self,
        query: Tensor,
        kv: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        plan: SummaryPlan | None,
        out: Tensor,
        scores: bool = True,
        attends: bool = True,
    ) -> None:
        """Page scores, then attention over the best pages and anchors or over all tokens; or one of the two."""
        work, tuning, rows, pages = self.workspace, self.workspace.tuning, len(seq_lens), self.pages
        scorers, attenders = work.scorers(rows), work.attenders(rows)
        joint = scores and attends
        splits = max(scorers, attenders) if joint else scorers if scores else attenders + 1
        decode_kernel[(self.shape.heads, splits, rows)](
            query,
            kv,
            None if pages is None else pages.content,
            None if pages is None else pages.group.reading,
            self.store.codes,
            self.store.scales,
            self.store.states,
            block_table,
            seq_lens,
            None if plan is None else plan.slot,
            work.keys,
            work.maxima,
            work.head_scores,
            work.masses,
            work.groups,
            work.chosen,
            work.partial_out,
            work.partial_stats,
            *work.arrivals,
            out,
            work.counters,
            self.scale,
            self.key_scale,
            self.value_scale,
            query.stride(0),
            query.stride(1),
            *kv.stride()[:3],
            block_table.stride(0),
            out.stride(0),
            out.stride(1),
            work.max_pages,
            work.max_groups,
            work.max_selected,
            0 if pages is None else pages.group.max_read,
            scorers,
            attenders,
            SCORES=scores,
            ATTENDS=attends,
            S=self.shape,
            SCORE_STAGES=tuning.score_stages,
            **work.constants(rows, joint),
            OVERLAP=work.overlap and not joint,
            num_warps=tuning.joint_warps if joint else tuning.score_warps if scores else tuning.decode_warps,
            num_stages=tuning.decode_stages,
            maxnreg=work.most_registers(rows, joint) if scores else None,
            launch_pdl=work.overlap and attends and not joint,
        )

    def _cache(self, kv_cache: Tensor) -> Tensor:
        if kv_cache.dtype == torch.uint8:  # how vLLM holds fp8
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        # The kernels count on it: neighbouring elements are read sixteen at a time.
        assert kv_cache.stride(-1) == 1
        assert not any(stride % 16 for stride in kv_cache.stride()[:-1])
        return kv_cache
