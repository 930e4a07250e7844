"""A RAT+ checkpoint for tests: the example model with gates that it was not trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parents[1] / "examples" / "model"


def write_rat_plus(folder: Path, mean: float = -3.0, spread: float = 2.0) -> Path:
    """Write one; the gates' biases are normal, by default from about 0.0005 to 0.999, so that some reach far back."""
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["RATPlusForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    channels = config["num_key_value_heads"] * config["head_dim"]
    for layer in range(config["num_hidden_layers"]):
        gate = f"model.layers.{layer}.self_attn.memory_gate"
        matrix = torch.randn(channels, config["hidden_size"], generator=random)
        weights[gate + ".weight"] = (matrix * 0.025 * spread).bfloat16()
        weights[gate + ".bias"] = (torch.randn(channels, generator=random) * spread + mean).bfloat16()
    save_file(weights, folder / "model.safetensors")
    return folder
