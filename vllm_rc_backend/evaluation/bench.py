"""``rc-topk bench``: one layer's decode step against vLLM's FlashAttention-3 and against the bytes that must be read.

Checks the kernels against the reference on the same shapes first and prints no speed if that fails. Times are of CUDA
graph replays of several layers in a row, each with its own sequences, so that nothing is found in the L2 cache that a
model's other layers would have pushed out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vllm_rc_backend.attention_triton import (
    COMPLETIONS,
    GROUP_RULES,
    POLICY_QUERY_MAPS,
    TritonAttention,
    Tuning,
    Workspace,
    make_shape,
)
from vllm_rc_backend.completion import LEARNED
from vllm_rc_backend.config import RCTopKConfig, default_completion
from vllm_rc_backend.evaluation.environment import command_line, environment, update_results
from vllm_rc_backend.evaluation.kernel_check import Case, check, check_row
from vllm_rc_backend.kernels.reference import SummaryPlan, SummaryTags, check_group_rule
from vllm_rc_backend.selection import POLICIES, make_policy
from vllm_rc_backend.side_store import SideStore, StoreLayout
from vllm_rc_backend.summaries_triton import SummaryPlanner, SummaryUpdater

K = 1024
TABLE = ((8, 1), (8, 32), (32, 1), (32, 8), (32, 32), (128, 1), (128, 4), (128, 16), (512, 1))
"""(context in Ki tokens, batch) of the decode table."""

LAYER_BYTES = 256 << 20
"""Layers are repeated until they read this much between them: several times any L2 cache."""

MOST_LAYERS = 24
LEAST_LAYERS = 3
"""So many at least where memory allows."""

CHUNK = 8 * K
"""Tokens of a sequence that a step of the prefill adds."""


@dataclass(frozen=True)
class Row:
    """One line of the decode table; times in microseconds for one layer.

    A step averages the usual one and the one in page_size that finishes a page in every row. Apart from these:

    Attributes:
        first_step_us: the first step after a prompt, where that finishes a page in every row.
        checkpoint_us: what summaries add to a prefill, in the last chunk of one sequence, up to ``CHUNK`` tokens; None
            without a completion.
        rebuild_us: a step in which every row has lost its summary and sums it up from all pages.
    """

    context: int
    batch: int
    dense_us: float | None
    dense_spread_us: float | None
    rc_topk_us: float
    rc_topk_spread_us: float
    usual_step_us: float
    page_step_us: float
    first_step_us: float
    checkpoint_us: float | None
    rebuild_us: float
    floor_us: float
    bytes_read: int
    layers: int

    @property
    def ratio(self) -> float | None:
        """How much faster than dense."""
        return None if self.dense_us is None else self.dense_us / self.rc_topk_us


class Layers:
    """Several layers of one group, each with its part of a KV pool, prefilled in chunks to one token before
    ``first_len``. Their plan is made outside of what is timed, as the engine makes it: once for all layers."""

    def __init__(
        self, case: Case, pool: Tensor, context: int, batch: int, count: int, tuning: Tuning
    ) -> None:
        self.case = case
        self.count = count
        self.batch = batch
        layout = replace(case.layout, slots=batch if case.completion != "none" else 0)
        geometry = layout.geometry
        self.device = device = pool.device
        shape = make_shape(layout, case.group, case.group_rule)
        longest = context + geometry.page_size
        width, blocks = -(-longest // geometry.block_size), pool.shape[0] // count
        self.caches = pool[: blocks * count].split(blocks)
        self.block_table = torch.randperm(blocks, device=device)[: batch * width].view(batch, width).int()
        # The first step, one at which no page is finished, and the next at which every row finishes one again.
        self.first_len, self.page_len = context - geometry.page_size, context
        self.usual_len = context - geometry.page_size // 2
        workspace = Workspace(shape, batch, context, device, case.statistics_bits, tuning)
        pages = blocks * geometry.pages_per_block
        self.attentions = []
        for cache in self.caches:
            store = SideStore(layout, pages, device)
            self.attentions.append(TritonAttention(store, workspace, case.head_size**-0.5))
            self.attentions[-1].bind(cache, 1.0, 1.0)
        self.updater = SummaryUpdater(self.attentions)
        self.planner: SummaryPlanner | None = None
        if layout.slots:
            tags = SummaryTags.empty(layout.slots, pages, device)
            self.planner = SummaryPlanner(geometry, tags, batch)
        size = (count, batch, case.heads * case.group, case.head_size)
        self.queries = torch.randn(size, device=device).to(case.dtype)
        self.out = torch.full_like(self.queries, torch.nan)
        self._decode_starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        length = self.first_len - 1
        for start in range(0, length, CHUNK):
            self._prefill(min(start + CHUNK, length), min(CHUNK, length - start))

    def lengths(self, seq_len: int) -> Tensor:
        """int32 ``[batch]``, all the same."""
        return torch.full((self.batch,), seq_len, dtype=torch.int32, device=self.device)

    def _prefill(self, seq_len: int, count: int) -> None:
        """A chunk of ``count`` tokens that ends at ``seq_len``, of every sequence."""
        lengths, starts = self.lengths(seq_len), self._decode_starts * count
        plan = self._plan(lengths, starts)
        for attention, cache in zip(self.attentions, self.caches, strict=True):
            attention.update_prefill(cache, self.block_table, lengths, starts, count, plan)

    def checkpoint(self) -> Callable[[], None]:
        """What summaries add to the last chunk of each layer's first sequence; a call of it spoils its summary."""
        geometry = self.case.geometry
        ends = [geometry.mid_end(n) for n in (max(self.first_len - 1 - CHUNK, 0), self.first_len - 1)]
        rows = torch.tensor([[0], [0], *([n] for n in ends)], dtype=torch.int32, device=self.device)
        plan = SummaryPlan(*rows)

        def absorb() -> None:
            for attention, cache in zip(self.attentions, self.caches, strict=True):
                attention.absorb(cache, self.block_table[:1], plan)

        return absorb

    def forget(self) -> None:
        """Lose all summaries."""
        if self.planner is not None:
            self.planner.tags.slot_page.fill_(-1)

    def plan(self, seq_len: int) -> SummaryPlan | None:
        """The plan of a decode step, which stays valid until the next is made."""
        return self._plan(self.lengths(seq_len), self._decode_starts)

    def _plan(self, lengths: Tensor, starts: Tensor) -> SummaryPlan | None:
        return None if self.planner is None else self.planner.plan(self.block_table, lengths, starts)

    def step(self, lengths: Tensor, plan: SummaryPlan | None) -> None:
        """All layers' decode, and before it what it adds to their summaries."""
        if plan is not None:
            self.updater.update(self.block_table, plan)
        rows = zip(self.attentions, self.queries, self.caches, self.out, strict=True)
        for attention, query, cache, out in rows:
            attention.decode(query, cache, self.block_table, lengths, plan, out)

    def verify(self, seq_len: int, plan: SummaryPlan | None) -> float:
        """Hold the last layer's last row to the reference; relative error of the output."""
        layer, row = self.count - 1, self.batch - 1
        return check_row(
            self.case,
            self.attentions[layer],
            self.caches[layer],
            self.block_table[row],
            row,
            seq_len,
            -1 if plan is None else int(plan.slot[row]),
            self.queries[layer, row],
            self.out[layer, row],
        )


def bytes_read(layout: StoreLayout, seq_len: int, batch: int) -> int:
    """Bytes that one layer must touch in a step in which no page is finished. Maps are read once for all rows."""
    geometry = layout.geometry
    tokens, maps = geometry.tokens_read(seq_len) * layout.token_bytes, 0
    if geometry.is_sparse(seq_len):
        tokens += (geometry.mid_end(seq_len) - geometry.sink_pages) * layout.statistics_bytes
        completion = layout.completion
        rows = completion.state_rows(layout.head_size) + completion.precise_rows
        tokens += layout.heads * rows * layout.head_size * 2
        maps = sum(x.nbytes for x in vars(completion).values())
    return tokens * batch + maps


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes both counted."""
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    seconds = time_calls({"copy": lambda: target.copy_(source)}, repeats=7, minimum=0.005)["copy"]
    return 2 * source.nbytes / statistics.median(seconds)


def time_calls(
    calls: dict[str, Callable[[], object]], repeats: int, minimum: float = 0.002
) -> dict[str, list[float]]:
    """Seconds per call, measured by turns so that a drift of the clock meets all alike."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(call: Callable[[], object], times: int) -> float:
        events[0].record()
        for _ in range(times):
            call()
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / times

    times = {}
    for name, call in calls.items():
        seconds(call, 3)
        times[name] = max(1, int(minimum / seconds(call, 3)))
    result: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            result[name].append(seconds(call, times[name]))
    return result


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Warm up (and compile) on a side stream, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def dense_step(layers: Layers, seq_len: int) -> Callable[[], object] | None:
    """The same layers by vLLM's FlashAttention-3, called as vLLM calls it under full CUDA graphs; None without it."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError:
        return None
    case, lengths = layers.case, layers.lengths(seq_len)
    starts = torch.arange(layers.batch + 1, dtype=torch.int32, device=lengths.device)
    caches = [cache.transpose(1, 2).split(case.head_size, dim=-1) for cache in layers.caches]
    schedule = get_scheduler_metadata(
        batch_size=layers.batch,
        max_seqlen_q=1,
        max_seqlen_k=seq_len,
        num_heads_q=case.heads * case.group,
        num_heads_kv=case.heads,
        headdim=case.head_size,
        cache_seqlens=lengths,
        qkv_dtype=case.dtype,
        cu_seqlens_q=starts,
        page_size=case.geometry.block_size,
        causal=True,
        window_size=(-1, -1),
        num_splits=32,
    )
    out = torch.empty_like(layers.queries)

    def step() -> None:
        for i, (keys, values) in enumerate(caches):
            flash_attn_varlen_func(
                q=layers.queries[i],
                k=keys,
                v=values,
                out=out[i],
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=lengths,
                max_seqlen_k=seq_len,
                softmax_scale=case.head_size**-0.5,
                causal=True,
                block_table=layers.block_table,
                scheduler_metadata=schedule,
                fa_version=3,
                num_splits=32,
            )

    return step


def measure(
    case: Case,
    pool: Tensor,
    context: int,
    batch: int,
    bandwidth: float,
    repeats: int,
    tuning: Tuning | None = None,
    dense: bool = True,
) -> Row:
    """One line of the table.

    Raises:
        AssertionError: the timed graph's output is not the reference's.
    """
    layout = case.layout
    touched = bytes_read(layout, context, batch)
    layers = Layers(case, pool, context, batch, layer_count(case, pool, context, batch), tuning or Tuning())
    usual_lengths, page_lengths = layers.lengths(layers.usual_len), layers.lengths(layers.page_len)

    first_lengths = layers.lengths(layers.first_len)
    plan = layers.plan(layers.first_len)
    layers.step(first_lengths, plan)
    layers.verify(layers.first_len, plan)
    # Each replay adds the same page again; no time depends on it, and the summaries are rebuilt below.
    first = capture(lambda: layers.step(first_lengths, plan))
    calls: dict[str, Callable[[], object]] = {"first": first.replay}
    if layout.slots:
        calls["checkpoint"] = capture(layers.checkpoint()).replay
    seconds = time_calls(calls, repeats)
    layers.forget()
    plan = layers.plan(layers.first_len)
    rebuild = capture(lambda: layers.step(first_lengths, plan))
    seconds |= time_calls({"rebuild": rebuild.replay}, repeats)

    plan = layers.plan(layers.usual_len)
    usual = capture(lambda: layers.step(usual_lengths, plan))
    usual.replay()
    layers.verify(layers.usual_len, plan)
    calls = {"usual": usual.replay}
    if dense and (step := dense_step(layers, layers.usual_len)):
        calls["dense"] = capture(step).replay
    seconds |= time_calls(calls, repeats)

    # In the last of page_size steps each row stores statistics and adds a page to its summary.
    page_plan = layers.plan(layers.page_len)
    page = capture(lambda: layers.step(page_lengths, page_plan))
    seconds |= time_calls({"page": page.replay}, repeats)

    def micro(name: str) -> tuple[float, float]:
        values = sorted(1e6 * s / layers.count for s in seconds[name])
        return statistics.median(values), values[-1] - values[0]

    size = case.page_size
    usual_us, spread = micro("usual")
    page_us, _ = micro("page")
    first_us, _ = micro("first")
    rebuild_us, _ = micro("rebuild")
    dense_us, dense_spread = micro("dense") if "dense" in seconds else (None, None)
    return Row(
        context=context,
        batch=batch,
        dense_us=dense_us,
        dense_spread_us=dense_spread,
        rc_topk_us=((size - 1) * usual_us + page_us) / size,
        rc_topk_spread_us=spread,
        usual_step_us=usual_us,
        page_step_us=page_us,
        first_step_us=first_us,
        checkpoint_us=micro("checkpoint")[0] if "checkpoint" in seconds else None,
        rebuild_us=rebuild_us,
        floor_us=touched / bandwidth * 1e6,
        bytes_read=touched,
        layers=layers.count,
    )


def layer_count(case: Case, pool: Tensor, context: int, batch: int) -> int:
    """Layers that a row of the table is timed with."""
    geometry = case.geometry
    room = pool.shape[0] // (batch * -(-(context + geometry.page_size) // geometry.block_size))
    touched = bytes_read(case.layout, context, batch)
    return max(1, min(MOST_LAYERS, room, max(LEAST_LAYERS, -(-LAYER_BYTES // touched))))


def make_pool(case: Case, shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """A KV cache of random content: ``[blocks, heads, block_size, 2 * head_size]``. It has room for ``LEAST_LAYERS``
    of each (context, batch) or takes 70 % of the memory that is free, side stores included."""
    size = case.geometry.block_size
    tokens = LEAST_LAYERS * max((context + case.page_size) * batch for context, batch in shapes)
    free = torch.cuda.mem_get_info(device)[0] * 0.7
    tokens = min(
        tokens, int(free / (case.layout.token_bytes + case.layout.statistics_bytes / case.page_size))
    )
    middle = (case.heads, size) if case.head_first else (size, case.heads)
    pool = torch.empty((tokens // size + 2, *middle, 2 * case.head_size), dtype=case.dtype, device=device)
    for part in pool.split(1 << 14):
        part.normal_()
    return pool if case.head_first else pool.transpose(1, 2)


def markdown(rows: list[Row]) -> str:
    """The decode table."""
    lines = [
        "| context x batch | FlashAttention-3, us | rc_topk, us | ratio | bytes floor, us | multiple of floor "
        f"| first step, us | summary of a chunk of {CHUNK // K}K, us | summary lost, us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        dense = "-" if r.dense_us is None else f"{r.dense_us:.1f} ± {r.dense_spread_us or 0:.1f}"
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}"
        chunk = "-" if r.checkpoint_us is None else f"{r.checkpoint_us:.0f}"
        lines.append(
            f"| {r.context // K}K x {r.batch} | {dense} | {r.rc_topk_us:.1f} ± {r.rc_topk_spread_us:.1f} | {ratio} "
            f"| {r.floor_us:.1f} | {r.rc_topk_us / r.floor_us:.2f} | {r.first_step_us:.0f} "
            f"| {chunk} | {r.rebuild_us:.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """The same as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    series = {
        "FlashAttention-3": [r.dense_us or 0.0 for r in rows],
        "rc_topk": [r.rc_topk_us for r in rows],
        "bytes floor of rc_topk": [r.floor_us for r in rows],
    }
    for i, (name, values) in enumerate(series.items()):
        axes.bar([x + 0.27 * (i - 1) for x in range(len(rows))], values, 0.25, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("one layer's decode step, us")
    axes.set_xticks(range(len(rows)), [f"{r.context // K}K x {r.batch}" for r in rows])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def parse_row(text: str) -> tuple[int, int]:
    """(context in tokens, batch) of a row's name, such as 32Kx8.

    Raises:
        argparse.ArgumentTypeError: another form.
    """
    found = re.fullmatch(r"([1-9]\d*)Kx([1-9]\d*)", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}; allowed: tokens of context in Ki and sequences, such as 32Kx8"
        )
    return int(found[1]) * K, int(found[2])


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which layer is timed, and in which batches."""
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument(
        "--budget", type=float, default=2048, help="tokens, or a share of the context below 1"
    )
    parser.add_argument(
        "--dense-threshold", type=int, default=RCTopKConfig.dense_threshold, help="as the option of that name"
    )
    parser.add_argument(
        "--statistics-bits", type=int, choices=(2, 8, 16), help="default: those of the selection policy"
    )
    parser.add_argument("--selection", choices=tuple(POLICY_QUERY_MAPS), default=RCTopKConfig.selection)
    parser.add_argument("--group-rule", choices=GROUP_RULES, default=RCTopKConfig.group_rule)
    parser.add_argument("--completion", choices=COMPLETIONS, help="default: that of the selection policy")
    parser.add_argument(
        "--features",
        type=int,
        default=128,
        help="of a KV head, with --completion features, whose maps are random (default %(default)s)",
    )
    parser.add_argument("--layout", choices=("HND", "NHD"), default="NHD", help="order inside a KV block")
    parser.add_argument(
        "--rows",
        nargs="+",
        type=parse_row,
        default=[(context * K, batch) for context, batch in TABLE],
        metavar="CONTEXTxBATCH",
        help="such as 32Kx8; default: " + " ".join(f"{context}Kx{batch}" for context, batch in TABLE),
    )
    parser.add_argument("--repeats", type=int, default=11)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_layer_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/results/decode.png"))


def make_case(options: argparse.Namespace) -> Case:
    """The layer that the options describe.

    Raises:
        ValueError: there is no such layer, or the server would refuse the options.
    """
    if options.kv_heads < 1 or options.query_heads < 1 or options.query_heads % options.kv_heads:
        raise ValueError(
            f"--query-heads {options.query_heads}; allowed: a multiple of --kv-heads {options.kv_heads}, from 1 up"
        )
    check_group_rule(options.group_rule, make_policy(options.selection))
    sink_tokens = -(-RCTopKConfig.sink_tokens // options.page_size) * options.page_size
    RCTopKConfig(options.budget, sink_tokens, page_size=options.page_size)
    return Case(
        heads=options.kv_heads,
        group=options.query_heads // options.kv_heads,
        head_size=options.head_size,
        page_size=options.page_size,
        sink_tokens=sink_tokens,
        tail_tokens=RCTopKConfig.tail_tokens,
        budget=options.budget,
        dense_threshold=options.dense_threshold,
        statistics_bits=options.statistics_bits or POLICIES[options.selection].statistics_bits[0],
        selection=options.selection,
        group_rule=options.group_rule,
        completion=options.completion or default_completion(options.selection),
        features=options.features,
        head_first=options.layout == "HND",
    )


def usable_case(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Case | None:
    """``make_case``; None, and a message, without a GPU. Options that are refused end the command as usual."""
    try:
        case = make_case(options)
    except ValueError as refusal:
        parser.error(str(refusal))
    if torch.cuda.is_available():
        return case
    print(f"{parser.prog} needs a CUDA device.", file=sys.stderr)
    return None


def fitting(case: Case, pool: Tensor, shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those (context, batch) of which the pool holds a layer; a message for each other."""
    fit = []
    for context, batch in shapes:
        if (context + case.page_size) * batch > pool.shape[0] * case.page_size:
            print(f"{context // K}K x {batch} does not fit into this GPU's memory.", file=sys.stderr)
        else:
            fit.append((context, batch))
    return fit


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rc-topk bench``. Returns the exit status: 1 without a GPU or with a failed check."""
    parser = argparse.ArgumentParser(prog="rc-topk bench", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(argv)
    case = usable_case(parser, options)
    if case is None:
        return 1
    device = torch.device("cuda", torch.cuda.current_device())

    torch.manual_seed(0)
    try:
        error = check(
            replace(case, seq_lens=(8 * K, 1, 0, 2 * K, 12 * K + 5), chunk=3 * K + 5, max_model_len=16 * K),
            device,
            3,
        )
    except AssertionError as failure:
        print(
            f"The kernels do not agree with the reference, so no speed is printed: {failure}", file=sys.stderr
        )
        return 1
    print(f"Checked against the reference: relative error {error:.1e}.", file=sys.stderr)

    bandwidth = copy_bandwidth(device)
    pool = make_pool(case, options.rows, device)
    rows = []
    for context, batch in fitting(case, pool, options.rows):
        try:
            rows.append(measure(case, pool, context, batch, bandwidth, options.repeats))
        except AssertionError as failure:
            print(f"{context // K}K x {batch}: wrong output, no speeds printed: {failure}", file=sys.stderr)
            return 1
    maps = f"{case.features} random " if case.completion == LEARNED else ""
    about: dict[str, object] = {
        **environment(device, command_line("rc-topk bench", sys.argv[2:])),
        "copy_gb_per_s": round(bandwidth / 1e9),
        "shape": f"{options.query_heads} query heads, {case.heads} KV heads, head size {case.head_size}, bfloat16, "
        f"pages of {case.page_size}, {options.layout}, budget {case.budget:g}, "
        f"dense up to {case.dense_threshold} tokens, "
        f"sink {case.sink_tokens}, tail {case.tail_tokens}, {case.selection}, group rule {case.group_rule}, "
        f"{maps}{case.completion}, {case.statistics_bits}-bit statistics",
    }
    for name, value in about.items():
        print(f"- {name}: {value}")
    print()
    print(markdown(rows))
    update_results(options.output, decode=[asdict(row) for row in rows], decode_environment=about)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, options.plot)
    return 0
