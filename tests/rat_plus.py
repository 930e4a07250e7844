"""A RAT+ checkpoint for tests, the example model with gates of any size, and what its answers must be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.evaluation.samples import predict
from vllm_rc_backend.evaluation.sparse import dense_window

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


def assert_plain(outputs: list[Any], plain: Llama, worst: float = 2e-3, mean: float = 2e-4) -> None:
    """Every token of every sequence has the log-probability that plain torch computes from its whole prefix.

    Args:
        worst, mean: how far from it, at one token and on average.
    """
    assert outputs
    for output in outputs:
        for sequence in output.outputs:
            assert sequence.token_ids
            tokens = torch.tensor([[*output.prompt_token_ids, *sequence.token_ids]], device=plain.device)
            start = len(output.prompt_token_ids) - 1
            log_p = predict(plain, plain.prefill(tokens[:, :start]), tokens[:, start:], dense_window)
            expected = log_p.gather(-1, tokens[:, start + 1 :, None]).flatten().cpu()
            got = [p[t].logprob for t, p in zip(sequence.token_ids, sequence.logprobs, strict=True)]
            error = (torch.tensor(got) - expected).abs()
            assert error.max() <= worst, error
            assert error.mean() <= mean, error
