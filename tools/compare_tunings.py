"""Launch parameters beside each other on this machine's GPU: one layer's usual decode step, all in one run.

    python -m tools.compare_tunings --rows 32Kx8 8Kx1 --tuning 'flat:select_few=2048' --tuning 'few:joint_programs=[3]'

A tuning is a name and, after it, fields of ``attention_triton.Tuning`` that it changes, as JSON. The shipped one is
timed as well, and vLLM's FlashAttention-3 where it is installed, by turns, so that a drift of the clock meets all.
Every output is held to the reference first. Launch parameters were chosen on an H200: elsewhere others may be better.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from vllm_rc_backend.attention_triton import Tuning, Workspace
from vllm_rc_backend.evaluation.bench import (
    K,
    Layers,
    add_layer_arguments,
    capture,
    dense_step,
    fitting,
    layer_count,
    make_pool,
    time_calls,
    usable_case,
)
from vllm_rc_backend.evaluation.environment import command_line, environment
from vllm_rc_backend.evaluation.kernel_check import Case

SHIPPED = "shipped"
DENSE = "FlashAttention-3"


def parse_tuning(text: str) -> tuple[str, Tuning]:
    """A name and a tuning from ``name:field=value;...``.

    Raises:
        argparse.ArgumentTypeError: a field that there is not, or a value of another type than it has.
    """
    name, _, changes = text.partition(":")
    shipped, changed = Tuning(), {}
    for part in changes.split(";"):
        field, _, value = part.partition("=")
        known = {f.name for f in dataclasses.fields(Tuning)}
        if field not in known:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {field!r} is no launch parameter; allowed: {', '.join(sorted(known))}"
            )
        wanted = type(getattr(shipped, field))
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None
        parsed = tuple(parsed) if isinstance(parsed, list) else parsed
        if type(parsed) is not wanted:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {field}={value}; allowed: {wanted.__name__} as JSON, such as "
                f"{json.dumps(getattr(shipped, field))}"
            )
        changed[field] = parsed
    return name, dataclasses.replace(shipped, **changed)


def compare(
    case: Case, pool: Tensor, context: int, batch: int, tunings: dict[str, Tuning], repeats: int
) -> dict[str, list[float]]:
    """Microseconds of a usual step of one layer with each tuning, ``repeats`` times.

    Raises:
        AssertionError: an output is not the reference's.
    """
    count = layer_count(case, pool, context, batch)
    layers = Layers(case, pool, context, batch, count, Tuning())
    plan = layers.plan(layers.first_len)
    layers.step(layers.lengths(layers.first_len), plan)
    lengths, plan = layers.lengths(layers.usual_len), layers.plan(layers.usual_len)
    shape, workspaces = layers.attentions[0].shape, []
    calls: dict[str, Callable[[], object]] = {}
    for name, tuning in tunings.items():
        workspace = Workspace(shape, batch, context, pool.device, case.statistics_bits, tuning)
        workspaces.append(workspace)  # graphs know their addresses only
        for attention in layers.attentions:
            attention.workspace = workspace
        layers.out.fill_(torch.nan)
        graph = capture(lambda: layers.step(lengths, plan))
        graph.replay()
        layers.verify(layers.usual_len, plan)
        calls[name] = graph.replay
    dense = dense_step(layers, layers.usual_len)
    if dense is not None:
        calls[DENSE] = capture(dense).replay
    return {name: [1e6 * s / count for s in times] for name, times in time_calls(calls, repeats).items()}


def make_table(rows: dict[str, dict[str, list[float]]]) -> Table:
    """Medians and ranges, and how far each is from the shipped."""
    names = list(next(iter(rows.values())))
    table = Table("context x batch", *names, title="us a layer")
    for row, times in rows.items():
        shipped = statistics.median(times[SHIPPED])
        cells = []
        for name in names:
            median = statistics.median(times[name])
            cell = f"{median:.1f} ± {max(times[name]) - min(times[name]):.1f}"
            cells.append(cell if name == SHIPPED else f"{cell} ({median / shipped - 1:+.1%})")
        table.add_row(row, *cells)
    return table


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 without a GPU or with a wrong output."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_tunings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_layer_arguments(parser)
    parser.add_argument(
        "--tuning",
        type=parse_tuning,
        action="append",
        default=[],
        metavar="NAME:FIELD=VALUE;...",
        help="may be given several times",
    )
    options = parser.parse_args(argv)
    case = usable_case(parser, options)
    if case is None:
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    tunings = {SHIPPED: Tuning(), **dict(options.tuning)}
    pool = make_pool(case, options.rows, device)
    rows = {}
    for context, batch in track(fitting(case, pool, options.rows), description="Timing"):
        try:
            rows[f"{context // K}K x {batch}"] = compare(case, pool, context, batch, tunings, options.repeats)
        except AssertionError as failure:
            print(f"{context // K}K x {batch}: wrong output, no speeds printed: {failure}", file=sys.stderr)
            return 1
    console = Console()
    console.print(environment(device, command_line("python -m tools.compare_tunings", sys.argv[1:])))
    if rows:
        console.print(make_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
