"""``rc-topk calibrate``: one file of feature maps for one model."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from vllm_rc_backend.calibrate.learn import Learned, learn
from vllm_rc_backend.calibrate.record import Recording, record
from vllm_rc_backend.completion.feature_file import FeatureFile, fingerprint
from vllm_rc_backend.completion.features import Features
from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.tasks import FORMATS, TASKS, make_prompts
from vllm_rc_backend.evaluation.text import Corpus, text_files

UNITS_AT_ONCE = 32
"""(layer, KV head) pairs learned together; bounds the memory."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; see ``rc-topk calibrate --help``."""
    options = _parse(argv)
    console = Console()
    try:
        return _run(options, console)
    except (OSError, ValueError) as error:
        console.print(f"[red]rc-topk calibrate:[/red] {error}", highlight=False)
        return 2


def _run(options: argparse.Namespace, console: Console) -> int:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    corpus = Corpus(options.model, [f for path in options.data for f in text_files(path)], options.seed)
    model = Llama(options.model, options.device)
    texts = list(_texts(corpus, options))
    if len(texts) < 2:
        raise ValueError(
            f"--sequences {options.sequences} --prompts {options.prompts}: allowed: two sequences or more in all, one "
            "to learn from and one held out"
        )
    recordings = [
        record(model, text, options.window)
        for text in track(texts, "reading", console=console, transient=True)
    ]
    every = max(2, len(recordings) // max(1, len(recordings) // 8))
    validation, training = recordings[::every], [r for i, r in enumerate(recordings) if i % every]

    units, learned = model.layers * model.heads, list[Learned]()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        for first in range(0, units, UNITS_AT_ONCE):
            last = min(first + UNITS_AT_ONCE, units)
            bar = bars.add_task(
                f"learning units {first} to {last - 1} of {units}", total=options.steps, loss=0.0
            )

            def show(step: int, loss: float, bar: TaskID = bar) -> None:
                bars.update(bar, completed=step, loss=loss)

            def chunk(rows: list[Recording], first: int = first, last: int = last) -> list[Recording]:
                return [row.units(first, last, model.device) for row in rows]

            learned.append(
                learn(
                    chunk(training),
                    chunk(validation),
                    options.features,
                    options.steps,
                    options.patience,
                    options.seed,
                    show,
                )
            )
    _save(model, learned, options, len(texts))
    console.print(_report(learned, options, len(training), len(validation)))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "rc-topk calibrate",
        description="Learn the feature maps of completion=features for one model, from text like what it will read.",
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the checkpoint (config.json, safetensors)"
    )
    parser.add_argument(
        "--data", type=Path, action="append", required=True, help="a text file or a folder; repeatable"
    )
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument(
        "--features", type=int, default=128, help="features per KV head (default %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, default=8192, help="tokens of the longest sequences (default %(default)s)"
    )
    parser.add_argument(
        "--sequences", type=int, default=16, help="passages of the text (default %(default)s)"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=4,
        help="generated prompts of each task, mixed in so that the maps know other kinds of text; 0 for none "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--format", choices=sorted(FORMATS), default="english", help="wording of those prompts"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=128,
        help="last positions whose queries are learned from (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=600, help="at most (default %(default)s)")
    parser.add_argument(
        "--patience",
        type=int,
        default=4,
        help="checks without progress, 50 steps apart, before stopping (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps: got {options.steps}; allowed: 1 or more")
    if not 0 < options.window < options.context // 4:
        parser.error(
            f"--window: got {options.window}; allowed: from 1 to less than a quarter of --context {options.context}"
        )
    return options


def _texts(corpus: Corpus, options: argparse.Namespace) -> Iterator[list[int]]:
    """Passages and prompts, every other one of half the length."""
    lengths = (options.context, options.context // 2)
    rng = random.Random(options.seed)
    for i in range(options.sequences):
        yield corpus.passage(lengths[i % 2], rng)
    for task in TASKS:
        for i in range(options.prompts):
            length = lengths[i % 2]
            yield make_prompts(task, corpus, options.format, length, 1, options.seed + 1000 + i)[0].tokens


def _save(model: Llama, learned: list[Learned], options: argparse.Namespace, texts: int) -> None:
    whole = [torch.cat(parts) for parts in zip(*(chunk.maps for chunk in learned), strict=True)]
    layers = [
        Features(*parts) for parts in zip(*(x.unflatten(0, (model.layers, -1)) for x in whole), strict=True)
    ]
    notes = f"{texts} sequences of up to {options.context} tokens, seed {options.seed}"
    FeatureFile(layers, fingerprint(model.config), notes).save(options.out)


def _report(learned: list[Learned], options: argparse.Namespace, training: int, validation: int) -> Table:
    table = Table(
        title=f"{options.out}: {options.features} features, {training} sequences, {validation} held out"
    )
    for column in ("units", "loss of clusters", "loss learned", "steps"):
        table.add_column(column, justify="right")
    for i, chunk in enumerate(learned):
        first = i * UNITS_AT_ONCE
        table.add_row(
            f"{first} to {first + len(chunk.maps.key_bias) - 1}",
            f"{chunk.first_loss:.4f}",
            f"{chunk.best_loss:.4f}",
            str(chunk.steps),
        )
    return table
