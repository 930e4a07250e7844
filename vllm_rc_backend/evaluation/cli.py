"""``rc-topk eval``: accuracy of dense, selected and completed attention against what a query reads."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from torch import Tensor

from vllm_rc_backend.completion import COMPLETIONS
from vllm_rc_backend.completion.feature_file import FeatureFile, fingerprint
from vllm_rc_backend.config import RCTopKConfig
from vllm_rc_backend.doctor import ModelFacts
from vllm_rc_backend.evaluation.diagnostics import diagnose
from vllm_rc_backend.evaluation.grid import (
    DENSE,
    Case,
    Journal,
    Selection,
    Shapes,
    cases,
    published,
    row,
    usual_completions,
)
from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.measure import measure
from vllm_rc_backend.evaluation.needles import NEEDLES
from vllm_rc_backend.evaluation.report import diagnosis_tables, markdown, plot
from vllm_rc_backend.evaluation.samples import Samples, Sizes, draw, make_samples
from vllm_rc_backend.evaluation.snapkv import SnapKV
from vllm_rc_backend.evaluation.tasks import FORMATS, HELD_OUT, TASKS
from vllm_rc_backend.evaluation.text import Corpus, text_files

ALL_TASKS = (HELD_OUT, *TASKS)
ROWS = "rows.jsonl"
ENDS = 1 << 20
"""Bytes at each end of a file by which it is told from others."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; see ``rc-topk eval --help``."""
    options = _parse(argv)
    console = Console()
    try:
        return _run(options, console)
    except (OSError, ValueError) as error:
        console.print(f"[red]rc-topk eval:[/red] {error}", highlight=False)
        return 1


def _run(options: argparse.Namespace, console: Console) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        return _report(options.out, Journal.open(options.out / ROWS), console)
    config = json.loads((options.model / "config.json").read_text())
    _check(options, config)
    corpus, sources = _corpus(options)
    sizes = Sizes(options.sequences, options.positions, options.prompts, options.seed, options.batch)
    header = {
        "model": options.name or options.model.resolve().name,
        "fingerprint": fingerprint(config),
        "format": options.format,
        "text": sources,
        "sizes": vars(sizes) | {"batch": None},
        "sink_tokens": RCTopKConfig.sink_tokens,
        "tail_tokens": RCTopKConfig.tail_tokens,
        "group_rule": RCTopKConfig.group_rule,
        "weights": _digest(options.model.glob("*.safetensors")),
        "features": _digest([options.features_file] if options.features_file else []),
    }
    file = FeatureFile.load(options.features_file, fingerprint(config)) if options.features_file else None
    run = _by_engine if options.engine else _by_reference
    return _report(options.out, run(options, corpus, sizes, header, file, console), console)


def _by_reference(
    options: argparse.Namespace,
    corpus: Corpus,
    sizes: Sizes,
    header: dict[str, Any],
    file: FeatureFile | None,
    console: Console,
) -> Journal:
    """All rows by the teacher-forced reference: a context and task at a time, prefilled once."""
    journal = Journal(options.out / ROWS, header)
    model = Llama(options.model, options.device)
    features = [maps.to(model.device) for maps in file.layers] if file else None
    shapes = Shapes(model.layers, model.heads, model.head_size, features)
    groups = [(context, task) for context in options.contexts for task in options.tasks]
    grid = (options.budgets, options.selections, options.completions)
    with Progress(console=console, transient=True) as bars:
        total = sum(len(list(cases(*group, *grid))) for group in groups)
        bar = bars.add_task("measuring", total=total, completed=0)
        for context, task in groups:
            todo = [case for case in cases(context, task, *grid) if case not in journal.rows]
            bars.advance(bar, len(list(cases(context, task, *grid))) - len(todo))
            diagnostics = options.out / f"diagnostics-{context}.json"
            wanted = options.diagnostics and task == HELD_OUT and not diagnostics.exists()
            if not todo and not wanted:
                continue
            bars.update(bar, description=f"{task} at {context}: dense")
            drawn = draw(corpus, task, options.format, context, sizes)
            samples = make_samples(model, drawn, task, sizes.batch)
            for case in todo:
                bars.update(bar, description=f"{task} at {context}: {case.selection}, {case.completion}")
                settings = None if case.selection == DENSE else shapes.settings(case)
                result = measure(model, samples, settings)
                journal.add(row(header["model"], case, result, shapes.reads(case, drawn.window)))
                bars.advance(bar)
            if wanted:
                bars.update(bar, description=f"{task} at {context}: diagnostics")
                diagnostics.write_text(json.dumps(_diagnose(model, samples, shapes, options, context)) + "\n")
    return journal


def _by_engine(
    options: argparse.Namespace,
    corpus: Corpus,
    sizes: Sizes,
    header: dict[str, Any],
    file: FeatureFile | None,
    console: Console,
) -> Journal:
    """All rows by vLLM: a context and setting at a time, each with an engine of its own."""
    from vllm_rc_backend.evaluation import engine

    journal = Journal(
        options.out / ROWS, header | {"vllm": engine.VERSION, "engine_args": options.engine_args}
    )
    facts = ModelFacts.read(str(options.model))
    shapes = Shapes(facts.layers, facts.kv_heads, facts.head_size, file.layers if file else None)
    with Progress(console=console, transient=True) as bars:
        bar = bars.add_task("measuring", total=None)
        for context in options.contexts:
            settings = list(
                cases(context, HELD_OUT, options.budgets, options.selections, options.completions)
            )
            left = {
                task: [s for s in settings if replace(s, task=task) not in journal.rows]
                for task in options.tasks
            }
            drawn = {
                task: draw(corpus, task, options.format, context, sizes)
                for task in options.tasks
                if left[task]
            }
            dense: dict[str, list[Tensor]] = {}
            for setting in settings:
                # Dense first, whether its rows are there or not: all others are compared with it.
                is_dense = setting.selection == DENSE
                tasks = [task for task in drawn if is_dense or setting in left[task]]
                if not tasks:
                    continue
                backend = None if is_dense else setting.options(options.features_file)
                bars.update(bar, description=f"{context}: {setting.selection}, {setting.completion}")
                with engine.start(options.model, backend, context, sizes.batch, options.engine_args) as llm:
                    for task in tasks:
                        found = engine.decode(llm, drawn[task])
                        dense.setdefault(task, found)
                        case = replace(setting, task=task)
                        if case not in journal.rows:
                            result = engine.measure(drawn[task], dense[task], found)
                            reads = shapes.reads(case, drawn[task].window)
                            journal.add(row(header["model"], case, result, reads))
    return journal


def _check(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """Refuse before anything is measured what would fail in the middle.

    Raises:
        ValueError: what, and what is allowed.
    """
    longest = int(config.get("text_config", config).get("max_position_embeddings", max(options.contexts)))
    if max(options.contexts) > longest:
        raise ValueError(f"--contexts {max(options.contexts)}; allowed: up to the model's {longest}")
    for context in options.contexts:
        grid = cases(context, HELD_OUT, options.budgets, options.selections, options.completions)
        for case in grid:
            if case.selection != DENSE:
                case.options(options.features_file)


def _digest(files: Iterable[Path]) -> str:
    """What tells files of this size from others: their ends, for whole checkpoints take minutes to read."""
    found = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for place in (0, max(size - ENDS, 0)):
                file.seek(place)
                found.update(file.read(ENDS))
        found.update(str(size).encode())
    return found.hexdigest()[:16]


def _diagnose(
    model: Llama, samples: Samples, shapes: Shapes, options: argparse.Namespace, context: int
) -> dict[str, Any]:
    """Errors per layer and head of the first selection, without and with completion, at the middle budget."""
    budget = options.budgets[len(options.budgets) // 2]
    rows = []
    for completion in options.completions or usual_completions(options.selections[0]):
        settings = shapes.settings(Case(context, HELD_OUT, budget, options.selections[0], completion))
        for layer, found in enumerate(diagnose(model, samples, settings)):
            rows += [{"completion": completion, **entry} for entry in found.rows(layer)]
    return {"context": context, "budget": budget, "selection": options.selections[0], "rows": rows}


def _report(out: Path, journal: Journal, console: Console) -> int:
    """Tables and plot from the rows that there are."""
    rows = list(journal.rows.values())
    lines = ",\n  ".join(json.dumps(published(r)) for r in rows)
    (out / "accuracy.json").write_text(
        f'{{"about": {json.dumps(journal.header)},\n "rows": [\n  {lines}\n ]}}\n'
    )
    diagnoses = [json.loads(path.read_text()) for path in sorted(out.glob("diagnostics-*.json"))]
    text = "\n".join((markdown(rows), *map(diagnosis_tables, diagnoses)))
    (out / "accuracy.md").write_text(text)
    plot(rows, out / "accuracy.png")
    console.print(Markdown(text))
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
        help="page scores as name[:weight][@bits][/page_size][+group_rule], such as box:1@8 or runs+share (default: "
        "the shipped one)",
    )
    add(
        "--completions",
        type=many(str),
        help=f"of features, {', '.join(sorted(COMPLETIONS))} (default none, and what each selection comes with)",
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
    add(
        "--engine",
        action="store_true",
        help="measure through vLLM on this machine instead of the reference: slower, any model that it serves",
    )
    add(
        "--engine-args",
        type=json.loads,
        default={},
        help="with --engine: further arguments of vllm.LLM as a JSON object",
    )
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
    for completion in options.completions or ():
        if completion not in {"features", *COMPLETIONS}:
            parser.error(f"--completions: {completion!r} is not one of features, {', '.join(COMPLETIONS)}")
    if not isinstance(options.engine_args, dict):
        parser.error(f"--engine-args: {options.engine_args!r} is not a JSON object")
    if options.engine:
        if SnapKV.name in options.selections:
            parser.error(f"--selections {SnapKV.name} is for the reference only: leave out --engine")
        if options.diagnostics:
            parser.error("--diagnostics looks into the reference's attention: leave out --engine")
    elif options.engine_args:
        parser.error("--engine-args needs --engine")
    for budget in options.budgets:
        if not 0 < budget < 1:
            parser.error(f"--budgets: {budget:g} is not a share of the context between 0 and 1, such as 1/32")
    if "features" in (options.completions or ()) and not options.features_file:
        parser.error("--completions features needs --features-file")
    return options
