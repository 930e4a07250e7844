"""What the side store costs is what it says."""

from __future__ import annotations

import pytest
import torch

from vllm_rc_backend.completion import make_completion
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.selection import POLICIES, make_policy
from vllm_rc_backend.side_store import SideStore, StoreLayout


def layout(
    selection: str = "box", completion: str = "linear", bits: int = 16, **changes: float
) -> StoreLayout:
    """A layer with 2 KV heads of 128 and a bfloat16 cache."""
    values = {
        "page_size": 16,
        "block_size": 32,
        "sink_tokens": 16,
        "tail_tokens": 64,
        "budget": 2048,
        "dense_threshold": 0,
    }
    return StoreLayout(
        heads=2,
        head_size=128,
        kv_bytes=2,
        slots=3,
        statistics_bits=bits,
        geometry=Geometry(**{**values, **changes}),  # type: ignore[arg-type]
        policy=make_policy(selection),
        completion=make_completion(completion),
    )


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("completion", ["linear", "none"])
@pytest.mark.parametrize("selection", sorted(POLICIES))
def test_bytes_held_are_bytes_declared(selection: str, completion: str, bits: int) -> None:
    shape = layout(selection, completion, bits)
    store = SideStore(shape, pages=20, device="cpu")
    assert store.nbytes == 20 * shape.statistics_bytes + shape.slots * shape.slot_bytes
    assert store.nbytes == 10 * shape.block_bytes + shape.slots * shape.slot_bytes
    assert store.codes.dtype == (torch.int8 if bits == 8 else torch.bfloat16)


def test_box_at_sixteen_bits_is_a_sixteenth_of_the_cache() -> None:
    shape = layout()
    assert shape.statistics_bytes == shape.token_bytes
    assert shape.block_bytes * 16 == shape.geometry.block_size * shape.token_bytes


def test_read_budget_in_token_equivalents() -> None:
    # 131072 tokens: the mid region has (131072 - 64) / 16 - 1 = 8187 pages, each a token's worth of statistics.
    # The summary is C once and K1, V1 twice at 16 bits: 132 vectors, 66 tokens' worth.
    assert layout().token_equivalents(131072) == {"tokens": 2048.0, "statistics": 8187.0, "summary": 66.0}
    assert layout(bits=8).token_equivalents(131072)["statistics"] == pytest.approx(8187 * 130 / 256)
    assert layout("moba").token_equivalents(131072)["statistics"] == 8187 / 2
    assert layout(completion="none").token_equivalents(131072)["summary"] == 0
    # The oracle reads every key of the mid region.
    assert layout("oracle").token_equivalents(131072)["statistics"] == 8187 * 16 / 2


def test_dense_reads_what_is_held() -> None:
    assert layout().token_equivalents(2048) == {"tokens": 2048.0, "statistics": 0.0, "summary": 0.0}
