"""Generated tasks: exact length, true answers, the same from the same seed."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from vllm_rc_backend.evaluation.needles import NEEDLES, NOISE
from vllm_rc_backend.evaluation.tasks import FORMATS, TASKS, make_prompts
from vllm_rc_backend.evaluation.text import Corpus, text_files

ROOT = Path(__file__).parents[3]
LENGTH = 700


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(ROOT / "examples" / "model", text_files(ROOT / "vllm_rc_backend"))


def test_passages_of_few_documents_differ(tmp_path: Path) -> None:
    (file := tmp_path / "one.dat").write_text(
        "".join(f"{i} sheep jumped over fence {i}\n" for i in range(9000))
    )
    corpus = Corpus(ROOT / "examples" / "model", text_files(file))
    rng = random.Random(0)
    passages = [corpus.passage(LENGTH, rng) for _ in range(8)]
    assert len({tuple(passage) for passage in passages}) == 8
    assert all(len(passage) == LENGTH for passage in passages)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words\n" * 200)
    corpus = Corpus(ROOT / "examples" / "model", text_files(tmp_path))
    with pytest.raises(ValueError, match="tokens in all; needed: 100000 for one passage"):
        corpus.passage(100_000, random.Random(0))
    with pytest.raises(ValueError, match="no text to take passages from"):
        Corpus(ROOT / "examples" / "model", [])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        text_files(tmp_path / "nowhere")


@pytest.mark.parametrize("wording", sorted(FORMATS))
@pytest.mark.parametrize("task", sorted(TASKS | NEEDLES))
def test_length_and_answer(corpus: Corpus, task: str, wording: str) -> None:
    for prompt in make_prompts(task, corpus, wording, LENGTH, 3, seed=1):
        assert len(prompt.tokens) == len(prompt.answer) == LENGTH
        assert prompt.tokens[: len(corpus.bos)] == corpus.bos
        assert prompt.answer[-1]
        assert not prompt.answer[: LENGTH - prompt.answer_window].count(True)


@pytest.mark.parametrize("task", sorted(TASKS | NEEDLES))
def test_the_same_seed_gives_the_same_prompts(corpus: Corpus, task: str) -> None:
    assert make_prompts(task, corpus, "comments", LENGTH, 2, 5) == make_prompts(
        task, corpus, "comments", LENGTH, 2, 5
    )
    assert make_prompts(task, corpus, "comments", LENGTH, 2, 5) != make_prompts(
        task, corpus, "comments", LENGTH, 2, 6
    )


@pytest.mark.parametrize(("task", "count"), [("single_needle", 1), ("multi_value", 1), ("multi_query", 4)])
def test_answers_are_where_the_mask_says(corpus: Corpus, task: str, count: int) -> None:
    prompt = make_prompts(task, corpus, "comments", LENGTH, 1, seed=2)[0]
    assert len(prompt.answers) == count
    marked = [False] * LENGTH
    for span in prompt.answers:
        text = corpus.tokenizer.decode(prompt.tokens[span])
        assert re.fullmatch(r"( \d{5})+\n", text)
        marked[span] = [True] * (span.stop - span.start)
    assert marked == prompt.answer


def text_and_answer(corpus: Corpus, task: str) -> tuple[str, str]:
    prompt = make_prompts(task, corpus, "comments", 1500, 1, seed=3)[0]
    decode = corpus.tokenizer.decode
    end = len(prompt.tokens) - prompt.answer_window
    return decode(prompt.tokens[:end]), decode(prompt.tokens[end:])


def test_needles_are_in_the_text(corpus: Corpus) -> None:
    text, answer = text_and_answer(corpus, "multi_key")
    key = re.search(r"What is the magic number for (.*)\?$", text)
    assert key
    assert re.findall(rf"magic number for {key[1]} is (\d+)\.", text) == [answer.strip()]


def test_values_are_asked_in_order(corpus: Corpus) -> None:
    text, answer = text_and_answer(corpus, "multi_value")
    key = re.search(r"What is the magic number for (.*)\?$", text)
    assert key
    assert re.findall(rf"magic number for {key[1]} is (\d+)\.", text) == answer.split()


def test_chains_hold(corpus: Corpus) -> None:
    text, answer = text_and_answer(corpus, "variable_tracking")
    value = re.search(r"Variables with value (\d+):$", text)
    assert value
    known: dict[str, str] = {}
    for name, source in re.findall(r"# VAR (\w+) = (?:VAR )?(\w+)\n", text):
        known[name] = known.get(source, source)
    assert [name for name, v in known.items() if v == value[1]] == answer.split()


@pytest.mark.parametrize(("task", "top"), [("common_words", 3), ("frequent_words", 2)])
def test_the_answer_is_the_most_frequent_words(corpus: Corpus, task: str, top: int) -> None:
    text, answer = text_and_answer(corpus, task)
    counts = Counter(word for line in re.findall(r"# words: (.*)\n", text) for word in line.split())
    assert [word for word, _ in counts.most_common(top)] == answer.split()


@pytest.mark.parametrize("task", sorted(NEEDLES))
def test_needle_tasks_ask_for_what_is_there(corpus: Corpus, task: str) -> None:
    decode = corpus.tokenizer.decode
    for prompt in make_prompts(task, corpus, "comments", 1500, 4, seed=3):
        asked = 0
        for answer in prompt.answers:
            text = decode(prompt.tokens[: answer.start])
            key = re.search(r"What is the magic number for (.*)\?$", text)
            assert key
            held = re.findall(rf"magic number for {key[1]} is ([0-9a-f-]+)\.", text)
            assert held == decode(prompt.tokens[answer]).split()
            asked += 1
        assert asked == (4 if task == "multi_query" else 1)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("single_1", re.escape(NOISE)),
        ("multi_key_2", r"# The magic.*\n"),
        ("multi_key_3", r"# The magic.*\n"),
    ],
)
def test_haystacks(corpus: Corpus, task: str, line: str) -> None:
    """Nothing but that line, but for the needle, the question and the line that is cut to fit."""
    (prompt,) = make_prompts(task, corpus, "comments", 1500, 1, seed=4)
    lines = corpus.tokenizer.decode(prompt.tokens).splitlines(keepends=True)
    assert sum(not re.fullmatch(line, each) for each in lines) <= 3
    assert len(set(lines)) > 10 or task == "single_1"
