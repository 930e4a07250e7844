"""``rc-topk eval``: accuracy of dense, selected and completed attention against what a query reads."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from vllm_rc_backend.completion import COMPLETIONS
from vllm_rc_backend.completion.feature_file import FeatureFile, fingerprint
from vllm_rc_backend.config import RCTopKConfig
from vllm_rc_backend.evaluation.diagnostics import diagnose
from vllm_rc_backend.evaluation.grid import DENSE, Case, Journal, Selection, Shapes, cases, published, row
from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.measure import measure
from vllm_rc_backend.evaluation.needles import NEEDLES
from vllm_rc_backend.evaluation.report import markdown, plot
from vllm_rc_backend.evaluation.samples import Sizes, make_samples
from vllm_rc_backend.evaluation.tasks import FORMATS, HELD_OUT, TASKS
from vllm_rc_backend.evaluation.text import Corpus, text_files

ALL_TASKS = (HELD_OUT, *TASKS)
ROWS = "rows.jsonl"


def main(argv: list[str] | None = None) -> int:
    """Entry point; see ``rc-topk eval --help``."""
    options = _parse(argv)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        return _report(options.out, Journal.open(options.out / ROWS), console)
    sizes = Sizes(options.sequences, options.positions, options.prompts, options.seed, options.batch)
    model = Llama(options.model, options.device)
    corpus, sources = _corpus(options)
    features = None
    if options.features_file:
        file = FeatureFile.load(options.features_file, fingerprint(model.config))
        features = [maps.to(model.device) for maps in file.layers]
    shapes = Shapes(model.layers, model.heads, model.head_size, features)
    name = options.name or options.model.resolve().name
    header = {
        "model": name,
        "fingerprint": fingerprint(model.config),
        "format": options.format,
        "text": sources,
        "sizes": vars(sizes) | {"batch": None},
        "sink_tokens": RCTopKConfig.sink_tokens,
        "tail_tokens": RCTopKConfig.tail_tokens,
        "group_rule": RCTopKConfig.group_rule,
    }
    journal = Journal(options.out / ROWS, header)

    groups = [(context, task) for context in options.contexts for task in options.tasks]
    grid = (options.budgets, options.selections, options.completions)
    with Progress(console=console, transient=True) as bars:
        total = sum(len(list(cases(*group, *grid))) for group in groups)
        bar = bars.add_task("measuring", total=total, completed=0)
        for context, task in groups:
            todo = [case for case in cases(context, task, *grid) if case not in journal.rows]
            bars.advance(bar, len(list(cases(context, task, *grid))) - len(todo))
            if not todo:
                continue
            bars.update(bar, description=f"{task} at {context}: dense")
            samples = make_samples(model, corpus, task, options.format, context, sizes)
            for case in todo:
                bars.update(bar, description=f"{task} at {context}: {case.selection}, {case.completion}")
                settings = None if case.selection == DENSE else shapes.settings(case)
                journal.add(
                    row(name, case, measure(model, samples, settings), shapes.reads(case, samples.window))
                )
                bars.advance(bar)
            if options.diagnostics and task == HELD_OUT:
                _diagnose(model, samples, shapes, options, context)

    return _report(options.out, journal, console)


def _diagnose(model: Llama, samples: Any, shapes: Shapes, options: argparse.Namespace, context: int) -> None:
    """Errors per layer and head of the first selection, without and with completion, at the middle budget."""
    budget = options.budgets[len(options.budgets) // 2]
    rows = []
    for completion in options.completions:
        settings = shapes.settings(Case(context, HELD_OUT, budget, options.selections[0], completion))
        for layer, found in enumerate(diagnose(model, samples, settings)):
            rows += [{"completion": completion, **entry} for entry in found.rows(layer)]
    entry = {"context": context, "budget": budget, "selection": options.selections[0], "rows": rows}
    (options.out / f"diagnostics-{context}.json").write_text(json.dumps(entry) + "\n")


def _report(out: Path, journal: Journal, console: Console) -> int:
    """Tables and plot from the rows that there are."""
    rows = list(journal.rows.values())
    lines = ",\n  ".join(json.dumps(published(r)) for r in rows)
    (out / "accuracy.json").write_text(
        f'{{"about": {json.dumps(journal.header)},\n "rows": [\n  {lines}\n ]}}\n'
    )
    (out / "accuracy.md").write_text(markdown(rows))
    plot(rows, out / "accuracy.png")
    console.print(Markdown(markdown(rows)))
    console.print(f"written: {out}/accuracy.json, accuracy.md, accuracy.png")
    return 0


def _corpus(options: argparse.Namespace) -> tuple[Corpus, list[str]]:
    if options.data:
        files = [file for path in options.data for file in text_files(path)]
        return Corpus(options.model, files, options.seed), [path.name for path in options.data]
    return Corpus.installed(options.model, options.seed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "rc-topk eval",
        description="Accuracy of dense, selected and completed attention against token-equivalents read per query. "
        "Goes on where it was stopped.",
    )

    def many(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    add = parser.add_argument
    add("--model", type=Path, help="folder of the checkpoint (config.json, safetensors)")
    add("--out", type=Path, default=Path("rc-topk-eval"), help="folder of the results (default %(default)s)")
    add("--name", help="the model's name in the results (default: the folder's)")
    add("--contexts", type=many(int), default=[8192], help="tokens, comma-separated (default 8192)")
    add(
        "--budgets",
        type=many(lambda text: float(Fraction(text))),
        default=[1 / 64, 1 / 32, 1 / 16, 1 / 8],
        help="shares of the context read exactly, anchors included (default 1/64,1/32,1/16,1/8)",
    )
    add(
        "--selections",
        type=many(lambda text: str(Selection.parse(text))),
        default=[RCTopKConfig.selection],
        help="page scores as name[:weight][@bits][/page_size], such as box:1@8 (default: the shipped one)",
    )
    add(
        "--completions",
        type=many(str),
        default=["none", RCTopKConfig.completion],
        help=f"of features, {', '.join(sorted(COMPLETIONS))} (default none,{RCTopKConfig.completion})",
    )
    add("--features-file", type=Path, help="from rc-topk calibrate, for --completions features")
    add(
        "--tasks",
        type=many(str),
        default=list(ALL_TASKS),
        help=f"of {', '.join(ALL_TASKS)} (default: these); also {', '.join(NEEDLES)}",
    )
    add(
        "--format",
        choices=sorted(FORMATS),
        default="english",
        help="wording of the tasks (default %(default)s)",
    )
    add(
        "--data",
        type=Path,
        action="append",
        help="text or folder for passages and filler (default: installed packages)",
    )
    add(
        "--sequences",
        type=int,
        default=Sizes.sequences,
        help="passages of held-out text (default %(default)s)",
    )
    add("--positions", type=int, default=Sizes.positions, help="last positions of each (default %(default)s)")
    add("--prompts", type=int, default=Sizes.prompts, help="prompts of each other task (default %(default)s)")
    add("--batch", type=int, default=Sizes.batch, help="sequences computed at a time (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--report", action="store_true", help="measure nothing, write the tables of --out again")
    add("--diagnostics", action="store_true", help="also errors per layer and head, by quartile of entropy")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if not options.model and not options.report:
        parser.error("--model is required")
    for task in options.tasks:
        if task not in {*ALL_TASKS, *NEEDLES}:
            parser.error(
                f"--tasks: {task!r} is not one of {', '.join({**dict.fromkeys(ALL_TASKS), **NEEDLES})}"
            )
    for completion in options.completions:
        if completion not in {"features", *COMPLETIONS}:
            parser.error(f"--completions: {completion!r} is not one of features, {', '.join(COMPLETIONS)}")
    if "features" in options.completions and not options.features_file:
        parser.error("--completions features needs --features-file")
    return options
