"""Brings the counters of the worker processes to ``/metrics`` of the API server.

A worker's counters live in its own process, the server's ``/metrics`` in another, and vLLM has no channel for a plugin
between them. The first process that loads the plugin names a folder in the environment, which its children inherit;
every worker writes its totals there, and whichever process serves ``/metrics`` adds them up when it is scraped. With
several API servers vLLM sets up prometheus_client's multiprocess mode, which collects the workers' own counters: there
``Mirror`` is enough.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import platform
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from prometheus_client import REGISTRY, Counter
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from vllm_rc_backend.observability import meter
from vllm_rc_backend.observability.meter import Counts

logger = logging.getLogger("vllm.rc_topk")

RUN_DIR = "RC_TOPK_RUN_DIR"
"""The environment variable that names the folder. It reaches every process that vLLM starts."""

RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""vLLM's variable that names further variables for Ray's actors: its first Ray executor copies no others."""

INTERVAL = 1.0
"""Seconds between a worker's writes."""


@dataclass(frozen=True)
class Metric:
    """One time series: its name without ``_total``, its help, and what of the counts it shows."""

    name: str
    help: str
    field: str


METRICS = (
    Metric("vllm_rc_topk_sparse_rows", "Decoded tokens whose attention was sparse.", "sparse_rows"),
    Metric("vllm_rc_topk_dense_rows", "Decoded tokens that fell back to dense attention.", "dense_rows"),
    Metric(
        "vllm_rc_topk_missing_summaries",
        "Sparse decodes that had no summary slot and dropped the residual.",
        "missing_summaries",
    ),
    Metric(
        "vllm_rc_topk_summaries_built",
        "Summaries that a decode summed up from all pages, because prefill left none or its slot was taken since.",
        "summaries_built",
    ),
    Metric(
        "vllm_rc_topk_tokens_held",
        "Tokens in the contexts of decoded tokens: what dense attention reads per KV head and layer.",
        "tokens_held",
    ),
    Metric("vllm_rc_topk_tokens_read", "Tokens whose K and V were read exactly.", "tokens_read"),
    Metric(
        "vllm_rc_topk_statistics_read_token_equivalents",
        "Page statistics read, in tokens' worth of K and V bytes.",
        "statistics_equivalents",
    ),
    Metric(
        "vllm_rc_topk_summary_read_token_equivalents",
        "Summaries read, in tokens' worth of K and V bytes.",
        "summary_equivalents",
    ),
    Metric(
        "vllm_rc_topk_residual_share_sum",
        "Estimated share of the softmax mass that was not read, summed over samples.",
        "residual_share",
    ),
    Metric("vllm_rc_topk_residual_samples", "Samples in that sum.", "residual_samples"),
    Metric(
        "vllm_rc_topk_pages_wanted",
        "Pages of single KV heads that decoding read, with the KV pages in host memory.",
        "pages_wanted",
    ),
    Metric("vllm_rc_topk_pages_found", "Those of them that were on the device.", "pages_found"),
    Metric("vllm_rc_topk_pages_evicted", "Pages that gave way to others on the device.", "pages_evicted"),
    Metric(
        "vllm_rc_topk_host_bytes_fetched",
        "Bytes of pages that decode attention fetched from host memory.",
        "host_bytes_fetched",
    ),
)


class RunDirCollector(Collector):
    """Sums what the workers of this server, past ones included, have written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called by prometheus_client at each scrape."""
        total = Counts()
        for file in sorted(self.folder.glob("*.json")):
            written = json.loads(file.read_text())
            for name in (f.name for f in fields(Counts)):
                setattr(total, name, getattr(total, name) + written[name])
        for metric in METRICS:
            yield CounterMetricFamily(metric.name, metric.help, value=getattr(total, metric.field))


@functools.cache
def offer() -> None:
    """In every process that loads the plugin: show what the workers have written, in case this one serves /metrics.

    The first of them names the folder and removes it at its end. Nothing is created yet.
    """
    if RUN_DIR not in os.environ:
        # Not the process id alone: a container's is the same after each restart, and nobody else must guess the name.
        folder = Path(tempfile.gettempdir()) / f"{_prefix()}{os.getpid()}-{secrets.token_hex(8)}"
        os.environ[RUN_DIR] = str(folder)
        os.environ[RAY_COPIES] = ",".join(filter(None, (os.environ.get(RAY_COPIES), RUN_DIR)))
        atexit.register(_remove, folder, os.getpid())
    REGISTRY.register(RunDirCollector(Path(os.environ[RUN_DIR])))


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in forked children
        shutil.rmtree(folder, ignore_errors=True)


def _prefix() -> str:
    """Begins the name of a folder made on this machine."""
    return f"rc-topk-{platform.node()}-"


class Mirror:
    """The counts as prometheus_client counters of this process, for its multiprocess mode."""

    def __init__(self) -> None:
        # In no registry: multiprocess mode collects from files, and this process's registry has these names already.
        self.counters = {m.field: Counter(m.name, m.help, registry=None) for m in METRICS}
        self.shown = Counts()

    def show(self, counts: Counts) -> None:
        """Raise the counters to these totals."""
        since = counts.since(self.shown)
        for name, counter in self.counters.items():
            counter.inc(max(getattr(since, name), 0))
        self.shown = counts


@functools.cache
def publish() -> None:
    """In a worker: write the meter's totals once a second while they change, from a thread of its own."""
    if not Path(os.environ.get(RUN_DIR, "")).name.startswith(_prefix()):
        logger.warning(
            "rc_topk: this worker runs on another machine than the API server; its counters are in its log, not on "
            "/metrics."
        )
        return
    threading.Thread(target=_publish, name="rc-topk-metrics", daemon=True).start()


def _publish() -> None:
    folder = Path(os.environ[RUN_DIR])
    mirror = Mirror() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
    written = Counts()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        time.sleep(INTERVAL)
        counts = meter.get().totals()
        if counts == written:
            continue
        written = counts
        partial = folder / f"{os.getpid()}.partial"
        try:
            partial.write_text(json.dumps(asdict(counts)))
        except FileNotFoundError:  # the server has ended and removed it; an orphan must not bring it back
            return
        partial.rename(folder / f"{os.getpid()}.json")  # atomic: a scrape never sees half a file
        if mirror is not None:
            mirror.show(counts)
