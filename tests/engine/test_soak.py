"""A short form of `make soak`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console

from tools import soak

from ..serving import serving


def test_forty_seconds_of_everything(tmp_path: Path) -> None:
    with serving(tmp_path / "log", soak.OPTIONS, *soak.ARGUMENTS, **soak.ENVIRONMENT) as server:
        record, problems = asyncio.run(soak.load(server, 40, 64, Console(quiet=True)))
    assert not problems
    assert len(record.requests) == 9
    assert record.requests.total() > 64


def test_growth_is_found() -> None:
    """The rule itself, on made-up samples: a leak and a burst that does not come back."""
    mebibyte = 1 << 20
    leak = [{"worker": (1000 + second) * mebibyte, "server": 500 * mebibyte} for second in range(90)]
    assert soak.grown(leak) == ["worker grew after warm-up, from 1014 to 1074 MiB"]
    burst = [{"worker": (1200 if second == 50 else 1000) * mebibyte} for second in range(90)]
    assert soak.grown(burst) == []


def test_memory_is_judged_after_warm_up_only() -> None:
    """A slow machine's forty seconds hold a few hundred requests, after which the allocators still take more."""
    sample = {"worker": 1 << 30}
    slow = [soak.Sample(4 * second, sample) for second in range(100)]
    assert soak.Record(memory=slow).warm == []
    assert soak.grown([]) == []
    fast = [soak.Sample(10 * second, sample) for second in range(100 + soak.SAMPLES)]
    assert soak.Record(memory=fast).warm == [sample] * soak.SAMPLES
    assert soak.Record(memory=fast[:-1]).warm == []
