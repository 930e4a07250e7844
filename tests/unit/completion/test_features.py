"""Learned feature maps: the accounting of retrieved tokens, and the file that holds the maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_rc_backend.completion import Retrieved
from vllm_rc_backend.completion.feature_file import FeatureFile, FeatureFileError, fingerprint
from vllm_rc_backend.completion.features import Features

HEADS, GROUP, SIZE, FEATURES = 2, 3, 8, 12
MODEL = fingerprint({"hidden_size": 64})


def features(seed: int = 0) -> Features:
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, HEADS, FEATURES, SIZE, generator=g) / 4
    return Features(
        weights[0], torch.randn(HEADS, FEATURES, generator=g), weights[1], torch.zeros(HEADS, FEATURES)
    )


def test_the_residual_is_linear_attention_over_what_was_not_retrieved() -> None:
    maps, keys, values = features(), *torch.randn(2, HEADS, 40, SIZE)
    query = torch.randn(HEADS, GROUP, SIZE)
    state = maps.contribution(keys, values)
    assert state.shape == (HEADS, maps.state_rows(SIZE), SIZE) == (HEADS, FEATURES + 2, SIZE)
    retrieved = Retrieved(query @ keys[:, :16].mT, keys[:, :16], values[:, :16])
    log_mass, value, *_ = maps.residual(query, state, 40, retrieved)

    psi = (query @ maps.query_weight.mT + maps.query_bias.unsqueeze(1)).exp()
    weights = psi @ maps.map_keys(keys[:, 16:]).mT
    assert torch.allclose(log_mass.exp(), weights.sum(-1), rtol=1e-3)
    assert torch.allclose(value, weights @ values[:, 16:] / weights.sum(-1, keepdim=True), atol=1e-3)


def test_the_state_is_a_sum() -> None:
    maps, keys, values = features(), *torch.randn(2, HEADS, 40, SIZE)
    parts = maps.contribution(keys[:, :7], values[:, :7]) + maps.contribution(keys[:, 7:], values[:, 7:])
    assert torch.allclose(parts, maps.contribution(keys, values), atol=1e-4)


def test_everything_retrieved_leaves_nothing() -> None:
    maps, keys, values = features(), *torch.randn(2, HEADS, 16, SIZE)
    query = torch.randn(HEADS, GROUP, SIZE)
    retrieved = Retrieved(query @ keys.mT, keys, values)
    log_mass, value, _ = maps.residual(query, maps.contribution(keys, values), 16, retrieved)
    assert (log_mass == -torch.inf).all()
    assert (value == 0).all()


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    FeatureFile([features(0), features(1)], MODEL, "a note").save(path)
    loaded = FeatureFile.load(path, MODEL)
    assert loaded.notes == "a note"
    rank = loaded.layer(1, first_head=1, heads=1)
    assert torch.equal(rank.key_weight, features(1).key_weight[1:])
    assert torch.equal(rank.query_bias, features(1).query_bias[1:])


def test_a_file_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    with pytest.raises(FeatureFileError, match="no such file"):
        FeatureFile.load(path, MODEL)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(FeatureFileError, match="damaged"):
        FeatureFile.load(path, MODEL)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FeatureFileError, match="holds no feature maps"):
        FeatureFile.load(path, MODEL)
    FeatureFile([features()], MODEL).save(path)
    with pytest.raises(FeatureFileError, match="another model"):
        FeatureFile.load(path, fingerprint({"hidden_size": 65}))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FeatureFileError, match="damaged"):
        FeatureFile.load(path, MODEL)
    broken = features()
    broken.key_bias[0, 0] = torch.nan
    FeatureFile([broken], MODEL).save(path)
    with pytest.raises(FeatureFileError, match="layer 0 has no usable key_bias"):
        FeatureFile.load(path, MODEL)
