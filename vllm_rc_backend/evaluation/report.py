"""Tables and plots from measured rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib as mpl

from vllm_rc_backend.evaluation.grid import DENSE
from vllm_rc_backend.evaluation.tasks import HELD_OUT

mpl.use("Agg")
from matplotlib import pyplot

Row = dict[str, Any]


def share(budget: float) -> str:
    """``0.03125`` as ``1/32``."""
    fraction = Fraction(budget).limit_denominator(1024)
    return f"{fraction.numerator}/{fraction.denominator}"


def markdown(rows: list[Row]) -> str:
    """All tables."""
    parts = []
    for context in _distinct(rows, "context"):
        for task in _distinct(rows, "task"):
            chosen = [r for r in rows if r["context"] == context and r["task"] == task]
            if chosen:
                parts += [f"### {task}, {context} tokens\n", _task_table(chosen), ""]
        matched = matched_reads([r for r in rows if r["context"] == context])
        if matched:
            parts += [f"### Matched reads on held-out text, {context} tokens\n", _matched_table(matched), ""]
    return "\n".join(parts)


def _task_table(rows: list[Row]) -> str:
    lines = [
        "| budget | selection | completion | KL (95 %) | score (95 %) | loss | read | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["selection"] != DENSE, r["budget"])):
        kl, score = (
            f"{r[k]:.4f} ({low:.4f} to {high:.4f})"
            for k in ("kl", "score")
            for low, high in [r[f"{k}_interval"]]
        )
        lines.append(
            f"| {share(r['budget'])} | {r['selection']} | {r['completion']} | {kl} | {score} | {r['loss']:.4f} "
            f"| {r['token_equivalents']:.0f} | {r['n']} |"
        )
    return "\n".join(lines)


def matched_reads(rows: list[Row]) -> list[Row]:
    """Token-equivalents that selection alone needs for the KL that each completed row has.

    Interpolated on both logarithms between the measured budgets of the same selection; None beyond them.
    """
    text = [r for r in rows if r["task"] == HELD_OUT and r["selection"] != DENSE]
    found = []
    for selection in _distinct(text, "selection"):
        alone = sorted(
            (r["token_equivalents"], r["kl"])
            for r in text
            if r["selection"] == selection and r["completion"] == "none"
        )
        for r in text:
            if r["selection"] == selection and r["completion"] != "none":
                needed = _tokens_for(alone, r["kl"])
                ratio = None if needed is None else needed / r["token_equivalents"]
                found.append({**r, "needed": needed, "ratio": ratio})
    return found


def _tokens_for(curve: list[tuple[float, float]], kl: float) -> float | None:
    for (tokens, high), (more_tokens, low) in itertools.pairwise(curve):
        if low <= kl <= high:
            step = math.log(high / kl) / math.log(high / low)
            return math.exp(math.log(tokens) + step * math.log(more_tokens / tokens))
    return None


def _matched_table(rows: list[Row]) -> str:
    lines = [
        "| budget | selection | completion | KL | read | selection alone needs | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["selection"], r["completion"], r["budget"])):
        needed, ratio = (
            ("beyond the grid", "") if r["needed"] is None else (f"{r['needed']:.0f}", f"{r['ratio']:.2f}")
        )
        lines.append(
            f"| {share(r['budget'])} | {r['selection']} | {r['completion']} | {r['kl']:.4f} "
            f"| {r['token_equivalents']:.0f} | {needed} | {ratio} |"
        )
    return "\n".join(lines)


def diagnosis_tables(entry: dict[str, Any]) -> str:
    """What ``diagnose`` found: by quartile of entropy over all layers, and the output error of every head."""
    rows, completions = entry["rows"], _distinct(entry["rows"], "completion")
    setting = f"{entry['context']} tokens, {entry['selection']}, {share(entry['budget'])}"
    lines = [
        f"### Diagnostics on held-out text, {setting}\n",
        "Means over layers and positions, by quartile of the entropy of dense attention in each layer.\n",
        "| quartile | completion | output error | log-denominator error | captured mass | entropy |",
        "|---|---|---|---|---|---|",
    ]
    for quartile in range(4):
        for completion in completions:
            chosen = [r for r in rows if (r["quartile"], r["completion"]) == (quartile, completion)]
            error, mass_error, captured, entropy = (
                sum(r[name] for r in chosen) / len(chosen)
                for name in ("output_error", "log_denominator_error", "captured_mass", "entropy")
            )
            lines.append(
                f"| {quartile + 1} | {completion} | {error:.4f} | {mass_error:+.4f} | {captured:.3f} | {entropy:.2f} |"
            )
    heads = sorted({(r["layer"], r["head"]) for r in rows if r["head"] >= 0})
    errors = {(r["completion"], r["layer"], r["head"]): r["output_error"] for r in rows}
    lines += [
        "\nOutput error of every head (mean over positions).\n",
        f"| layer, head | {' | '.join(completions)} |",
        "|---" * (len(completions) + 1) + "|",
    ]
    for layer, head in heads:
        values = " | ".join(f"{errors[completion, layer, head]:.4f}" for completion in completions)
        lines.append(f"| {layer}, {head} | {values} |")
    return "\n".join((*lines, ""))


def plot(rows: list[Row], path: Path) -> None:
    """KL on held-out text, and mean score of the other tasks, against token-equivalents; a column per context.

    The mean needs every task of its context: a setting that lacks one could not be compared with the others.
    """
    contexts = _distinct(rows, "context")
    labels = list(dict.fromkeys(_label(r) for r in rows))
    palette = (mpl.colormaps[name](i) for name in ("tab20", "tab20b", "tab20c") for i in range(20))
    colors = dict(zip(labels, itertools.cycle(palette), strict=False))
    figure, axes = pyplot.subplots(
        2, len(contexts), figsize=(6 * len(contexts), 9), squeeze=False, layout="constrained"
    )
    for column, context in enumerate(contexts):
        here = [r for r in rows if r["context"] == context]
        top, bottom = axes[0][column], axes[1][column]
        tasks = len({r["task"] for r in here} - {HELD_OUT})
        for label in labels:
            _draw(top, bottom, [r for r in here if _label(r) == label], tasks, label, colors[label])
        top.set(
            title=f"{context} tokens", xscale="log", yscale="log", ylabel="KL(dense || sparse), held-out text"
        )
        bottom.set(
            xscale="log", xlabel="token-equivalents read per query", ylabel="mean exact match of the tasks"
        )
    drawn = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(drawn.values(), drawn.keys(), fontsize=7, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _label(row: Row) -> str:
    return DENSE if row["selection"] == DENSE else f"{row['selection']}, {row['completion']}"


def _draw(top: Any, bottom: Any, rows: list[Row], tasks: int, label: str, color: Any) -> None:
    text = sorted((r["token_equivalents"], r["kl"], *r["kl_interval"]) for r in rows if r["task"] == HELD_OUT)
    if text and label != DENSE:
        x, y, low, high = zip(*text, strict=True)
        top.plot(x, y, marker="o", label=label, color=color)
        top.fill_between(x, low, high, alpha=0.15, color=color)
    scores: dict[float, list[float]] = {}
    for r in rows:
        if r["task"] != HELD_OUT:
            scores.setdefault(r["token_equivalents"], []).append(r["score"])
    means = sorted((tokens, sum(v) / tasks) for tokens, v in scores.items() if len(v) == tasks)
    if means:
        x, y = zip(*means, strict=True)
        bottom.plot(x, y, marker="o", label=label, color=color)


def _distinct(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(r[key] for r in rows))
