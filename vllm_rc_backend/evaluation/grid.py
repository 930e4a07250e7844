"""Which settings are measured, in which order, and what is kept of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vllm_rc_backend.completion import LEARNED, Completion, make_completion
from vllm_rc_backend.completion.features import Features
from vllm_rc_backend.config import RCTopKConfig, default_completion
from vllm_rc_backend.evaluation.measure import Estimate, Result
from vllm_rc_backend.evaluation.snapkv import SnapKV
from vllm_rc_backend.evaluation.sparse import Setting
from vllm_rc_backend.evaluation.tasks import HELD_OUT
from vllm_rc_backend.selection import make_policy
from vllm_rc_backend.side_store import StoreLayout

DENSE = "dense"


@dataclass(frozen=True)
class Selection:
    """Page scores as the options of an engine would have them.

    Written ``name[:weight][@bits][/page_size][+group_rule]``.
    """

    name: str
    weight: float | None = None
    bits: int | None = None
    page_size: int = 16
    group_rule: str = RCTopKConfig.group_rule

    @classmethod
    def parse(cls, text: str) -> Selection:
        """From its written form, such as ``box:1@8/32`` or ``runs+share``."""
        rest, _, rule = text.partition("+")
        rest, _, page = rest.partition("/")
        rest, _, bits = rest.partition("@")
        name, _, weight = rest.partition(":")
        selection = cls(
            name,
            float(weight) if weight else None,
            int(bits) if bits else None,
            int(page) if page else 16,
            rule or RCTopKConfig.group_rule,
        )
        selection.options(budget=0.5)  # refuses what an engine would refuse
        if name == SnapKV.name and (weight or bits or rule):
            raise ValueError(
                f"selection {text}: {name} keeps no statistics and has no weight or group rule; give {name} alone"
            )
        return selection

    @property
    def completion(self) -> str:
        """The completion that it comes with. SnapKV's scores are of an earlier query, so no mass of this one."""
        return "linear" if self.name == SnapKV.name else default_completion(self.name)

    def options(self, **others: Any) -> RCTopKConfig:
        """The engine's options."""
        sink = -(-RCTopKConfig.sink_tokens // self.page_size) * self.page_size
        return RCTopKConfig(
            selection=RCTopKConfig.selection if self.name == SnapKV.name else self.name,
            selection_weight=self.weight,
            statistics_bits=self.bits,
            page_size=self.page_size,
            group_rule=self.group_rule,
            sink_tokens=sink,
            **{"completion": "none", **others},
        )

    def __str__(self) -> str:
        weight = "" if self.weight is None else f":{self.weight:g}"
        bits = "" if self.bits is None else f"@{self.bits}"
        page = "" if self.page_size == 16 else f"/{self.page_size}"
        rule = "" if self.group_rule == RCTopKConfig.group_rule else f"+{self.group_rule}"
        return f"{self.name}{weight}{bits}{page}{rule}"


@dataclass(frozen=True)
class Case:
    """One row to be measured. ``budget`` is the share of the context that is read exactly, anchors included."""

    context: int
    task: str
    budget: float
    selection: str
    completion: str

    def options(self, features_file: Path | None = None) -> RCTopKConfig:
        """The engine's options for it.

        Raises:
            ValueError: what an engine would refuse; or scores of another query, added up as a mass of this one.
        """
        learned = self.completion == LEARNED
        if self.selection == SnapKV.name and not learned and make_completion(self.completion).needs_mass:
            raise ValueError(
                f"completion {self.completion} adds up scores of this query, which {SnapKV.name} has none of; take "
                f"{Selection(SnapKV.name).completion} or none"
            )
        return Selection.parse(self.selection).options(
            budget=int(self.context * self.budget),
            completion=self.completion,
            features_file=str(features_file) if learned else None,
        )


def cases(
    context: int,
    task: str,
    budgets: Iterable[float],
    selections: Iterable[str],
    completions: Iterable[str] | None,
) -> Iterator[Case]:
    """All rows of one task and context, dense first. Without completions, those of ``usual_completions``."""
    yield Case(context, task, 1.0, DENSE, DENSE)
    for budget in budgets:
        for selection in selections:
            for completion in completions or usual_completions(selection):
                yield Case(context, task, budget, selection, completion)


def usual_completions(selection: str) -> list[str]:
    """Selection alone, and the completion that it comes with."""
    return ["none", Selection.parse(selection).completion]


@dataclass(frozen=True)
class Shapes:
    """What a setting needs to know about the model."""

    layers: int
    heads: int
    head_size: int
    features: list[Features] | None

    def completions(self, name: str) -> list[Completion]:
        """One per layer."""
        if name == "features":
            assert self.features is not None
            return list(self.features)
        return [make_completion(name)] * self.layers

    def settings(self, case: Case) -> list[Setting]:
        """One setting per layer."""
        selection = Selection.parse(case.selection)
        options = selection.options(budget=int(case.context * case.budget))
        geometry = options.geometry()
        policy = SnapKV() if selection.name == SnapKV.name else make_policy(selection.name, selection.weight)
        return [
            Setting(geometry, policy, options.group_rule, completion, options.stored_bits)
            for completion in self.completions(case.completion)
        ]

    def reads(self, case: Case, window: int) -> dict[str, float]:
        """Token-equivalents that one query reads, by kind, K and V at 16 bits.

        Args:
            window: tokens decoded after the prompt, for ``snapkv``, which goes on reading them.
        """
        if case.selection == DENSE:
            return {"tokens": float(case.context), "statistics": 0.0, "summary": 0.0}
        setting = self.settings(case)[0]
        layout = StoreLayout(
            heads=self.heads,
            head_size=self.head_size,
            kv_bytes=2,
            slots=1,
            statistics_bits=setting.statistics_bits,
            geometry=setting.geometry,
            policy=make_policy(RCTopKConfig.selection)
            if isinstance(setting.policy, SnapKV)
            else setting.policy,
            completion=setting.completion,
        )
        reads = layout.token_equivalents(case.context)
        if isinstance(setting.policy, SnapKV):
            reads["statistics"] = 0.0
            # Its pages at the end of the prompt, and half of what is decoded after, on average.
            reads["tokens"] = setting.geometry.tokens_read(case.context - window) + window / 2
        return reads


def row(model: str, case: Case, result: Result, reads: dict[str, float]) -> dict[str, Any]:
    """What is written of one case. ``score`` is the exact match of the answers, for plain text the share of tokens."""
    score = result.accuracy if case.task == HELD_OUT else result.exact

    def interval(estimate: Estimate) -> list[float]:
        return [round(estimate.low, 5), round(estimate.high, 5)]

    return {
        "model": model,
        **asdict(case),
        "kl": round(result.kl.mean, 5),
        "kl_interval": interval(result.kl),
        "score": round(score.mean, 4),
        "score_interval": interval(score),
        "loss": round(result.loss.mean, 5),
        "loss_interval": interval(result.loss),
        "token_equivalents": round(sum(reads.values()), 1),
        "reads": {kind: round(tokens, 1) for kind, tokens in reads.items()},
        "n": result.samples,
        "positions": result.positions,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }


def published(entry: dict[str, Any]) -> dict[str, Any]:
    """A row with what is shipped marked: its completion is called ``default``, its estimator keeps the name."""
    shipped = entry["selection"] != DENSE and Selection.parse(entry["selection"]).completion
    completion = "default" if entry["completion"] == shipped else entry["completion"]
    marks = {
        "default_selection": entry["selection"] == RCTopKConfig.selection,
        "estimator": entry["completion"],
    }
    return {**entry, **marks, "completion": completion}


class Journal:
    """Finished rows, one JSON line each, so that a run that was stopped goes on where it was."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """``header`` says what the rows depend on; a journal with another header is refused."""
        self.path, self.header = path, header
        self.rows: dict[Case, dict[str, Any]] = {}
        # Lines that were not finished when the run was ended are measured again.
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text or not whole:
            path.write_text(whole or json.dumps(header) + "\n")
        if not whole:
            return
        first, *lines = whole.splitlines()
        if json.loads(first) != json.loads(json.dumps(header)):
            raise ValueError(
                f"{path} was made with other arguments ({first}); delete it or choose another --out"
            )
        for line in lines:
            entry = json.loads(line)
            self.rows[_case(entry)] = entry

    @classmethod
    def open(cls, path: Path) -> Journal:
        """A journal that there is, whatever its arguments were.

        Raises:
            FileNotFoundError: there is none, or nothing in it.
        """
        with path.open() as file:
            if not (first := file.readline()):
                raise FileNotFoundError(f"{path} is empty")
            return cls(path, json.loads(first))

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.rows[_case(entry)] = entry


def _case(entry: dict[str, Any]) -> Case:
    return replace(Case(0, "", 0.0, "", ""), **{name: entry[name] for name in Case.__dataclass_fields__})
