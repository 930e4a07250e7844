"""Learning feature maps: the loss falls, what is read exactly stays exact, and the command writes a file that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_rc_backend.calibrate.cli import main
from vllm_rc_backend.calibrate.learn import Learned, Maps, Progress, learn, loss
from vllm_rc_backend.calibrate.record import Recording
from vllm_rc_backend.completion.feature_file import FeatureFile, fingerprint

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples" / "model"
UNITS, TOKENS, WINDOW, GROUP, SIZE = 2, 400, 32, 2, 16


def recording(seed: int) -> Recording:
    """Values that are a function of keys, whose spread says nothing of clusters: what k-means does not know yet."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(UNITS, SIZE, SIZE, generator=torch.Generator().manual_seed(99)) / SIZE**0.5
    keys, query = (torch.randn(UNITS, n, SIZE, generator=g) for n in (TOKENS, WINDOW * GROUP))
    keys[..., : SIZE // 2] *= 3
    query[..., : SIZE // 2] /= 6
    return Recording(query.unflatten(1, (WINDOW, GROUP)), keys, keys @ mixing)


def learn_in(most: int, progress: Progress = lambda *_: None) -> Learned:
    """Maps from four recordings, in so many steps."""
    training = [recording(i) for i in range(4)]
    return learn(training, [recording(9)], features=16, steps=most, patience=3, seed=0, progress=progress)


def test_learning_lowers_the_loss_on_what_it_did_not_see() -> None:
    steps: list[int] = []
    learned = learn_in(200, lambda step, _: steps.append(step))
    assert learned.best_loss < 0.93 * learned.first_loss
    assert steps == list(range(1, learned.steps + 1)[: len(steps)])


def test_maps_without_mass_leave_selection_alone() -> None:
    """With features that weigh nothing the loss is that of what was read, which more reading lowers."""
    zero = torch.zeros(UNITS, 4, SIZE)
    maps = Maps(zero, zero[..., 0], zero, torch.full((UNITS, 4), -1e4))
    losses = [
        float(loss(maps, recording(0), share, torch.Generator().manual_seed(0)))
        for share in (1 / 16, 1 / 4, 1)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] == pytest.approx(0, abs=1e-6), "everything is read"


def test_the_command_writes_a_file_that_fits_the_model(tmp_path: Path) -> None:
    out = tmp_path / "maps.safetensors"
    arguments = ["--model", str(MODEL), "--data", str(ROOT / "kernels"), "--out", str(out), "--device", "cpu"]
    sizes = {"context": 512, "sequences": 3, "prompts": 0, "steps": 3, "features": 8, "window": 16}
    assert main([*arguments, *(f"--{name}={n}" for name, n in sizes.items())]) == 0
    config = json.loads((MODEL / "config.json").read_text())
    file = FeatureFile.load(out, fingerprint(config))
    assert len(file.layers) == config["num_hidden_layers"]
    assert file.layers[0].key_weight.shape == (config["num_key_value_heads"], 8, config["head_dim"])


def test_one_sequence_is_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(MODEL), "--data", str(ROOT / "kernels"), "--out", str(tmp_path / "x")]
    assert main([*arguments, "--device", "cpu", "--sequences", "1", "--prompts", "0"]) == 2
    assert "--sequences 1 --prompts 0: allowed: two" in " ".join(capsys.readouterr().out.split())


def test_few_steps_are_not_in_vain() -> None:
    learned = learn_in(45)
    assert learned.best_loss < learned.first_loss


def test_no_text_is_said(tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(MODEL),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "x"),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 2
