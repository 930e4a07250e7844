"""The script that trains the example model: its data is what its README says, and a few steps learn."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("training", ROOT / "examples" / "train_example_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "examples" / "model" / "tokenizer.json"))


def test_needles_are_answered_by_what_was_strewn_in(script: ModuleType, tokenizer: Tokenizer) -> None:
    tasks = script.Tasks(tokenizer, random.Random(0))
    for _ in range(20):
        inserts, questions = tasks.needles(2048)
        text = "".join(part for piece in inserts for part, _ in piece)
        asked = "".join(part for part, _ in questions)
        for key, answer in re.findall(r"# What is the magic number for (\w+ \w+)\? ([\d ]+)\n", asked):
            assert re.findall(rf"# The magic number for {key} is (\d{{5}})\.\n", text) == answer.split()
        assert asked.count("?") in (1, 4)


def test_chains_are_answered_in_order(script: ModuleType, tokenizer: Tokenizer) -> None:
    inserts, question = script.Tasks(tokenizer, random.Random(0)).variables(2048)
    lines = [part for piece in inserts for part, _ in piece]
    (number,) = re.findall(r"# Variables with value (\d{5}):", question[0][0])
    chain = re.findall(rf"# VAR (\w+) = {number}\n", "".join(lines))
    while following := re.findall(rf"# VAR (\w+) = VAR {chain[-1]}\n", "".join(lines)):
        chain += following
    assert question[1][0].split() == chain
    assert len(chain) == 4


def test_frequent_words_are_the_most_frequent(script: ModuleType, tokenizer: Tokenizer) -> None:
    inserts, question = script.Tasks(tokenizer, random.Random(0)).frequent_words(8192)
    words = "".join(piece[1][0] for piece in inserts).split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert question[1][0].split() == ranked[:2]
    assert words.count(ranked[1]) > words.count(ranked[2])


def test_sequences_have_the_length_and_only_known_answers_weigh(
    script: ModuleType, tokenizer: Tokenizer
) -> None:
    corpus = script.Corpus(tokenizer, ROOT / "tests" / "unit")
    sequences = script.Sequences(tokenizer, corpus, seed=1)
    seen = set()
    for _ in range(40):
        ids, weights = sequences.sequence(1025)
        assert len(ids) == len(weights) == 1025
        assert ids[0] == script.BOS
        assert weights[0] == 0
        seen.update(weights.tolist())
    assert {round(w, 3) for w in seen} == {script.SOURCE, script.ANSWER, script.QUESTION, script.UNKNOWABLE}


def test_pieces_are_tokenized_as_the_whole_line(script: ModuleType, tokenizer: Tokenizer) -> None:
    """Otherwise the model would learn a text that no tokenizer produces."""
    sequences = script.Sequences(tokenizer, script.Corpus(tokenizer, ROOT / "tests" / "unit"), seed=0)
    for make in (sequences.tasks.needles, sequences.tasks.variables, sequences.tasks.frequent_words):
        inserts, question = make(2048)
        for piece in [*inserts, question]:
            whole = tokenizer.encode("".join(part for part, _ in piece), add_special_tokens=False).ids
            assert sequences.encode(piece)[0].tolist() == whole


def test_a_few_steps_learn_and_the_result_loads(script: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "model"
    arguments = ["--source", str(ROOT / "tests" / "unit"), "--output", str(output)]
    losses = script.main([*arguments, "--steps", "12", "--batch-tokens", "512", "--longest", "128"])
    assert losses[0] > 8, "log of the vocabulary's size at first"
    assert losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_hidden_layers == 6
    assert (output / "tokenizer.json").exists()


def test_too_little_source_is_refused(script: ModuleType, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0 Python files"):
        script.Corpus(tokenizer, tmp_path)


def test_folders_are_left_out(script: ModuleType, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for folder, name in (("kept", "first"), ("a/left", "second"), ("left/b", "third")):
        place = tmp_path / "left" / folder  # a name above the folder that is read does not matter
        place.mkdir(parents=True)
        (place / "module.py").write_text(f"{name} = 1\n" * 1200)
    corpus = script.Corpus(tokenizer, tmp_path / "left", ["left"])
    text = tokenizer.decode(corpus.tokens.tolist())
    assert "first" in text
    assert "second" not in text
    assert "third" not in text
