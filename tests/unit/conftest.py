"""Deterministic random numbers and the small building blocks of the unit tests."""

from __future__ import annotations

import pytest
import torch

# The tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
