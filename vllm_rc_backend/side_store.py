"""The plugin's own memory, page statistics keyed by physical block and summary slots: what it holds and costs.

Everything here is a pure function of finished pages, so prefix sharing, preemption, chunked prefill and block reuse
need no code: a reused block is recomputed when it fills, and until then it is part of some sequence's tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.completion import Completion
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference.statistics import STATISTICS_DTYPES, STATISTICS_SCALE_BYTES
from vllm_rc_backend.selection import PagePolicy


@dataclass(frozen=True)
class StoreLayout:
    """Sizes of the side store of one attention layer.

    Attributes:
        heads: KV heads on this rank.
        head_size: elements of a key.
        kv_bytes: bytes of one element of the KV cache.
        slots: summary slots (0 without a completion).
        statistics_bits: 2, 8 or 16.
    """

    heads: int
    head_size: int
    kv_bytes: int
    slots: int
    statistics_bits: int
    geometry: Geometry
    policy: PagePolicy
    completion: Completion

    @property
    def vectors(self) -> int:
        """Vectors of a page's statistics, one KV head."""
        return self.policy.vectors(self.head_size)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of one page's statistics, all KV heads."""
        scale = STATISTICS_SCALE_BYTES[self.statistics_bits]
        return self.heads * self.vectors * (self.head_size * self.statistics_bits // 8 + scale)

    @property
    def block_bytes(self) -> int:
        """Bytes of the page statistics of one vLLM block, all KV heads."""
        return self.geometry.pages_per_block * self.statistics_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one summary slot of this layer (two bfloat16 planes)."""
        return self.heads * 2 * self.completion.state_rows(self.head_size) * self.head_size * 2

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in this layer, all KV heads."""
        return self.heads * 2 * self.head_size * self.kv_bytes

    def token_equivalents(self, seq_len: int) -> dict[str, float]:
        """What one query at this context length reads, in tokens' worth of K and V bytes, by kind.

        A dense decode reads ``seq_len``. The summary counts at the KV cache's own width.
        """
        geometry = self.geometry
        if not geometry.is_sparse(seq_len):
            return {"tokens": float(seq_len), "statistics": 0.0, "summary": 0.0}
        mid_pages = geometry.mid_end(seq_len) - geometry.sink_pages
        if self.policy.reads_keys:
            statistics = mid_pages * geometry.page_size / 2
        else:
            statistics = mid_pages * self.statistics_bytes / self.token_bytes
        summary = self.completion.tokens_read(self.head_size) * 2 / self.kv_bytes
        return {"tokens": float(geometry.tokens_read(seq_len)), "statistics": statistics, "summary": summary}


class SideStore:
    """Page statistics and summary states of one layer.

    ``codes`` ``[pages, heads, vectors, head_size]`` (bfloat16 or int8), ``scales`` ``[pages, heads, vectors]``
    (float16) or None, ``states`` ``[slots, heads, 2, state_rows, head_size]`` (bfloat16), and the ``completion`` with
    its tensors, if it has any, on the device.
    """

    def __init__(self, layout: StoreLayout, pages: int, device: torch.device | str) -> None:
        heads, d, vectors = layout.heads, layout.head_size, layout.vectors
        bits = layout.statistics_bits
        self.layout = layout
        self.pages = pages
        self.codes = torch.zeros(
            pages, heads, vectors, d // 4 if bits == 2 else d, dtype=STATISTICS_DTYPES[bits], device=device
        )
        self.scales: Tensor | None = (
            torch.zeros(pages, heads, vectors, dtype=torch.float16, device=device) if bits < 16 else None
        )
        self.completion = layout.completion.to(device)
        rows = layout.completion.state_rows(d)
        self.states = torch.zeros(layout.slots, heads, 2, rows, d, dtype=torch.bfloat16, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = [self.codes, self.states] + ([] if self.scales is None else [self.scales])
        return sum(t.nbytes for t in tensors)
