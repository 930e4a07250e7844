"""``python -m vllm_rc_backend.evaluation.host_kv``: KV pages in host memory beside all pages on the device.

Decode and prefill times as in ``end_to_end.py``; each engine runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from vllm_rc_backend.evaluation.end_to_end import Load, measure
from vllm_rc_backend.observability import meter


def run(options: dict[str, Any], loads: list[Load], utilization: float, repeats: int) -> dict[str, Any]:
    """One engine in this process: ``end_to_end.measure``'s rows, and what its page cache was asked for in all steps."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the engine's counters are this process's
    found: dict[str, Any] = measure("RC_TOPK", loads, options, utilization, repeats)
    counts = meter.get().totals()
    if counts.pages_wanted:
        found["hit_rate"] = counts.pages_found / counts.pages_wanted
        found["host_bytes_per_token"] = counts.host_bytes_fetched / counts.sparse_rows
        found["evictions"] = counts.pages_evicted
    return found


def main() -> None:
    """Compare, and print a JSON object a residency."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=[Load(65536, 4)])
    parser.add_argument("--options", type=json.loads, default={}, help="of both, as JSON")
    parser.add_argument("--host-kv-gib", type=float, default=48)
    parser.add_argument("--page-cache-gib", type=float, help="default: what is left on the device")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--residency", choices=("gpu", "host"), help="one of them, in this process")
    args = parser.parse_args()
    if args.residency is None:
        for residency in ("host", "gpu"):
            command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--residency", residency]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(
                json.dumps({"residency": residency, **json.loads(done.stdout.splitlines()[-1])}), flush=True
            )
        return
    options = args.options
    if args.residency == "host":
        options |= {"kv_residency": "host", "host_kv_gib": args.host_kv_gib}
        if args.page_cache_gib is not None:
            options["page_cache_gib"] = args.page_cache_gib
    print(json.dumps(run(options, args.loads, args.gpu_memory_utilization, args.repeats)))


if __name__ == "__main__":
    main()
