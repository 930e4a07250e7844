"""Train examples/model again: a small Llama that reads Python and answers questions about long contexts.

    python examples/train_example_model.py --source ~/some/python/packages --output my-model

--source is any folder with Python files below it (site-packages, for instance); their text is half of the training
data, and the filler of the other half: synthetic tasks whose formats are in examples/model/README.md. The defaults are
the recipe of the model in this repository: 8694 steps of 131,072 tokens, contexts of 2048, 8192 and then 16384 tokens.
That asks for a large GPU; --steps, --batch-tokens and --longest make it smaller.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shutil
import string
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, track
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_rc_backend.evaluation.text import HELD_OUT_PACKAGES

EXAMPLE = Path(__file__).parent / "model"
STAGES = ((2048, 0.4), (8192, 0.4), (16384, 0.2))  # (context, share of the steps)
SYNTHETIC = 0.5  # share of the sequences
DECAY = 0.45  # of the steps, at the end, while the learning rate falls to zero
BOS = 0
SOURCE, ANSWER, QUESTION, UNKNOWABLE = 1.0, 4.0, 0.2, 0.0
"""Loss weights: of source text, of answers, of what leads to them, of what nothing before it tells."""

Piece = list[tuple[str, float]]
"""Text with its loss weight, in parts that the tokenizer splits anyway."""


class Corpus:
    """Tokenized source files end to end, and where their lines begin."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, leave_out: Collection[str] = ()) -> None:
        """``leave_out``: names of folders below ``folder`` that are not read, at any depth."""
        left_out = {*leave_out}
        files = [p for p in sorted(folder.rglob("*.py")) if not left_out & {*p.relative_to(folder).parts}]
        encoded = []
        for start in track(range(0, len(files), 100), "reading"):
            texts = [path.read_text(errors="ignore") + "\n" for path in files[start : start + 100]]
            batch = tokenizer.encode_batch(texts, add_special_tokens=False)
            encoded += [np.array(e.ids, dtype=np.int32) for e in batch]
        self.tokens = np.concatenate([np.zeros(0, dtype=np.int32), *encoded])
        ends = [
            token for text, token in tokenizer.get_vocab().items() if text.endswith("Ċ")
        ]  # byte-level newline
        self.lines = np.flatnonzero(np.isin(self.tokens, ends)) + 1
        if len(self.lines) < 1000:
            raise SystemExit(
                f"{folder}: {len(files)} Python files with {len(self.lines)} lines are too few to learn from"
            )

    def lines_of(self, count: int, rng: random.Random) -> list[np.ndarray]:
        """Consecutive lines with about ``count`` tokens, from a random place."""
        first = rng.randrange(len(self.lines) - 1)
        last = first + 1
        while last + 1 < len(self.lines) and self.lines[last] - self.lines[first] < count:
            last += 1
        return np.split(
            self.tokens[self.lines[first] : self.lines[last]],
            self.lines[first + 1 : last] - self.lines[first],
        )


class Tasks:
    """Writes synthetic sequences: each method returns lines to strew into source text, and the questions about them."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.rng = rng
        self.words = [w[1:] for w in sorted(tokenizer.get_vocab()) if re.fullmatch("Ġ[a-z]{4,9}", w)]

    def needles(self, context: int) -> tuple[list[Piece], Piece]:
        """Single, multi-key, multi-query or multi-value needles."""
        kind = self.rng.choice(("single", "key", "query", "value"))
        count = {"single": 1, "key": context // 256, "query": context // 512, "value": context // 512}[kind]
        return self.strewn_needles(count, 4 if kind == "query" else 1, 4 if kind == "value" else 1)

    def strewn_needles(
        self,
        count: int,
        questions: int,
        values: int,
        new_key: Callable[[], str] | None = None,
        new_value: Callable[[], str] | None = None,
    ) -> tuple[list[Piece], Piece]:
        """Needles of ``count`` keys, some asked for; those asked for have so many values, in their order."""
        new_key, new_value = new_key or self.key, new_value or self.number
        keys = {new_key(): [new_value()] for _ in range(max(count, 1))}
        asked = self.rng.sample(list(keys), min(questions, len(keys)))
        for key in asked:
            keys[key] += [new_value() for _ in range(values - 1)]
        pairs = [(key, value) for key, given in keys.items() for value in given]
        self.rng.shuffle(pairs)
        inserts = [
            [(f"# The magic number for {key} is", QUESTION), (f" {value}", UNKNOWABLE), (".\n", QUESTION)]
            for key, value in pairs
        ]
        ending: Piece = []
        for key in asked:
            answer = " ".join(value for name, value in pairs if name == key)
            ending += [
                (f"# What is the magic number for {key}?", QUESTION),
                (f" {answer}", ANSWER),
                ("\n", ANSWER),
            ]
        return inserts, ending

    def variables(self, context: int) -> tuple[list[Piece], Piece]:
        """Two chains of four assignments, one of them asked for."""
        chains = {
            self.number(): ["".join(self.rng.choices(string.ascii_uppercase, k=5)) for _ in range(4)]
            for _ in "ab"
        }
        heads = {
            number: [f"# VAR {names[0]} = {number}\n"]
            + [f"# VAR {new} = VAR {old}\n" for old, new in itertools.pairwise(names)]
            for number, names in chains.items()
        }
        # Interleaved at random, each chain in its own order.
        order = self.rng.sample([number for number in chains for _ in range(4)], 8)
        inserts: list[Piece] = [[(heads[number].pop(0), QUESTION)] for number in order]
        asked = self.rng.choice(list(chains))
        answer = " ".join(chains[asked])
        return inserts, [
            (f"# Variables with value {asked}:", QUESTION),
            (f" {answer}", ANSWER),
            ("\n", ANSWER),
        ]

    def frequent_words(self, context: int, top: int = 2) -> tuple[list[Piece], Piece]:
        """Lists of twelve words, some of which come back more often than the others."""
        lists = max(context // 512, 3)
        words = self.rng.sample(self.words, top + 40)
        counts = [lists * 3 // (rank + 1) for rank in range(top)]
        bag = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
        bag += self.rng.choices(words[top:], k=max(12 * lists - len(bag), 0))
        self.rng.shuffle(bag)
        inserts: list[Piece] = [
            [("# words:", QUESTION), (" " + " ".join(bag[i : i + 12]), UNKNOWABLE), ("\n", QUESTION)]
            for i in range(0, len(bag), 12)
        ]
        return inserts, [
            ("# Most frequent words:", QUESTION),
            (" " + " ".join(words[:top]), ANSWER),
            ("\n", ANSWER),
        ]

    def key(self) -> str:
        """Two words."""
        return " ".join(self.rng.sample(self.words, 2))

    def number(self) -> str:
        """Five digits."""
        return str(self.rng.randrange(10_000, 100_000))


class Sequences:
    """An endless stream of training sequences: token ids and loss weights."""

    def __init__(self, tokenizer: Tokenizer, corpus: Corpus, seed: int) -> None:
        self.tokenizer, self.corpus = tokenizer, corpus
        self.rng = random.Random(seed)
        self.tasks = Tasks(tokenizer, self.rng)

    def batch(self, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Ids ``[rows, context + 1]`` and the weights of all but the first."""
        ids, weights = zip(*(self.sequence(context + 1) for _ in range(rows)), strict=True)
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(weights))[:, 1:]

    def sequence(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One sequence of exactly ``length`` tokens, the beginning-of-sequence token first."""
        if self.rng.random() < SYNTHETIC:
            kind = self.rng.choices(
                ("needles", "variables", "common", "frequent", "copy"), (38, 18, 19, 19, 6)
            )[0]
        else:
            kind = "source"
        if kind == "source":
            parts = self.weighted(self.corpus.lines_of(length, self.rng))
        elif kind == "copy":
            half = self.weighted(self.corpus.lines_of(length // 2, self.rng))
            parts = half + half
        elif kind == "common":  # nothing but word lists
            inserts, question = self.tasks.frequent_words(length * 8, top=3)
            parts = self.fit([self.encode(piece) for piece in inserts], self.encode(question), length)
        else:
            make: Callable[[int], tuple[list[Piece], Piece]] = {
                "needles": self.tasks.needles,
                "variables": self.tasks.variables,
                "frequent": self.tasks.frequent_words,
            }[kind]
            inserts, question = make(length)
            parts = self.strew([self.encode(piece) for piece in inserts], self.encode(question), length)
        return self.finished(parts, length)

    @staticmethod
    def finished(parts: list, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of exactly ``length`` tokens: BOS, the parts, padding that weighs nothing."""
        ids = np.concatenate([[BOS], *(part[0] for part in parts)])[:length].astype(np.int64)
        weights = np.concatenate([[0.0], *(part[1] for part in parts)])[:length]
        missing = length - len(ids)
        return np.pad(ids, (0, missing)), np.pad(weights, (0, missing)).astype(np.float32)

    def strew(self, inserts: list, question: tuple, length: int) -> list:
        """Source lines with the inserts at random depths up to 97 %, in their order, and the question at the end."""
        room = length - 1 - len(question[0]) - sum(len(ids) for ids, _ in inserts)
        lines = self.corpus.lines_of(max(room, 1), self.rng)
        while len(lines) > 1 and sum(map(len, lines)) > room:
            lines.pop()
        parts = self.weighted(lines)
        for depth in sorted((0.97 * self.rng.random() for _ in inserts), reverse=True):
            parts.insert(int(depth * len(lines)), inserts.pop())
        return [*parts, question]

    @staticmethod
    def fit(inserts: list, question: tuple, length: int) -> list:
        """As many inserts as there is room for, and the question."""
        room, kept = length - 1 - len(question[0]), []
        for ids, weights in inserts:
            room -= len(ids)
            if room < 0:
                break
            kept.append((ids, weights))
        return [*kept, question]

    @staticmethod
    def weighted(lines: list[np.ndarray]) -> list:
        """Source lines with their weight."""
        return [(line, np.full(len(line), SOURCE)) for line in lines]

    def encode(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and weights of a piece."""
        ids = [self.tokenizer.encode(text, add_special_tokens=False).ids for text, _ in piece]
        weights = [np.full(len(part), weight) for part, (_, weight) in zip(ids, piece, strict=True)]
        return np.array([token for part in ids for token in part]), np.concatenate(weights)


def schedule(steps: int) -> Iterator[tuple[int, float, float]]:
    """(context, learning-rate factor, Muon's momentum) of every step."""
    contexts = [context for context, share in STAGES for _ in range(round(share * steps))]
    for step in range(steps):
        factor = min(1.0, (steps - step) / (DECAY * steps))
        yield contexts[min(step, len(contexts) - 1)], factor, 0.85 + 0.1 * min(1.0, step / 300)


def train(
    model: PreTrainedModel, sequences: Sequences, steps: int, batch_tokens: int, longest: int
) -> list[float]:
    """Train in place; the loss of every step."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=0.012, weight_decay=0.05)
    adam = torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95))
    rates = {id(group): group["lr"] for optimizer in (muon, adam) for group in optimizer.param_groups}
    device, losses = model.device, []
    with Progress() as progress:
        bar = progress.add_task("training", total=steps)
        for context, factor, momentum in schedule(steps):
            context = min(context, longest)
            ids, weights = (x.to(device) for x in sequences.batch(max(batch_tokens // context, 1), context))
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(ids[:, :-1]).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            loss = (loss * weights.flatten()).sum() / weights.sum()
            loss.backward()
            for optimizer in (muon, adam):
                for group in optimizer.param_groups:
                    group["lr"] = factor * rates[id(group)]
                    if optimizer is muon:
                        group["momentum"] = momentum
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"{context} tokens, loss {losses[-1]:.3f}")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and save; returns the losses."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--source", type=Path, required=True, help="folder with Python files to learn from")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the model; loads in vLLM and transformers"
    )
    parser.add_argument("--steps", type=int, default=8694)
    parser.add_argument(
        "--batch-tokens", type=int, default=131_072, help="tokens of one step (default: %(default)s)"
    )
    parser.add_argument(
        "--longest", type=int, default=16384, help="cut the contexts to this (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    corpus = Corpus(tokenizer, options.source, HELD_OUT_PACKAGES)
    config = AutoConfig.from_pretrained(EXAMPLE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sequences = Sequences(tokenizer, corpus, options.seed)
    losses = train(model, sequences, options.steps, options.batch_tokens, options.longest)

    model.to(torch.bfloat16).save_pretrained(options.output)
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        shutil.copy(EXAMPLE / file, options.output / file)
    return losses


if __name__ == "__main__":
    main()
