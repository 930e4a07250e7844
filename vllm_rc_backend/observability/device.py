"""Brings the kernels' counters to the host without ever waiting for the device."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from vllm_rc_backend.attention_triton import COUNTERS
from vllm_rc_backend.host_kv.page_cache import COUNTERS as PAGE_COUNTERS
from vllm_rc_backend.host_kv.page_cache import DevicePages
from vllm_rc_backend.kernels.reference import Traffic
from vllm_rc_backend.observability import meter
from vllm_rc_backend.observability.meter import Counts
from vllm_rc_backend.side_store import StoreLayout

INTERVAL = 0.01
"""Seconds between copies: a copy costs the host about as much as a kernel launch, and nobody reads more often."""


class DeviceMeter:
    """Copies the counters to pinned memory now and then; whoever reads that sees the last copy that has finished.

    Args:
        counters: int64 ``[len(COUNTERS)]`` on the device, totals over rows and layers.
        layout: of the layers that add to them.
        layers: how many add to them; the meter counts per layer.
        pages: with the KV pages in host memory, the page caches; otherwise None.
    """

    def __init__(self, counters: Tensor, layout: StoreLayout, layers: int, pages: DevicePages | None) -> None:
        self.counters = counters
        self.layout = layout
        self.layers = layers
        self.host = torch.zeros(len(COUNTERS), dtype=torch.int64, pin_memory=True)
        self.pages = None if pages is None else pages.counters
        self.host_pages = torch.zeros(len(PAGE_COUNTERS), dtype=torch.int64, pin_memory=True)
        self.due = 0.0
        meter.get().source = self.totals

    def step(self) -> None:
        """Called once a step, from the host; never waits."""
        now = time.monotonic()
        if now < self.due or torch.cuda.is_current_stream_capturing():
            return
        self.due = now + INTERVAL
        self.host.copy_(self.counters, non_blocking=True)
        if self.pages is not None:
            self.host_pages.copy_(self.pages, non_blocking=True)
        meter.get().log()

    def totals(self) -> Counts:
        """Totals per layer; of the page caches over all layers."""
        return self.read(self.host).with_pages(self.layout, Traffic(*self.host_pages.tolist()))

    def read(self, counters: Tensor) -> Counts:
        """Totals per layer, from the counters on the host."""
        totals = dict(zip(COUNTERS, counters.tolist(), strict=True))
        per_layer = {name: total / self.layers for name, total in totals.items()}
        page = self.layout.statistics_bytes / self.layout.token_bytes
        summary = self.layout.completion.tokens_read(self.layout.head_size) * 2 / self.layout.kv_bytes
        with_summary = per_layer["sparse_rows"] - per_layer["rows_without_summary"]
        return Counts(
            sparse_rows=round(per_layer["sparse_rows"]),
            dense_rows=round(per_layer["dense_rows"]),
            missing_summaries=round(per_layer["rows_without_summary"]) if self.layout.slots else 0,
            summaries_built=round(per_layer["summaries_built"]),
            tokens_held=round(per_layer["tokens_held"]),
            tokens_read=round(per_layer["tokens_read"]),
            statistics_equivalents=per_layer["pages_scored"] * page,
            summary_equivalents=with_summary * summary,
            residual_share=totals["residual_share_millionths"] / 1e6,
            residual_samples=totals["sparse_rows"],
        )
