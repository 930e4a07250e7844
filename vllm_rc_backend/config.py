"""Every option of the backend: its range, its default and its documentation, in one place.

``docs/options.md`` and the error messages are produced from the same field metadata.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from vllm_rc_backend.completion import KINDS, LEARNED
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.selection import POLICIES

KEY = "rc_topk"
"""The key of ``--additional-config`` under which the options stand."""


class OptionError(ValueError):
    """An option is unknown, out of range or contradicts another one."""

    def __init__(self, name: str, value: object, allowed: str, hint: str = "") -> None:
        message = f"--additional-config.{KEY}.{name}: got {value!r}; allowed: {allowed}."
        super().__init__(f"{message} {hint}".strip())


def _option(default: Any, allowed: str, doc: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "doc": doc})


GROUP_RULES = ("max", "mean", "sum", "softmax", "share")
KV_RESIDENCIES = ("gpu", "host")

_WITH_MASS = (
    "Policies whose scores estimate a page's mass: "
    f"{', '.join(sorted(n for n, p in POLICIES.items() if p.estimates_mass))}."
)


def default_completion(selection: str) -> str:
    """The completion that a selection policy comes with."""
    return "paged" if POLICIES[selection].estimates_mass else "linear"


@dataclass(frozen=True)
class RCTopKConfig:
    """Options of one engine. Immutable: every process derives the same object from the same JSON."""

    budget: float = _option(
        2048,
        "an integer from 1 up (tokens), or a share of the context in (0, 1)",
        "Tokens read exactly per query and KV head, anchors included. A share (1/32 = 0.03125) grows with the "
        "context; it never goes below the anchors and one page.",
    )
    sink_tokens: int = _option(
        16,
        "0 or a multiple of page_size",
        "First tokens of the sequence, always read exactly.",
    )
    tail_tokens: int = _option(
        16,
        "an integer from 2 up",
        "Last tokens of the sequence, always read exactly. The unfinished page is always part of the tail, which "
        "therefore holds between tail_tokens and tail_tokens + page_size - 1 tokens.",
    )
    page_size: int = _option(
        16,
        "16, 32, 64 or 128, a divisor of vLLM's block size",
        "Tokens per page, the unit of selection.",
    )
    selection: str = _option(
        "runs",
        ", ".join(sorted(POLICIES)),
        "How pages are scored.",
    )
    selection_weight: float | None = _option(
        None,
        "a number from 0 to 4, or null for the policy's own default",
        "Weight of the spread term of the page score: box 0.5 by default (1 is Quest's upper bound), mean_var 0.5.",
    )
    group_rule: str = _option(
        "max",
        ", ".join(GROUP_RULES),
        "How the page scores of the query heads that share a KV head become one list. share, the largest score after "
        "0.7 of the log-mass of all pages was taken off each head's, goes with policies whose scores estimate a page's "
        "mass (runs, moba, oracle); softmax runs on CPUs only.",
    )
    completion: str | None = _option(
        None,
        f"{', '.join(sorted(KINDS))}, or null for the best that goes with the selection policy",
        "How the softmax mass that was not read is estimated; none renormalises over what was read. By default paged "
        "with a policy whose scores estimate a page's mass (runs, moba, oracle), otherwise linear.",
    )
    features_file: str | None = _option(
        None,
        "the path of a file from rc-topk calibrate with completion=features, otherwise null",
        "The learned feature maps of this model.",
    )
    statistics_bits: int | None = _option(
        None,
        "8 or 16, with selection=runs also 2, or null for the policy's own default",
        "Bits per element of the page statistics, 2 by default for runs, 16 for others. They are read in full for "
        "every query and are the largest read at long context.",
    )
    dense_threshold: int = _option(
        0,
        "an integer from 0 up",
        "Sequences up to this many tokens are decoded densely even if they do not fit the budget.",
    )
    dense_layers: tuple[int, ...] = _option(
        (),
        "a list of layer indices",
        "Layers that stay dense, by their index in the model, from 0.",
    )
    summary_slots: int | None = _option(
        None,
        "an integer from 1 up, or null for as many sequences as --max-num-seqs and the KV pool allow to be sparse at a "
        "time",
        "Sequences whose summary is kept on the device. A sequence without a slot is decoded by selection alone, "
        "which is counted and reported. Many sequences that share a long prefix may be more than null counts with.",
    )
    kv_residency: str = _option(
        "gpu",
        ", ".join(KV_RESIDENCIES),
        "Where the KV pages live: in device memory, or in host memory with a cache of pages on the device "
        "(docs/host-kv.md).",
    )
    host_kv_gib: float | None = _option(
        None,
        "a number above 0 with kv_residency=host, otherwise null",
        "GiB of host memory for the KV pages of each rank; takes the place of --kv-cache-memory-bytes.",
    )
    page_cache_gib: float | None = _option(
        None,
        "a number from 0 up with kv_residency=host, otherwise null",
        "GiB of device memory for copies of KV pages on each rank; 0 for none, so that every page is read from the "
        "host. By default what is left under --gpu-memory-utilization (on CPUs an eighth of host_kv_gib).",
    )
    log_requests: bool = _option(
        False,
        "true or false",
        "Whether the API server logs for each finished request what its decode steps read.",
    )
    log_interval: float = _option(
        10.0,
        "seconds, 0 for never",
        "Interval of the log line that states what was read against what was held.",
    )

    def __post_init__(self) -> None:
        number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if (
            not number
            or not math.isfinite(self.budget)
            or self.budget <= 0
            or (self.budget >= 1 and self.budget != int(self.budget))
        ):
            raise OptionError("budget", self.budget, self._allowed("budget"))
        if type(self.page_size) is not int or self.page_size not in (16, 32, 64, 128):
            raise OptionError("page_size", self.page_size, self._allowed("page_size"))
        self._integer("sink_tokens", 0)
        if self.sink_tokens % self.page_size:
            raise OptionError(
                "sink_tokens",
                self.sink_tokens,
                self._allowed("sink_tokens"),
                f"page_size is {self.page_size}.",
            )
        # With 1 a page would be in the mid region in the step after its last token was written, of another sequence in
        # that very step: vLLM shares a block when it is scheduled.
        self._integer("tail_tokens", 2)
        self._integer("dense_threshold", 0)
        self._one_of("selection", sorted(POLICIES))
        self._one_of("group_rule", GROUP_RULES)
        if self.group_rule == "share" and not POLICIES[self.selection].estimates_mass:
            raise OptionError(
                "group_rule",
                self.group_rule,
                f"{', '.join(rule for rule in GROUP_RULES if rule != 'share')} with selection={self.selection}",
                _WITH_MASS,
            )
        if self.completion is not None:
            self._one_of("completion", sorted(KINDS))
        self._one_of("kv_residency", KV_RESIDENCIES)
        file = self.features_file
        if not (isinstance(file, str) and file if self.estimator == LEARNED else file is None):
            raise OptionError(
                "features_file",
                self.features_file,
                self._allowed("features_file"),
                f"completion is {self.estimator}.",
            )
        bits = self.statistics_bits
        if bits is not None and (
            type(bits) is not int or bits not in POLICIES[self.selection].statistics_bits
        ):
            hint = f"selection is {self.selection}."
            raise OptionError("statistics_bits", bits, self._allowed("statistics_bits"), hint)
        if KINDS[self.estimator].needs_mass and not POLICIES[self.selection].estimates_mass:
            raise OptionError(
                "completion",
                self.completion,
                f"{', '.join(sorted(n for n, c in KINDS.items() if not c.needs_mass))} with "
                f"selection={self.selection}",
                _WITH_MASS,
            )
        weight = self.selection_weight
        if weight is not None:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 4:
                raise OptionError("selection_weight", weight, self._allowed("selection_weight"))
            if not POLICIES[self.selection].takes_weight:
                raise OptionError(
                    "selection_weight",
                    weight,
                    f"null with selection={self.selection}",
                    f"Policies with a weight: {', '.join(sorted(n for n, p in POLICIES.items() if p.takes_weight))}.",
                )
        if self.summary_slots is not None:
            self._integer("summary_slots", 1)
            if self.completion == "none":
                raise OptionError("summary_slots", self.summary_slots, "null with completion=none")
        layers = self.dense_layers
        if not isinstance(layers, list | tuple) or not all(type(n) is int and n >= 0 for n in layers):
            raise OptionError("dense_layers", layers, self._allowed("dense_layers"))
        object.__setattr__(self, "dense_layers", tuple(layers))
        self._check_residency()
        if not isinstance(self.log_requests, bool):
            raise OptionError("log_requests", self.log_requests, self._allowed("log_requests"))
        interval = self.log_interval
        if (
            isinstance(interval, bool)
            or not isinstance(interval, int | float)
            or not 0 <= interval < math.inf
        ):
            raise OptionError("log_interval", interval, self._allowed("log_interval"))
        if 1 <= self.budget < self.smallest_budget:
            raise OptionError(
                "budget",
                self.budget,
                f"{self.smallest_budget} or more with sink_tokens={self.sink_tokens}, "
                f"tail_tokens={self.tail_tokens}, page_size={self.page_size}",
                "The anchors and one page must fit: lower sink_tokens or tail_tokens, or raise budget.",
            )

    def _check_residency(self) -> None:
        host = self.on_host
        hint = f"kv_residency is {self.kv_residency}."
        if host != (self.host_kv_gib is not None) or (host and not self._gib("host_kv_gib") > 0):
            raise OptionError("host_kv_gib", self.host_kv_gib, self._allowed("host_kv_gib"), hint)
        if self.page_cache_gib is not None and (not host or self._gib("page_cache_gib") < 0):
            raise OptionError("page_cache_gib", self.page_cache_gib, self._allowed("page_cache_gib"), hint)
        if not host:
            return
        if POLICIES[self.selection].reads_keys:
            raise OptionError(
                "kv_residency",
                "host",
                f"gpu with selection={self.selection}",
                "It reads every key of the context.",
            )
        if self.dense_layers:
            raise OptionError(
                "dense_layers",
                self.dense_layers,
                "[] with kv_residency=host",
                "A dense layer would read its whole context from the host at every token.",
            )

    def check_layers(self, count: int) -> None:
        """Hold ``dense_layers`` to a model of ``count`` layers.

        Raises:
            OptionError: one of them is not in the model.
        """
        if max(self.dense_layers, default=-1) >= count:
            raise OptionError(
                "dense_layers", list(self.dense_layers), f"layers 0 to {count - 1}, all that the model has"
            )

    @property
    def estimator(self) -> str:
        """The completion, that of the selection policy if none was named."""
        return self.completion or default_completion(self.selection)

    @property
    def on_host(self) -> bool:
        """Whether the KV pages live in host memory."""
        return self.kv_residency == "host"

    @property
    def stored_bits(self) -> int:
        """Bits per element of the page statistics."""
        return self.statistics_bits or POLICIES[self.selection].statistics_bits[0]

    def geometry(self, block_size: int | None = None) -> Geometry:
        """The regions of a sequence; without a block size, a page is a block."""
        return Geometry(
            page_size=self.page_size,
            block_size=block_size or self.page_size,
            sink_tokens=self.sink_tokens,
            tail_tokens=self.tail_tokens,
            budget=self.budget,
            dense_threshold=self.dense_threshold,
        )

    @property
    def smallest_budget(self) -> int:
        """Tokens of the anchors at their longest plus one page."""
        return self.sink_tokens + self.tail_tokens + 2 * self.page_size - 1

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> RCTopKConfig:
        """Build from the ``rc_topk`` object of ``--additional-config``.

        Raises:
            OptionError: an unknown key, a value out of range, or a contradiction; the message names the key, the
                value and what is allowed.
        """
        if not isinstance(options, Mapping):
            raise ValueError(
                f"--additional-config.{KEY}: got {options!r}; allowed: a JSON object such as "
                f'{{"budget": 2048}}. Known options: {", ".join(cls.names())}.'
            )
        for name, value in options.items():
            if name not in cls.names():
                close = difflib.get_close_matches(name, cls.names(), n=1)
                hint = f"Did you mean {close[0]}?" if close else ""
                raise OptionError(name, value, f"one of the options {', '.join(cls.names())}", hint)
        return cls(**options)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> RCTopKConfig:
        """Build from vLLM's whole ``additional_config``; without an ``rc_topk`` entry, the defaults.

        Raises:
            OptionError: see ``from_mapping``.
            ValueError: there is no such entry, but one of its options, or a name like it.
        """
        if not isinstance(additional_config, Mapping):
            return cls()
        if KEY not in additional_config:
            for name in map(str, additional_config):
                if name in cls.names() or name.lower().replace("-", "_").startswith(("rc_topk", "rctopk")):
                    raise ValueError(
                        f"--additional-config.{name}: got {additional_config[name]!r}; allowed: options of this "
                        f'backend in an object named {KEY}, such as {{"{KEY}": {{"budget": 2048}}}}.'
                    )
        return cls.from_mapping(additional_config.get(KEY, {}))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The options in order of documentation."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def table(cls) -> list[tuple[str, str, str, str]]:
        """Rows (option, default, allowed, documentation) for ``docs/options.md``."""
        return [(f.name, _default(f), f.metadata["allowed"], f.metadata["doc"]) for f in fields(cls)]

    def _allowed(self, name: str) -> str:
        return str(next(f for f in fields(self) if f.name == name).metadata["allowed"])

    def _gib(self, name: str) -> float:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OptionError(name, value, self._allowed(name))
        return value

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < low:
            raise OptionError(name, value, self._allowed(name))

    def _one_of(self, name: str, allowed: tuple[str, ...] | list[str]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, n=1)
            raise OptionError(name, value, ", ".join(allowed), f"Did you mean {close[0]}?" if close else "")


def _default(option: Field[Any]) -> str:
    assert option.default is not MISSING
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return {None: "null", (): "[]"}.get(option.default, str(option.default))
