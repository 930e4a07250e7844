"""The ``rc-topk`` script itself."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from vllm_rc_backend import cli


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)
    assert cli.main(["evil"]) == 2
    assert "unknown command 'evil'" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    for module in [m for m in sys.modules if m.startswith("vllm_rc_backend.evaluation")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert cli.main(["eval"]) == 1
    assert "matplotlib is not installed; it comes with the extra `eval`" in capsys.readouterr().err
