"""The script that trains a pair with and without a memory, at toy scale."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.needles import NEEDLES
from vllm_rc_backend.evaluation.samples import predict
from vllm_rc_backend.evaluation.sparse import dense_window

ROOT = Path(__file__).parents[2]
SMALL = [
    "--source",
    str(ROOT / "tests" / "unit"),
    "--batch-tokens",
    "512",
    "--longest",
    "128",
    "--workers",
    "0",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import train_rat_plus
    finally:
        sys.path.pop(0)
    return train_rat_plus


@pytest.fixture(scope="module")
def trained(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    assert script.main([*SMALL, "--steps", "10", "--output", str(folder)])
    return folder


def sequences(script: ModuleType, focused: bool = False) -> object:
    tokenizer = script.Tokenizer.from_file(str(script.EXAMPLE / "tokenizer.json"))
    return script.NeedleSequences(tokenizer, script.Corpus(tokenizer, ROOT / "tests" / "unit"), 0, focused)


@pytest.mark.parametrize("kind", sorted(NEEDLES))
@pytest.mark.parametrize("length", [513, 2049])
@pytest.mark.parametrize("focused", [False, True])
def test_every_needle_task_fits_and_ends_with_its_answer(
    script: ModuleType, kind: str, length: int, focused: bool
) -> None:
    made = sequences(script, focused)
    for _ in range(3):
        ids, weights = made.finished(made.needle_task(kind, length), length)
        assert len(ids) == len(weights) == length
        answer = weights.nonzero()[0][-1]
        assert weights[answer] == 4.0, "the last weight is an answer's: nothing was cut"
        text = made.tokenizer.decode(ids[: answer + 1].tolist())
        question, value = text.rstrip("\n").rsplit("? ", 1)
        key = question.rsplit("magic number for ", 1)[1]
        for part in value.split():
            assert f"# The magic number for {key} is {part}.\n" in question


def test_the_second_stage_asks_for_four_keys_and_for_their_values_in_order(script: ModuleType) -> None:
    made = sequences(script, focused=True)
    ids, weights = made.finished(made.needle_task("multi_value", 2049), 2049)
    text = made.tokenizer.decode(ids.tolist())
    asked = re.findall(r"# What is the magic number for (.*)\? (.*)\n", text)
    assert len({key for key, _ in asked}) == 4
    for key, answer in asked:
        assert re.findall(rf"# The magic number for {key} is (\d+)\.\n", text) == answer.split()
        assert len(answer.split()) == 4
    assert (weights == 4.0).sum() == 4 * 25, "four answers of four numbers and a line's end"


def test_the_second_stage_has_the_shares_of_its_focus(script: ModuleType) -> None:
    made, drawn = sequences(script, focused=True), Counter()
    made.needle_task = lambda kind, length: drawn.update([kind]) or []
    for _ in range(8000):
        made.sequence(129)
    shares = {kind: drawn[kind] / drawn.total() for kind in NEEDLES}
    assert abs(shares["multi_value"] - 0.5) < 0.03
    assert abs(shares["multi_key_3"] - 0.2) < 0.03
    assert all(abs(shares[kind] - 0.05) < 0.02 for kind in {*NEEDLES} - {"multi_value", "multi_key_3"})


def test_a_batch_is_a_function_of_seed_and_step(script: ModuleType) -> None:
    made = [script.Batches(sequences(script), seed, [64, 128], 256) for seed in (0, 0, 1)]
    made[0][0]
    assert torch.equal(made[0][1][0], made[1][1][0])
    assert not torch.equal(made[0][1][0], made[2][1][0])
    assert made[0][1][0].shape == (2, 129)


def test_the_pair_sees_the_same_data_at_the_same_rates(script: ModuleType) -> None:
    *stages, converted, continued = script.plan(4400, 16384)
    for dense, memory in (stages[:2], stages[2:]):
        assert dense[3:] == memory[3:]
        assert len(dense.contexts) == len(dense.rates)
    assert converted[2:] == continued[2:]
    first, second = stages[0], stages[2]
    assert len(first.contexts) == second.first == 4400, "new data"
    assert converted.first == second.first + len(second.contexts), "new data again"


def test_all_four_load_and_predict_as_in_training(script: ModuleType, trained: Path) -> None:
    tokens = torch.randint(3, 4096, (2, 40))
    for name in ("dense", "memory", "converted", "continued"):
        model = Llama(trained / name, "cpu", torch.float32)
        assert model.has_memory == (name in ("memory", "converted"))
        found = predict(model, model.prefill(tokens[:, :20]), tokens[:, 20:], dense_window)
        taught = script.Model(model.config, model.has_memory)
        taught.load_state_dict(
            {k: v.float() for k, v in load_file(trained / name / "model.safetensors").items()}
        )
        with torch.no_grad():
            logits = taught(tokens[:, :-1]) @ taught.model["embed_tokens"].weight.T
        assert torch.allclose(found, logits[:, 20:].log_softmax(-1), atol=1e-3)


def test_an_added_memory_keeps_least_where_rope_turns_fastest(script: ModuleType, trained: Path) -> None:
    converted = script.plan(10, 128)[4]
    model = script.begin(converted, json.loads((script.EXAMPLE / "config.json").read_text()), trained, 0)
    for layer in model.model["layers"]:
        gate = layer.self_attn["memory_gate"]
        kept = gate(torch.randn(3, 256)).sigmoid()
        assert (kept == kept[0]).all(), "of every token the same"
        pairs = kept[0].view(2, 2, 32)  # heads, halves that RoPE rotates into one another
        assert (pairs == pairs[0, 0]).all()
        assert (pairs.diff(dim=-1) > 0).all()
        assert 0.017 < pairs.min() < 0.02
        assert pairs.max() == 0.5


def test_training_moves_the_gates(trained: Path) -> None:
    for name in ("memory", "converted"):
        weights = load_file(trained / name / "model.safetensors")
        gates = [w for key, w in weights.items() if key.endswith("memory_gate.weight")]
        assert len(gates) == 6
        assert all(gate.any() for gate in gates)
        # A converted model's matrices begin at zero, a new one's at the initial spread.
        assert all((gate.float().std() < 0.01) == (name == "converted") for gate in gates)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    script: ModuleType, trained: Path, tmp_path: Path
) -> None:
    arguments = [*SMALL, "--steps", "10", "--output", str(tmp_path)]
    calls = 0
    while not script.main([*arguments, "--minutes", "0"]):
        calls += 1
        assert calls < 30
    assert calls > 10, "every call with no time left takes one step"
    for name in ("memory", "converted"):
        got, expected = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, trained))
        assert got.keys() == expected.keys()
        for key, weight in expected.items():
            assert torch.equal(got[key], weight), key
