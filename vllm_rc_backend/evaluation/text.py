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
"""Bytes of the files in a folder. Short ones say too little, and the longest are tables."""
FEW = 20
"""Of fewer documents passages begin anywhere in them: those that begin where documents do would often be the same."""


class Corpus:
    """Documents and the model's tokenizer."""

    def __init__(self, model: Path, documents: list[Path], seed: int = 0) -> None:
        """
        Raises:
            ValueError: there are no documents.
        """
        if not documents:
            raise ValueError(
                f"no text to take passages from; needed: files ending in {', '.join(sorted(TEXT_SUFFIXES))} of "
                f"{SMALLEST_FILE} to {LARGEST_FILE} bytes in a folder, or a single file of any size"
            )
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
        """``length`` tokens of consecutive documents, BOS first.

        Raises:
            ValueError: all documents together have fewer.
        """
        tokens, documents = list(self.bos), self.stream(rng)
        if len(self.documents) < FEW:
            start = next(documents)
            tokens += start[rng.randrange(max(len(start), 1)) :]
        for _ in self.documents:
            if len(tokens) >= length:
                break
            tokens += next(documents)
        if len(tokens) < length:
            raise ValueError(
                f"the text has {len(tokens)} tokens in all; needed: {length} for one passage, and more"
            )
        return tokens[:length]

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
    """Text below a folder (or the file itself), sorted.

    Raises:
        FileNotFoundError: there is neither.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder")
    return [
        f
        for f in sorted(folder.rglob("*"))
        if f.suffix in TEXT_SUFFIXES and f.is_file() and SMALLEST_FILE <= f.stat().st_size <= LARGEST_FILE
    ]


def _package_folders(names: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            yield name, Path(spec.submodule_search_locations[0])
