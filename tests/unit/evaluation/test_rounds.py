"""Rounds of answers, driven step by step: what is timed and counted."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rc_backend.evaluation.child import run_child
from vllm_rc_backend.evaluation.rounds import SETTLED, answer_all


class Engine:
    """Lets one more sequence in at each step, up to ``room`` at a time; each says ``params`` tokens, one a step."""

    def __init__(self, room: int) -> None:
        self.room, self.waiting, self.running = room, [], []
        self.steps = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: int) -> None:
        self.waiting.append((name, params))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Any]:
        self.steps += 1
        time.sleep(0.002)
        if self.waiting and len(self.running) < self.room:
            name, most = self.waiting.pop(0)
            self.running.append((name, most, []))
        for _, _, said in self.running:
            said.append(0)
        outputs = [
            SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=list(said))])
            for name, _, said in self.running
        ]
        self.running = [one for one in self.running if len(one[2]) < one[1]]
        return outputs


def test_all_decode_together() -> None:
    engine, settled = Engine(room=3), []
    found = answer_all(
        SimpleNamespace(llm_engine=engine), [[1], [2], [3]], 20, lambda: settled.append(engine.steps)
    )
    assert found.together == 3
    assert found.tokens == 60
    assert found.answers == [[0] * 20] * 3
    assert settled == [2 + SETTLED]
    assert len(found.steps) == 18 - SETTLED, "from the third step to the twentieth all three say something"
    assert all(step >= 0.002 for step in found.steps)
    assert 3 * 0.002 <= found.first < found.total
    assert found.total >= 22 * 0.002
    assert SETTLED * 0.002 <= found.settling < found.total


def test_they_never_do() -> None:
    found = answer_all(SimpleNamespace(llm_engine=Engine(room=2)), [[1], [2], [3]], 20, pytest.fail)
    assert found.together == 2
    assert found.steps == []
    assert found.tokens == 60


def test_what_a_child_prints_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talks.py").write_text(
        "import sys\nopen(sys.argv[-1], 'w').write('[1, 2]')\nprint('and more')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_child("talks", ["--loud"]) == [1, 2]
