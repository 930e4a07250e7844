"""Shared by all layers of tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# Shared machines are slow at times: a deadline would fail tests for that. Derandomised: CI fails the same way twice.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("project")


EXAMPLE_MODEL = Path(__file__).parents[1] / "examples" / "model"


@pytest.fixture(scope="session")
def corpus() -> list[int]:
    """Tokens of Python source, of any length a test may want: this interpreter's own library."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    library = Path(os.__file__).parent
    text = "".join((library / name).read_text() for name in ("argparse.py", "ast.py", "dis.py", "enum.py"))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="session")
def prompt(corpus: list[int]) -> Callable[..., dict[str, list[int]]]:
    """A prompt of ``length`` tokens, BOS included; ``seed`` chooses where in the corpus it begins."""

    def make(length: int, seed: int = 0) -> dict[str, list[int]]:
        start = seed * 1009 % (len(corpus) - length)
        return {"prompt_token_ids": [0, *corpus[start : start + length - 1]]}

    return make
