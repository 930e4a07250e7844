"""Every kernel once, on small shapes: what ``make sanitize`` runs under NVIDIA's compute-sanitizer.

Under it each tensor has its own allocation, so that an access past one's end is seen.
"""

from __future__ import annotations

import pytest
import torch

from tests.unit.kernels.cases import RUNS
from tests.unit.kernels.remember_check import check_remember
from tests.unit.kernels.update_check import UPDATES, check_update
from vllm_rc_backend.decaying_memory import linear_scan
from vllm_rc_backend.evaluation.kernel_check import Case, check
from vllm_rc_backend.host_kv.staging import Staging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = {
    "one launch": Case(
        **RUNS,
        completion="paged",
        head_size=128,
        heads=8,
        seq_lens=(500, 1, 0, 333),
    ),
    "two launches": Case(**RUNS, completion="paged", seq_lens=tuple(range(40, 680, 8)), heads=4),
    "two levels": Case(
        **RUNS,
        completion="linear",
        seq_lens=(6000, 700),
        chunk=3000,
        budget=150,
        max_model_len=70_000,
        heads=1,
    ),
    "box": Case(seq_lens=(500, 1, 0, 131), statistics_bits=8, slots=1),
    "features": Case(
        **RUNS,
        completion="features",
        seq_lens=(2500, 1, 0, 131),
        chunk=1500,
        features=40,
    ),
    "page cache": Case(**RUNS, completion="paged", seq_lens=(500, 1, 0, 131), cache_slots=20),
}


@pytest.mark.parametrize("name", CASES)
def test_decode(name: str) -> None:
    check(CASES[name], "cuda", steps=2)


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
    geometry = CASES["box"].geometry
    pool = torch.randn(8, 2, geometry.block_size, 128, device="cuda")
    staging = Staging(geometry, 2, 64, pool.dtype, torch.device("cuda"), 2)
    table = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([40, 20], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 5, 10], dtype=torch.int32, device="cuda")
    keys, _, staged, held = staging.copy(pool, table, lengths, starts, 0)
    assert held.tolist() == [35, 15]
    own = pool[table[0].long()].transpose(1, 2).reshape(-1, 2, 128)[:35, :, :64]
    assert torch.equal(keys[staged[0].long()].reshape(-1, 2, 64)[:35], own)
