"""Write ``deploy/grafana/dashboard.json`` with Grafana's own typed builders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from tools.generated import write_or_check

FILE = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboard.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OURS, VLLM = "vllm_rc_topk", "vllm"


class Query(NamedTuple):
    """A line, or with labels in the legend several."""

    legend: str
    promql: str


class Panel(NamedTuple):
    """A time series. ``unit`` is Grafana's name of it."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]


def rate(name: str) -> str:
    """Increase per second of a counter, over all servers that are selected."""
    return f'sum(rate({name}_total{{instance=~"$instance"}}[$__rate_interval]))'


def share(parts: Sequence[str], whole: Sequence[str]) -> str:
    """A quotient of sums of counters' rates."""
    top, bottom = (" + ".join(rate(f"{OURS}_{name}") for name in names) for names in (parts, whole))
    return f"({top}) / ({bottom})"


def gauge(name: str) -> str:
    """A gauge of vLLM's, per server."""
    return f'{VLLM}:{name}{{instance=~"$instance"}}'


def quantiles(histogram: str) -> list[Query]:
    """Median and 99th percentile of a histogram of vLLM's."""
    buckets = f'sum by (le) (rate({VLLM}:{histogram}_bucket{{instance=~"$instance"}}[$__rate_interval]))'
    return [Query(f"p{q}", f"histogram_quantile({q / 100}, {buckets})") for q in (50, 99)]


READS = ("tokens_read", "statistics_read_token_equivalents", "summary_read_token_equivalents")

ROWS = {
    "What rc_topk reads": [
        Panel(
            "Reads against dense attention",
            "Bytes that decode attention read of what dense attention would have read. 100 %: no gain.",
            "percentunit",
            [
                Query("everything", share(READS, ["tokens_held"])),
                Query("exact tokens alone", share(READS[:1], ["tokens_held"])),
            ],
        ),
        Panel(
            "Reads by kind",
            "Token-equivalents (bytes of one token's K and V) per second, per KV head and layer.",
            "short",
            [
                Query("exact tokens", rate(f"{OURS}_{READS[0]}")),
                Query("page statistics", rate(f"{OURS}_{READS[1]}")),
                Query("summaries", rate(f"{OURS}_{READS[2]}")),
                Query("dense attention would read", rate(f"{OURS}_tokens_held")),
            ],
        ),
        Panel(
            "Dense decode steps",
            "Share of decoded tokens whose context fits the budget or is below dense_threshold.",
            "percentunit",
            [Query("dense", share(["dense_rows"], ["dense_rows", "sparse_rows"]))],
        ),
        Panel(
            "Estimated share of the softmax mass",
            "Mean share of the attention that was estimated instead of read. High: raise the budget.",
            "percentunit",
            [Query("estimated", share(["residual_share_sum"], ["residual_samples"]))],
        ),
        Panel(
            "Sparse decodes without a summary",
            "Those drop the mass that they did not read. Not zero: raise summary_slots.",
            "percentunit",
            [Query("without a summary", share(["missing_summaries"], ["sparse_rows"]))],
        ),
        Panel(
            "Summaries built",
            "By decodes, from all pages: prefill left none, or its slot was taken since. Many: raise summary_slots.",
            "short",
            [Query("built", rate(f"{OURS}_summaries_built"))],
        ),
        Panel(
            "Pages found on the device",
            "With kv_residency=host: share of the pages read that needed no trip to host memory.",
            "percentunit",
            [Query("found", share(["pages_found"], ["pages_wanted"]))],
        ),
        Panel(
            "Fetched from host memory",
            "With kv_residency=host: bytes per second that decoding read over the bus.",
            "Bps",
            [Query("fetched", rate(f"{OURS}_host_bytes_fetched"))],
        ),
        Panel(
            "Pages that gave way",
            "With kv_residency=host: pages of single KV heads per second that others replaced on the device.",
            "short",
            [Query("evicted", rate(f"{OURS}_pages_evicted"))],
        ),
    ],
    "vLLM": [
        Panel("Time to first token", "", "s", quantiles("time_to_first_token_seconds")),
        Panel("Time per output token", "", "s", quantiles("request_time_per_output_token_seconds")),
        Panel("Request latency", "", "s", quantiles("e2e_request_latency_seconds")),
        Panel(
            "Throughput",
            "Tokens per second.",
            "short",
            [
                Query("generated", rate(f"{VLLM}:generation_tokens")),
                Query("prompt", rate(f"{VLLM}:prompt_tokens")),
            ],
        ),
        Panel(
            "Requests",
            "",
            "short",
            [
                Query("running, {{instance}}", gauge("num_requests_running")),
                Query("waiting, {{instance}}", gauge("num_requests_waiting")),
            ],
        ),
        Panel(
            "KV cache in use",
            "",
            "percentunit",
            [Query("{{instance}}", gauge("kv_cache_usage_perc"))],
        ),
        Panel(
            "Preemptions",
            "Sequences thrown out of a full KV cache per second, to be computed again.",
            "short",
            [Query("preemptions", rate(f"{VLLM}:num_preemptions"))],
        ),
        Panel(
            "Prefix cache hits",
            "Share of prompt tokens found in the KV cache.",
            "percentunit",
            [Query("hits", f"{rate(f'{VLLM}:prefix_cache_hits')} / {rate(f'{VLLM}:prefix_cache_queries')}")],
        ),
    ],
}


def panel(number: int, spec: Panel) -> timeseries.Panel:
    """Grafana's panel; three in a row of the grid."""
    built = timeseries.Panel().id(number).title(spec.title).description(spec.description).unit(spec.unit)
    built.datasource(SOURCE).span(8).height(8).min(0)
    legend = common.VizLegendOptions().show_legend(True)
    built.legend(legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
    for letter, query in zip(ascii_uppercase, spec.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.promql).legend_format(query.legend)
        built.with_target(target)
    return built


def page() -> str:
    """The whole dashboard as JSON."""
    built = (
        dashboard.Dashboard("vLLM with rc_topk")
        .uid("vllm-rc-topk")
        .description("What sparse decode reads and estimates, beside vLLM's own latency and throughput.")
        .tags(["vllm", "rc_topk"])
        .timezone("browser")
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("instance")
            .datasource(SOURCE)
            .query(f"label_values({VLLM}:num_requests_running, instance)")
            .multi(True)
            .all_value(".+")
            .include_all(True)
        )
    )
    numbers = count(1)
    for title, panels in ROWS.items():
        built.with_row(dashboard.Row(title).id(next(numbers)))
        for spec in panels:
            built.with_panel(panel(next(numbers), spec))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(FILE, page, __doc__))
