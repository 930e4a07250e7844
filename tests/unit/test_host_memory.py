"""What the host has left, and the refusal that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_rc_backend.config import OptionError
from vllm_rc_backend.host_kv.memory import RESERVE, check, free_bytes, spare_bytes


def machine(root: Path, files: dict[str, str]) -> Path:
    """A machine with 8 MiB available, and these files."""
    for name, text in {
        "proc/meminfo": "MemTotal: 9999 kB\nMemAvailable:  8192 kB\nX: 1 kB\n",
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_machines_own_memory(tmp_path: Path) -> None:
    assert free_bytes(machine(tmp_path, {})) == 8 << 20


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "free"),
    [
        (str(6 << 20), str(4 << 20), "anon 3\ninactive_file 1048576\n", 3 << 20),
        (str(64 << 20), str(4 << 20), "inactive_file 0\n", 8 << 20),
        (str(2 << 20), str(4 << 20), "inactive_file 0\n", 0),
        ("max\n", "5", "", 8 << 20),
    ],
)
def test_a_container_may_have_less(tmp_path: Path, limit: str, usage: str, stat: str, free: int) -> None:
    files = {"memory.max": limit, "memory.current": usage, "memory.stat": stat}
    assert free_bytes(machine(tmp_path, {f"sys/fs/cgroup/{n}": t for n, t in files.items()})) == free


def test_a_container_of_the_first_kind(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": str(6 << 20),
        "memory.usage_in_bytes": str(5 << 20),
        "memory.stat": "total_inactive_file 1048576\n",
    }
    assert (
        free_bytes(machine(tmp_path, {f"sys/fs/cgroup/memory/{n}": t for n, t in files.items()})) == 2 << 20
    )


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/slice/job", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "3:cpu,cpuacct:/other\n4:memory:/slice/job",
            "memory/",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["second kind", "first kind"],
)
@pytest.mark.parametrize("level", ["slice", "slice/job", "elsewhere"])
def test_a_limit_some_levels_down(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str], level: str
) -> None:
    limit, usage, reclaimable = names
    files = {limit: str(5 << 20), usage: str(3 << 20), "memory.stat": f"{reclaimable} 0\n"}
    where = {f"sys/fs/cgroup/{folder}{level}/{name}": text for name, text in files.items()}
    found = free_bytes(machine(tmp_path, {"proc/self/cgroup": line + "\n", **where}))
    assert found == (8 << 20 if level == "elsewhere" else 2 << 20)


def test_this_machine_has_some() -> None:
    assert free_bytes() > 0
    assert spare_bytes() <= free_bytes()


def test_something_is_left_to_the_rest_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, spare in ((3 * RESERVE, 2 * RESERVE), (RESERVE // 2, 0)):
        monkeypatch.setattr("vllm_rc_backend.host_kv.memory.free_bytes", lambda free=free: free)
        assert spare_bytes() == spare


def test_too_much_is_refused_with_both_figures() -> None:
    check(4.0, 2, 8 << 30)
    with pytest.raises(OptionError, match=r"host_kv_gib: got 5; allowed: at most 4\.0 ") as error:
        check(5, 2, 8 << 30)
    assert "2 rank(s) need 10.0 GiB of host memory and 8.0 GiB can be spared" in str(error.value)
