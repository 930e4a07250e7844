"""The evaluation's RAT+ model: its memory is the equation's, carried over from prefill to window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.rat_plus import EXAMPLE, write_rat_plus
from vllm_rc_backend.evaluation.llama import Llama, remember_sequences
from vllm_rc_backend.evaluation.samples import predict
from vllm_rc_backend.evaluation.sparse import dense_window

TOKENS = torch.randint(3, 4096, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(write_rat_plus(tmp_path_factory.mktemp("model")), "cpu", torch.float32)


def log_probabilities(model: Llama, start: int) -> torch.Tensor:
    """Of the last 19 tokens, with everything before ``start`` prefilled."""
    return predict(model, model.prefill(TOKENS[:, :start]), TOKENS[:, start:], dense_window)[:, -19:]


def test_memory_is_the_equation() -> None:
    key, value, gate = torch.randn(3, 2, 30, 2, 8)
    before = torch.randn(2, 2, 2, 8)
    new_key, new_value, after = remember_sequences(key, value, gate, before.flatten(2))
    k, v = before.unbind(dim=1)
    for t in range(30):
        g = gate[:, t].sigmoid()
        k, v = g * k + (1 - g) * key[:, t], g * v + (1 - g) * value[:, t]
        assert torch.allclose(new_key[:, t], k, atol=1e-5)
        assert torch.allclose(new_value[:, t], v, atol=1e-5)
    assert torch.equal(after, torch.stack((new_key[:, -1], new_value[:, -1]), dim=1).flatten(2))


@pytest.mark.parametrize("start", [1, 17, 33])
def test_prefill_hands_its_memory_to_the_window(model: Llama, start: int) -> None:
    assert torch.allclose(log_probabilities(model, start), log_probabilities(model, 40), atol=1e-4)


def test_closed_gates_leave_an_ordinary_model(model: Llama, tmp_path: Path) -> None:
    closed = Llama(write_rat_plus(tmp_path, mean=-100.0, spread=0.0), "cpu", torch.float32)
    ordinary = Llama(EXAMPLE, "cpu", torch.float32)
    assert torch.allclose(log_probabilities(closed, 30), log_probabilities(ordinary, 30), atol=1e-4)
    assert not torch.allclose(log_probabilities(model, 30), log_probabilities(ordinary, 30), atol=0.1)
