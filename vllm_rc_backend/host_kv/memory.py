"""How much host memory this process may still take: the machine's, or its container's if that is less."""

from __future__ import annotations

from pathlib import Path

from vllm_rc_backend.config import OptionError

GIB = 2**30

RESERVE = GIB
"""Left to the rest of the machine: pinned memory can be neither swapped nor reclaimed."""

CONTAINER = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, usage, and the part of it that the kernel gives back when asked (files read long ago), by kind of cgroup."""


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be taken without swapping. Linux alone has these files.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    free = [available]
    for limit, usage, reclaimable in CONTAINER:
        file = root / "sys/fs/cgroup" / limit
        if not file.exists() or not (text := file.read_text().strip()).isdigit():  # "max": none
            continue
        stat = dict(line.split() for line in (file.parent / "memory.stat").read_text().splitlines())
        used = int((root / "sys/fs/cgroup" / usage).read_text()) - int(stat[reclaimable])
        free.append(max(int(text) - used, 0))
    return min(free)


def spare_bytes() -> int:
    """Bytes of host memory that a pool may take."""
    return max(free_bytes() - RESERVE, 0)


def check(host_kv_gib: float, ranks: int, spare: int) -> None:
    """Refuse a pool that the host has no memory for.

    Args:
        host_kv_gib: wanted by each rank.
        ranks: of this engine on this machine.
        spare: see ``spare_bytes``.

    Raises:
        OptionError: what is needed and what is free.
    """
    needed = host_kv_gib * ranks * GIB
    if needed > spare:
        raise OptionError(
            "host_kv_gib",
            host_kv_gib,
            f"at most {spare / ranks / GIB:.1f} on this machine now",
            f"{ranks} rank(s) need {needed / GIB:.1f} GiB of host memory and {spare / GIB:.1f} GiB can be spared: "
            "lower host_kv_gib, or end what else takes memory.",
        )
