"""Every batch shape of vLLM's own backend tests, on the GPU."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from ..batch_shapes import SHAPES, check_shape


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(32, 8), (8, 2), (5, 1)], ids=["whole", "a rank of four", "5 to 1"]
)
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_plain_attention(name: str, heads: int, kv_heads: int) -> None:
    """Prefills by FlashAttention and decodes by our kernels, which read rows whole that the budget covers."""
    check_shape(name, heads, kv_heads, 128, "cuda:0", torch.bfloat16, 1e-2)
