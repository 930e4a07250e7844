"""The memory's scan on this machine's GPU against the definition, with its gradient."""

from __future__ import annotations

import pytest
import torch

from tests.unit.kernels.remember_check import check_remember
from vllm_rc_backend.decaying_memory import linear_scan
from vllm_rc_backend.kernels import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "lengths", [(1,), (1,) * 70, (700, 1, 64, 333), (16384,)], ids=["1", "70 x 1", "ragged", "16K"]
)
@pytest.mark.parametrize("channels", [64, 200, 1024])
def test_scan_and_gradient(lengths: tuple[int, ...], channels: int) -> None:
    torch.manual_seed(0)
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    # Among 16 million draws one is exactly zero, where the reference, which masks, has no gradient.
    decay = (1 - torch.rand(sum(lengths), channels, device="cuda")).requires_grad_()
    total = torch.randn(sum(lengths), 2, channels, device="cuda").requires_grad_()
    state = torch.randn(len(lengths), 2, channels, device="cuda").requires_grad_()
    weights = torch.randn_like(total)
    found = []
    for scan in (linear_scan, reference.linear_scan):
        y = scan(decay, total, starts, state)
        found.append((y, *torch.autograd.grad((y * weights).sum(), (decay, total, state))))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [64, 200, 1024])
def test_remember(channels: int, dtype: torch.dtype) -> None:
    check_remember("cuda", channels, dtype)
