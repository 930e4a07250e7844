"""Counts tokens held and read by decode steps in this process, and says so periodically."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from vllm_rc_backend.kernels.reference import Traffic
from vllm_rc_backend.side_store import StoreLayout

if TYPE_CHECKING:
    from vllm_rc_backend.attention import Batch

logger = logging.getLogger("vllm.rc_topk")


@dataclass
class Counts:
    """Totals over decode rows, per KV head and sparse layer, in tokens (token-equivalents where so named).

    ``pages_*`` and ``host_bytes_fetched`` are over all KV heads and layers of a rank, with kv_residency=host.
    """

    sparse_rows: int = 0
    dense_rows: int = 0
    missing_summaries: int = 0
    summaries_built: int = 0
    tokens_held: int = 0
    tokens_read: int = 0
    statistics_equivalents: float = 0.0
    summary_equivalents: float = 0.0
    residual_share: float = 0.0
    residual_samples: int = 0
    pages_wanted: int = 0
    pages_found: int = 0
    pages_evicted: int = 0
    host_bytes_fetched: int = 0

    def copy(self) -> Counts:
        """A snapshot."""
        return replace(self)

    def since(self, earlier: Counts) -> Counts:
        """The difference of two snapshots."""
        return Counts(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def with_pages(self, layout: StoreLayout, traffic: Traffic) -> Counts:
        """These, and what page caches were asked for."""
        return replace(
            self,
            pages_wanted=self.pages_wanted + traffic.wanted,
            pages_found=self.pages_found + traffic.hits,
            pages_evicted=self.pages_evicted + traffic.evictions,
            host_bytes_fetched=self.host_bytes_fetched
            + traffic.tokens_fetched * layout.token_bytes // layout.heads,
        )

    def sentence(self) -> str:
        """What was read, in words."""
        held = max(self.tokens_held, 1)
        everything = self.tokens_read + self.statistics_equivalents + self.summary_equivalents
        text = (
            f"read {self.tokens_read} of {self.tokens_held} tokens ({100 * self.tokens_read / held:.1f} %), "
            f"{everything:.0f} token-equivalents with statistics and summaries ({100 * everything / held:.1f} %); "
            f"{self.sparse_rows} sparse and {self.dense_rows} dense decode rows"
        )
        if self.residual_samples:
            text += f"; estimated share of the softmax mass {self.residual_share / self.residual_samples:.3f}"
        if self.missing_summaries:
            text += f"; {self.missing_summaries} rows without a summary (raise summary_slots)"
        if self.pages_wanted:
            text += (
                f"; {100 * self.pages_found / self.pages_wanted:.1f} % of the pages were on the device, "
                f"{self.host_bytes_fetched / 2**20:.1f} MiB came from the host, {self.pages_evicted} pages gave way"
            )
        return text


@dataclass
class Meter:
    """Counters of this process and the periodic log line.

    Attributes:
        interval: seconds between log lines; 0 for none.
        counts: what ``step`` counted.
        source: where a device counts instead.
    """

    interval: float = 10.0
    counts: Counts = field(default_factory=Counts)
    source: Callable[[], Counts] | None = None
    _logged: Counts = field(default_factory=Counts)
    _next: float = 0.0

    def totals(self) -> Counts:
        """A snapshot of what was counted since the start."""
        return self.counts.copy() if self.source is None else self.source()

    def step(self, layout: StoreLayout, batch: Batch, sparse: list[int]) -> None:
        """Count one step's decode rows."""
        counts, chosen = self.counts, set(sparse)
        for row, (seq_len, query_len) in enumerate(zip(batch.seq_lens, batch.query_lens, strict=True)):
            if query_len != 1:
                continue
            read = layout.token_equivalents(seq_len)
            counts.tokens_held += seq_len
            counts.tokens_read += int(read["tokens"])
            counts.statistics_equivalents += read["statistics"]
            counts.summary_equivalents += read["summary"]
            counts.sparse_rows += row in chosen
            counts.dense_rows += row not in chosen
            if row in chosen and batch.plan is not None:
                counts.missing_summaries += int(batch.plan.slot[row]) < 0
                counts.summaries_built += bool(batch.plan.built[row])
        self.log()

    def residual(self, share: float) -> None:
        """Count the residual's share of one row's softmax mass in one layer."""
        self.counts.residual_share += share
        self.counts.residual_samples += 1

    def pages(self, layout: StoreLayout, traffic: Traffic) -> None:
        """Count what one layer's page cache was asked for."""
        self.counts = self.counts.with_pages(layout, traffic)

    def log(self) -> None:
        """Log what was read since the last line, if the interval has passed and anything was decoded."""
        now = time.monotonic()
        if not self.interval or now < self._next:
            return
        totals = self.totals()
        since = totals.since(self._logged)
        if since.sparse_rows + since.dense_rows:
            logger.info("rc_topk: %s", since.sentence())
            self._logged = totals
            self._next = now + self.interval


@functools.cache
def get() -> Meter:
    """The meter of this process."""
    return Meter()
