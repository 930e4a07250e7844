"""Long-context tasks of known answers, generated from a seed at any length.

Every task is lines of filler with lines of its own strewn in, a question at the end, and answers. The wording is a
``Format``: ``comments`` is what this project's small models were trained on, ``english`` is in the manner of RULER
(Hsieh et al., arXiv 2404.06654) and is for general models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_rc_backend.evaluation.text import Corpus

IGNORED = False
"""Marks tokens that are context, not answer, in ``Prompt.answer``."""


@dataclass(frozen=True)
class Format:
    """How a task is worded. ``{}`` fields are filled by position."""

    needle: str
    needle_question: str
    assign: str
    copy: str
    variables_question: str
    words: str
    words_per_line: int
    words_question: str
    separator: str


FORMATS = {
    "comments": Format(
        needle="# The magic number for{0} is {1}.\n",
        needle_question="# What is the magic number for{0}?",
        assign="# VAR{0} = {1}\n",
        copy="# VAR{0} = VAR{1}\n",
        variables_question="# Variables with value {0}:",
        words="# words:{0}\n",
        words_per_line=12,
        words_question="# Most frequent words:",
        separator="",
    ),
    "english": Format(
        needle="One of the special magic numbers for{0} is: {1}.\n",
        needle_question="Question: What are all the special magic numbers for{0} mentioned above?\nAnswer:",
        assign="VAR{0} = {1}\n",
        copy="VAR{0} = VAR{1}\n",
        variables_question="Question: Find all variables that are assigned the value {0} above.\nAnswer:",
        words="Words:{0}\n",
        words_per_line=12,
        words_question="Question: Which words appear most often above, the most common first?\nAnswer:",
        separator="",
    ),
}


@dataclass(frozen=True)
class Prompt:
    """Token ids, the first one BOS if the model has it, and which of them are answers to be predicted."""

    tokens: list[int]
    answer: list[bool]

    @property
    def answer_window(self) -> int:
        """Tokens from the first answer token to the end."""
        return len(self.tokens) - self.answer.index(True)

    @property
    def answers(self) -> list[slice]:
        """Where each answer stands among the tokens, in order; what is before it is its question."""
        places = [place for place, is_answer in enumerate(self.answer) if is_answer]
        starts = [p for p in places if not self.answer[p - 1]]
        ends = [p + 1 for p in places if p + 1 == len(self.answer) or not self.answer[p + 1]]
        return [slice(*span) for span in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Workshop:
    """What a task is built from."""

    corpus: Corpus
    format: Format
    rng: random.Random

    def assemble(
        self,
        length: int,
        lines: Sequence[str],
        turns: Sequence[tuple[str, str]],
        hay: Callable[[], str] | None = None,
    ) -> Prompt:
        """Strew lines over filler, in their order, at uniform depths of 0 to 97 %, and ask the questions.

        Args:
            length: tokens of the prompt, answers included.
            lines: the task's own lines.
            turns: (question, answer) in order.
            hay: gives the filler's next line (None: lines of the corpus).
        """
        encode = self.corpus.encode
        ending: list[tuple[list[int], bool]] = []
        for question, answer in turns:
            ending += [(encode(question), False), (encode(answer + "\n"), True)]
        own = [encode(line) for line in lines]
        bos = self.corpus.bos
        room = length - len(bos) - sum(map(len, own)) - sum(len(ids) for ids, _ in ending)
        if room < 0:
            raise ValueError(
                f"a context of {length} tokens is too short for this task: {-room} tokens too many"
            )
        filler = self.corpus.lines(room, self.rng) if hay is None else self._lines(room, hay)
        tokens = list(bos) + _strew(filler, own, self.rng)
        answer_mask = [False] * len(tokens)
        for ids, is_answer in ending:
            tokens += ids
            answer_mask += [is_answer] * len(ids)
        return Prompt(tokens, answer_mask)

    def _lines(self, length: int, hay: Callable[[], str]) -> list[list[int]]:
        """Lines of hay with ``length`` tokens in all; the last is cut to end there."""
        newline, lines = self.corpus.encode("\n")[-1], []
        while length > 0:
            line = self.corpus.encode(hay())
            if len(line) >= length:
                line = [*line[: length - 1], newline]
            length -= len(line)
            lines.append(line)
        return lines

    def words(self, count: int) -> list[str]:
        """Distinct words, each with its leading space."""
        return self.rng.sample(self.corpus.words, count)

    def keys(self, count: int) -> list[str]:
        """Distinct pairs of words."""
        chosen: dict[str, None] = {}
        while len(chosen) < count:
            chosen["".join(self.words(2))] = None
        return list(chosen)

    def number(self) -> str:
        """Five digits."""
        return str(self.rng.randrange(10_000, 100_000))


def _strew(filler: list[list[int]], own: list[list[int]], rng: random.Random) -> list[int]:
    """Insert lines between lines, so that the k-th own line starts at its drawn share of the filler's tokens."""
    total = sum(map(len, filler))
    depths = sorted(rng.uniform(0, 0.97) * total for _ in own)
    tokens: list[int] = []
    seen, waiting = 0, 0
    for line in filler:
        while waiting < len(own) and depths[waiting] <= seen:
            tokens += own[waiting]
            waiting += 1
        tokens += line
        seen += len(line)
    for line in own[waiting:]:
        tokens += line
    return tokens


def single_needle(shop: Workshop, length: int) -> Prompt:
    """One needle, asked."""
    return _needles(shop, length, keys=1, asked=1)


def multi_key(shop: Workshop, length: int) -> Prompt:
    """One needle per 256 tokens, one asked."""
    return _needles(shop, length, keys=max(2, length // 256), asked=1)


def multi_query(shop: Workshop, length: int) -> Prompt:
    """One needle per 512 tokens, four asked in turn."""
    return _needles(shop, length, keys=max(4, length // 512), asked=4)


def _needles(shop: Workshop, length: int, keys: int, asked: int) -> Prompt:
    numbers = {key: shop.number() for key in shop.keys(keys)}
    lines = [shop.format.needle.format(key, number) for key, number in numbers.items()]
    turns = [
        (shop.format.needle_question.format(key), " " + numbers[key])
        for key in shop.rng.sample(list(numbers), asked)
    ]
    return shop.assemble(length, lines, turns)


def multi_value(shop: Workshop, length: int) -> Prompt:
    """One key with four values, to be given in order, among one needle per 512 tokens."""
    wanted, *others = shop.keys(max(2, length // 512))
    values = [shop.number() for _ in range(4)]
    lines = [(wanted, value) for value in values] + [(key, shop.number()) for key in others]
    shop.rng.shuffle(lines)
    ordered = "".join(" " + value for key, value in lines if key == wanted)
    turns = [(shop.format.needle_question.format(wanted), ordered)]
    return shop.assemble(length, [shop.format.needle.format(*line) for line in lines], turns)


def variable_tracking(shop: Workshop, length: int) -> Prompt:
    """Two chains of four assignments, interleaved; all names of one value, in order."""
    names = shop.words(8)
    chains, values = (names[:4], names[4:]), (shop.number(), shop.number())
    if values[0] == values[1]:
        return variable_tracking(shop, length)
    order = [0] * 4 + [1] * 4
    shop.rng.shuffle(order)
    lines, done = [], [0, 0]
    for chain in order:
        step = done[chain]
        done[chain] += 1
        name = chains[chain][step]
        if step == 0:
            lines.append(shop.format.assign.format(name, values[chain]))
        else:
            lines.append(shop.format.copy.format(name, chains[chain][step - 1]))
    asked = shop.rng.randrange(2)
    question = shop.format.variables_question.format(values[asked])
    return shop.assemble(length, lines, [(question, "".join(chains[asked]))])


def common_words(shop: Workshop, length: int) -> Prompt:
    """Nothing but word lists; the three words that are much more common than the others, in order."""
    return _word_count(shop, length, share=1.0, top=3)


def frequent_words(shop: Workshop, length: int) -> Prompt:
    """Word lists among filler; the two most frequent words, in order."""
    return _word_count(shop, length, share=0.25, top=2)


def _word_count(shop: Workshop, length: int, share: float, top: int) -> Prompt:
    """``top`` words, each 1.5 times as frequent as the next, in a crowd of rare ones."""
    per_line = shop.format.words_per_line
    line_tokens = len(shop.corpus.encode(shop.format.words.format("".join(shop.words(per_line)))))
    lines = max(1, int((length - 64) * share) // line_tokens)
    count = lines * per_line
    crowd = shop.words(min(len(shop.corpus.words), max(top + 8, 100)))
    frequent, rare = crowd[:top], crowd[top:]
    bag: list[str] = []
    for rank, word in enumerate(frequent):
        bag += [word] * max(2, round(count * 0.15 / 1.5**rank))
    bag += [shop.rng.choice(rare) for _ in range(count - len(bag))]
    shop.rng.shuffle(bag)
    rows = [bag[i : i + per_line] for i in range(0, count, per_line)]
    turns = [(shop.format.words_question, "".join(frequent))]
    return shop.assemble(length, [shop.format.words.format("".join(row)) for row in rows], turns)


TASKS: dict[str, Callable[[Workshop, int], Prompt]] = {
    "single_needle": single_needle,
    "multi_key": multi_key,
    "multi_query": multi_query,
    "multi_value": multi_value,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
}
HELD_OUT = "held_out"
"""The task name of plain text: every position of the window counts."""


def make_prompts(task: str, corpus: Corpus, wording: str, length: int, count: int, seed: int) -> list[Prompt]:
    """``count`` prompts of exactly ``length`` tokens. The same arguments give the same prompts."""
    from vllm_rc_backend.evaluation.needles import NEEDLES  # builds on this module

    rng = random.Random(f"{task} {length} {seed}")
    shop = Workshop(corpus, FORMATS[wording], rng)
    make = (TASKS | NEEDLES)[task]
    return [make(shop, length) for _ in range(count)]
