"""Text to build contexts from: files of the user's, or the sources of installed packages."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

HELD_OUT_PACKAGES = (
    "networkx",
    "gpytorch",
    "rich",
    "optax",
    "hypothesis",
    "numpyro",
    "fontTools",
    "vllm",
    "ray",
)
"""Packages that this project's small models never saw in training; those that are installed are used."""

TEXT_SUFFIXES = {".py", ".txt", ".md", ".rst"}
SMALLEST_FILE, LARGEST_FILE = 2_000, 200_000
"""Bytes. Short files say too little, and the longest are tables."""


class Corpus:
    """Documents and the model's tokenizer."""

    def __init__(self, model: Path, documents: list[Path], seed: int = 0) -> None:
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.documents = documents
        random.Random(seed).shuffle(self.documents)

    @classmethod
    def installed(cls, model: Path, seed: int = 0) -> tuple[Corpus, list[str]]:
        """Held-out packages that are installed here, and their names."""
        folders = dict(_package_folders(HELD_OUT_PACKAGES))
        return cls(model, [file for folder in folders.values() for file in text_files(folder)], seed), list(
            folders
        )

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def bos(self) -> list[int]:
        """What the tokenizer puts before a text."""
        return self.tokenizer.encode("").ids

    @cached_property
    def words(self) -> list[str]:
        """Words of 4 to 9 lower-case letters that are one token, with their leading space."""
        vocabulary = sorted(self.tokenizer.get_vocab(with_added_tokens=False))
        return [" " + token[1:] for token in vocabulary if re.fullmatch("[Ġ▁][a-z]{4,9}", token)]

    def stream(self, rng: random.Random) -> Iterator[list[int]]:
        """Documents as token ids, without end, from a random place on."""
        first = rng.randrange(len(self.documents))
        while True:
            for place in range(len(self.documents)):
                yield self._document((first + place) % len(self.documents))

    def _document(self, index: int) -> list[int]:
        cache = self._tokens
        if index not in cache:
            cache[index] = self.encode(self.documents[index].read_text(errors="replace"))
        return cache[index]

    @cached_property
    def _tokens(self) -> dict[int, list[int]]:
        return {}

    def passage(self, length: int, rng: random.Random) -> list[int]:
        """``length`` tokens of consecutive documents, BOS first."""
        tokens = list(self.bos)
        for document in self.stream(rng):
            tokens += document
            if len(tokens) >= length:
                return tokens[:length]
        raise AssertionError("the stream has no end")

    def lines(self, length: int, rng: random.Random) -> list[list[int]]:
        """A passage of ``length`` tokens as lines; the last is cut to end there."""
        newline = self.encode("\n")[-1]
        tokens = self.passage(length + len(self.bos), rng)[len(self.bos) :]
        tokens[-1:] = [newline] * min(length, 1)
        lines: list[list[int]] = [[]]
        for token in tokens:
            lines[-1].append(token)
            if token == newline:
                lines.append([])
        return [line for line in lines if line]


def text_files(folder: Path) -> list[Path]:
    """Text below a folder (or the file itself), sorted."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return [
        f
        for f in files
        if f.suffix in TEXT_SUFFIXES and f.is_file() and SMALLEST_FILE <= f.stat().st_size <= LARGEST_FILE
    ]


def _package_folders(names: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            yield name, Path(spec.submodule_search_locations[0])
