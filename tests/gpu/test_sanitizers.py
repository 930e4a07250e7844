"""Every kernel once, on small shapes: what ``make sanitize`` runs under NVIDIA's compute-sanitizer.

Under it each tensor has its own allocation, so that an access past one's end is seen. The reference has no part in
decode steps here: under ``initcheck`` each of its many small kernels is slow, and reads of what torch's own matrix
products have written are reported. ``test_kernels.py`` holds the same cases to it.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_kernels import CASES
from tests.unit.kernels.remember_check import check_remember
from tests.unit.kernels.update_check import UPDATES, check_update
from vllm_rc_backend.decaying_memory import linear_scan
from vllm_rc_backend.evaluation.kernel_check import Runner
from vllm_rc_backend.host_kv.staging import Staging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SANITIZED = (
    "default",
    "runs, many rows",
    "runs, in one launch with one program for each",
    "runs in two levels",
    "share, through a page cache",
    "features, 256 of them, two levels, long",
    "features, through a page cache",
    "8 query heads, 8 bits, fp8, blocks of 4 pages",
    "too few slots",
)
"""Of the cases of ``test_kernels.py`` those that launch each kernel in each of its forms."""


@pytest.mark.parametrize("name", SANITIZED)
def test_decode(name: str) -> None:
    """All outputs are written, and nothing that was not written has a part in them."""
    case = CASES[name]
    runner = Runner(case, "cuda", steps=2)
    for step in runner.chunks():
        runner.run_prefill(*step)
    for step in range(2):
        lengths = [n + step if n else 0 for n in case.seq_lens]
        assert runner.run_decode(runner.new_query(len(lengths)), lengths).isfinite().all()


@pytest.mark.parametrize("name", UPDATES)
def test_update(name: str) -> None:
    check_update("cuda", name)


def test_memory() -> None:
    check_remember("cuda", 64, torch.bfloat16)
    starts = torch.tensor([0, 70, 71], device="cuda", dtype=torch.int32)
    decay = torch.full((71, 64), 0.5, device="cuda", requires_grad=True)
    y = linear_scan(decay, torch.ones(71, 2, 64, device="cuda"), starts, torch.ones(2, 2, 64, device="cuda"))
    y.sum().backward()
    assert decay.grad is not None
    assert bool(decay.grad.isfinite().all())


def test_staging() -> None:
    geometry = CASES["default"].geometry
    pool = torch.randn(8, 2, geometry.block_size, 128, device="cuda")
    staging = Staging(geometry, 2, 64, pool.dtype, torch.device("cuda"), 2)
    table = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([40, 20], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 5, 10], dtype=torch.int32, device="cuda")
    keys, _, staged, held = staging.copy(pool, table, lengths, starts, 0)
    assert held.tolist() == [35, 15]
    own = pool[table[0].long()].transpose(1, 2).reshape(-1, 2, 128)[:35, :, :64]
    assert torch.equal(keys[staged[0].long()].reshape(-1, 2, 64)[:35], own)
