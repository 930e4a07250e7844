"""Compare models with and without RAT+'s memory under sparse decoding, and write docs/exponential-memory.md.

    python -m tools.memory_comparison --models pair     # measures what is missing, then writes the page
    python -m tools.memory_comparison                   # writes the page from the rows that there are
    python -m tools.memory_comparison --check           # fails if the page is not what that would write

``--models`` is the folder that examples/train_rat_plus.py wrote. Rows lie in docs/results/exponential-memory, one file
a model; a measurement that was stopped goes on where it was. What is not measured comes from exponential_memory.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_rc_backend.completion.feature_file import fingerprint
from vllm_rc_backend.config import RCTopKConfig
from vllm_rc_backend.evaluation.grid import DENSE, Case, Journal, Selection, Shapes, cases, row
from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.measure import Z95, measure
from vllm_rc_backend.evaluation.needles import NEEDLES
from vllm_rc_backend.evaluation.report import share
from vllm_rc_backend.evaluation.samples import Sizes, draw, make_samples
from vllm_rc_backend.evaluation.text import Corpus

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "exponential-memory.md"
ROWS = ROOT / "docs" / "results" / "exponential-memory"

POLICIES = {"box:1": "Quest", "moba": "MoBA", "snapkv": "SnapKV", RCTopKConfig.selection: "ours"}
COMPLETIONS = {policy: ("none", Selection.parse(policy).completion) for policy in POLICIES}
"""Of each policy: selection alone, and the completion that the policy comes with."""
BUDGETS = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
CONTEXTS = (4096, 8192, 16384)
PAIRS = {("dense", "memory"): "Trained from the start", ("continued", "converted"): "Converted"}

Rows = dict[Case, dict[str, Any]]


class Difference(NamedTuple):
    """Mean exact match over the eight tasks without and with the memory; half the 95 % interval of the difference."""

    without: float
    with_it: float
    half: float

    @property
    def verdict(self) -> str:
        """``higher`` or ``lower`` with the memory, or ``undecided``."""
        gain = self.with_it - self.without
        return "undecided" if abs(gain) <= self.half else "higher" if gain > 0 else "lower"

    @classmethod
    def of(cls, without: list[dict[str, Any]], with_it: list[dict[str, Any]]) -> Difference:
        """From one row per task of each. The variance is that of one more hit and one more miss: never zero."""

        def variance(entry: dict[str, Any]) -> float:
            n = entry["n"]
            p = (entry["score"] * n + 1) / (n + 2)
            return p * (1 - p) / n

        means = (sum(e["score"] for e in entries) / len(entries) for entries in (without, with_it))
        total = sum(map(variance, [*without, *with_it])) / len(without) ** 2
        return cls(*means, Z95 * math.sqrt(total))


def settings_of(context: int, task: str) -> list[Case]:
    """Every row of one task, dense first."""
    by_policy = (
        cases(context, task, BUDGETS, [policy], completions) for policy, completions in COMPLETIONS.items()
    )
    return list(dict.fromkeys(itertools.chain.from_iterable(by_policy)))


def measure_model(
    folder: Path, rows: Path, contexts: list[int], prompts: int, batch: int, device: str
) -> None:
    """Every row of one model that is not there yet."""
    model, sizes = Llama(folder, device), Sizes(prompts=prompts, batch=batch)
    corpus, sources = Corpus.installed(folder)
    header = {
        "model": folder.name,
        "fingerprint": fingerprint(model.config),
        "text": sources,
        "prompts": prompts,
        "seed": sizes.seed,
    }
    rows.mkdir(parents=True, exist_ok=True)
    journal = Journal(rows / f"{folder.name}.jsonl", header)
    shapes = Shapes(model.layers, model.heads, model.head_size, None)
    for context, task in itertools.product(contexts, NEEDLES):
        todo = [case for case in settings_of(context, task) if case not in journal.rows]
        if not todo:
            continue
        print(f"{folder.name}: {task} at {context}, {len(todo)} rows", flush=True)
        drawn = draw(corpus, task, "comments", context, sizes)
        samples = make_samples(model, drawn, task, sizes.batch)
        for case in todo:
            settings = None if case.selection == DENSE else shapes.settings(case)
            found = measure(model, samples, settings)
            journal.add(row(folder.name, case, found, shapes.reads(case, drawn.window)))


def read_rows(folder: Path) -> dict[str, Rows]:
    """The rows of each model that was measured."""
    return {path.stem: Journal.open(path).rows for path in sorted(folder.glob("*.jsonl"))}


def differences(without: Rows, with_it: Rows) -> Iterator[tuple[Case, Difference]]:
    """Of every setting that both models have in all eight tasks; the case's task is empty."""
    for setting in dict.fromkeys(replace(case, task="") for case in without):
        tasks = [replace(setting, task=task) for task in NEEDLES]
        if all(case in rows for case in tasks for rows in (without, with_it)):
            yield setting, Difference.of([without[c] for c in tasks], [with_it[c] for c in tasks])


def page(models: dict[str, Rows]) -> str:
    """The page."""
    parts = [(ROOT / "tools" / "exponential_memory.md").read_text()]
    for (without, with_it), title in PAIRS.items():
        parts.append(f"### {title}: {without} against {with_it}\n")
        if without in models and with_it in models:
            parts += tables(models[without], models[with_it])
        else:
            parts.append("Not run.\n")
    return "\n".join(parts)


def tables(without: Rows, with_it: Rows) -> Iterator[str]:
    """All tables of a pair, and what they say in sum."""
    found = dict(differences(without, with_it))
    for title, alone in (("Selection alone", True), ("Completed", False)):
        sparse = [(case, d) for case, d in found.items() if case.selection != DENSE]
        verdicts = [d.verdict for case, d in sparse if (case.completion == "none") == alone]
        counts = ", ".join(
            f"{verdict} in {verdicts.count(verdict)}" for verdict in ("higher", "lower", "undecided")
        )
        yield f"{title}: of {len(verdicts)} settings the score with the memory is {counts}.\n"
    for context in dict.fromkeys(case.context for case in found):
        dense = found[Case(context, "", 1.0, DENSE, DENSE)]
        yield (
            f"{context} tokens, mean exact match of the eight tasks without -> with the memory (the difference and "
            f"its 95 % interval); dense {text(dense)}:\n"
        )
        budgets = [b for b in BUDGETS if any(c.context == context and c.budget == b for c in found)]
        lines = [
            "| policy | completion | " + " | ".join(share(budget) for budget in budgets) + " |",
            "|---" * (2 + len(budgets)) + "|",
        ]
        for policy, completion in ((p, c) for p, of_policy in COMPLETIONS.items() for c in of_policy):
            cells = [found.get(Case(context, "", budget, policy, completion)) for budget in budgets]
            written = " | ".join("" if cell is None else text(cell) for cell in cells)
            lines.append(f"| {POLICIES[policy]} | {completion} | {written} |")
        yield "\n".join(lines) + "\n"
    yield from by_task(without, with_it)


def text(found: Difference) -> str:
    """``0.81 -> 0.90 (+0.09 ± 0.03)``."""
    gain = found.with_it - found.without
    return f"{found.without:.2f} -> {found.with_it:.2f} ({gain:+.2f} ± {found.half:.2f})"


def by_task(without: Rows, with_it: Rows) -> Iterator[str]:
    """Each task at 8K and 1/32."""
    context, budget = 8192, 1 / 32
    lines = [
        "| task | dense | " + " | ".join(POLICIES.values()) + " |",
        "|---" * (2 + len(POLICIES)) + "|",
    ]
    for task in NEEDLES:
        wanted = [Case(context, task, 1.0, DENSE, DENSE)]
        wanted += [Case(context, task, budget, policy, "none") for policy in POLICIES]
        if not all(case in rows for case in wanted for rows in (without, with_it)):
            return
        cells = [f"{without[case]['score']:.2f} -> {with_it[case]['score']:.2f}" for case in wanted]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    yield f"{context} tokens, {Fraction(budget)}, selection alone, without -> with the memory:\n"
    yield "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure where asked to, and write or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, help="folder that examples/train_rat_plus.py wrote")
    parser.add_argument(
        "--rows", type=Path, default=ROWS, help="folder of the rows (default: the repository's)"
    )
    names = tuple(itertools.chain.from_iterable(PAIRS))
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="models to measure (default: all)"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--prompts", type=int, default=100, help="of each task (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=16, help="prompts computed at a time (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.models:
        for name in options.only:
            folder = options.models / name
            if not (folder / "model.safetensors").exists():
                parser.error(
                    f"--models: {folder} holds no model; train it first (examples/train_rat_plus.py)"
                )
            measure_model(
                folder, options.rows, options.contexts, options.prompts, options.batch, options.device
            )
    written = page(read_rows(options.rows))
    if options.check:
        if PAGE.read_text() != written:
            print(f"{PAGE} is out of date: make docs", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
