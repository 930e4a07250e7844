"""Every batch shape of vLLM's own backend tests, on the CPU."""

from __future__ import annotations

import pytest
import torch

from ..batch_shapes import SHAPES, check_shape


@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_plain_attention(name: str) -> None:
    """By vLLM's own kernel, which a row takes that the budget covers."""
    check_shape(name, 8, 2, 64, "cpu", torch.float32, 1e-4)


@pytest.mark.parametrize("name", [name for name, (_, new) in SHAPES.items() if 1 in new])
@pytest.mark.usefixtures("always_sparse")
def test_selecting_all_pages_is_plain_attention(name: str) -> None:
    """By the sparse path: anchors, all pages retrieved, an empty residual."""
    check_shape(name, 6, 2, 64, "cpu", torch.float32, 1e-4)
