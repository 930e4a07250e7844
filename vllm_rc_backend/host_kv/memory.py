"""How much host memory this process may still take: the machine's, or its container's if that is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_rc_backend.config import OptionError

GIB = 2**30

RESERVE = GIB
"""Left to the rest of the machine: pinned memory can be neither swapped nor reclaimed."""

CGROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller, as ``/proc/self/cgroup`` names it (of the second version none): folder, limit, usage, and the part of
it that the kernel gives back when asked (files read long ago)."""


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be taken without swapping. Linux alone has these files.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes that each cgroup around this process leaves it: its own, and all above that can be seen from here.

    A batch system or a service manager sets its limit some levels down; a container sees its own at the top.
    """
    file = root / "proc/self/cgroup"
    own = {"": "/", "memory": "/"}
    for line in file.read_text().splitlines() if file.exists() else ():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for controller, (mount, limit, usage, reclaimable) in CGROUPS.items():
        top = root / "sys/fs/cgroup" / mount
        inner = top / own[controller].strip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(top):
                break
            if not (folder / limit).exists() or not (text := (folder / limit).read_text().strip()).isdigit():
                continue  # none, or "max"
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / usage).read_text()) - int(stat[reclaimable])
            yield max(int(text) - used, 0)


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
