"""The page cache of a GPU: its memory, and the launches that keep it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.triton.page_cache import (
    ABSENT,
    fetch_pages_kernel,
    find_pages_kernel,
    take_slots_kernel,
    truncate_pages_kernel,
)
from vllm_rc_backend.kernels.triton.shape import next_power_of_2

COUNTERS = ("pages_wanted", "pages_found", "pages_evicted", "tokens_fetched")
"""What the kernels add to ``DevicePages.counters``, over KV heads and layers; tokens of one KV head."""

WINDOW = 128
"""Slots that are looked at together when one is taken."""


def most_pages_read(geometry: Geometry, max_model_len: int) -> int:
    """The most pages that a decode row reads exactly: of a sparse row its budget's, of others all of them."""
    budget = geometry.budget if geometry.budget >= 1 else geometry.budget * max_model_len
    anchors = geometry.sink_tokens + geometry.tail_tokens + 2 * geometry.page_size
    tokens = max(int(budget), anchors, geometry.dense_threshold) + geometry.page_size
    return -(-min(tokens, max_model_len + geometry.page_size) // geometry.page_size)


class DevicePages:
    """The page caches of all layers of a KV-cache group, and the buffers that their launches share.

    Attributes:
        layers: one cache each.
        reading: int32 ``[rows, heads, max_read]``: where a (row, head) finds the pages that it reads in this layer, in
            reading order: a slot, or -1 - page for one that must be read from the pool.
        counters: int64 ``[len(COUNTERS)]`` that the kernels add to.
    """

    def __init__(
        self,
        geometry: Geometry,
        layers: int,
        pages: int,
        heads: int,
        slots: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rows: int,
        max_model_len: int,
    ) -> None:
        def full(*size: int, value: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(size, value, dtype=dtype, device=device)

        self.geometry, self.heads, self.head_size, self.slots = geometry, heads, head_size, slots
        self.max_read = most_pages_read(geometry, max_model_len)
        self.tile = min(next_power_of_2(self.max_read), 512)
        self.page_slot = full(layers, pages, heads, value=ABSENT.value)
        self.filled = full(layers, slots, value=0)
        self.now = full(1, value=0)
        self.reading = full(max_rows, heads, self.max_read, value=0)
        self.spans = full(max_rows, heads, self.max_read, value=0)
        self.taken = full(max_rows, heads, self.tile, value=0)
        self.counters = full(len(COUNTERS), value=0, dtype=torch.int64)
        content = torch.empty(layers, slots, geometry.page_size, 2 * head_size, dtype=dtype, device=device)
        slot_key, used = full(layers, slots, value=-1), full(layers, slots, value=0)
        hand = full(layers, 1, value=0, dtype=torch.int64)
        self.layers = [
            LayerPages(self, self.page_slot[i], slot_key[i], self.filled[i], used[i], hand[i], content[i])
            for i in range(layers)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        shared = [self.page_slot, self.filled, self.reading, self.spans, self.taken]
        return sum(
            t.nbytes for layer in self.layers for t in (layer.slot_key, layer.used, layer.content)
        ) + sum(t.nbytes for t in shared)

    def begin_step(
        self, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, max_query_len: int
    ) -> None:
        """Once a step, before any layer: cut off the entries of pages that this step writes to.

        Args:
            block_table: int32 ``[rows, max_blocks]``.
            seq_lens: int32 ``[rows]``, this step's tokens included; 0 in padding rows.
            query_start: int32 ``[rows + 1]``, where each row's new tokens start.
            max_query_len: an upper bound of the new tokens of a row.
        """
        layers = len(self.layers)
        truncate_pages_kernel[(-(-max_query_len // self.geometry.page_size) + 1, len(seq_lens))](
            self.page_slot,
            self.filled,
            self.now,
            block_table,
            seq_lens,
            query_start,
            block_table.stride(0),
            self.page_slot.stride(0),
            self.filled.stride(0),
            LAYERS=layers,
            HEADS=self.heads,
            BLOCK=min(next_power_of_2(layers * self.heads), 512),
            g=self.geometry,
            num_warps=4,
        )


@dataclass
class LayerPages:
    """The page cache of one layer; made by ``DevicePages``.

    Attributes:
        group: what the layers share.
        page_slot: int32 ``[pages, heads]``.
        slot_key, filled, used: int32 ``[slots]``.
        hand: int64 ``[1]``.
        content: ``[slots, page_size, 2 * head_size]``, K then V of each token.
    """

    group: DevicePages
    page_slot: Tensor
    slot_key: Tensor
    filled: Tensor
    used: Tensor
    hand: Tensor
    content: Tensor

    def fetch(self, chosen: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor) -> None:
        """Between selection and attention: bring what the rows read to the device, say where it is.

        Args:
            chosen: int32 ``[rows, heads, max_selected]``, places in the mid region of the sparse rows' pages.
            pool: ``[blocks, heads, block_size, 2 * head_size]``, any strides, this step's tokens written.
            block_table, seq_lens: see ``DevicePages.begin_step``; rows with one new token each.
        """
        group, rows = self.group, len(seq_lens)
        find_pages_kernel[(group.heads, rows)](
            chosen,
            block_table,
            seq_lens,
            self.page_slot,
            self.filled,
            self.used,
            group.now,
            group.reading,
            group.spans,
            group.counters,
            block_table.stride(0),
            chosen.stride(1),
            group.max_read,
            HEADS=group.heads,
            TILE=group.tile,
            g=group.geometry,
            num_warps=4,
        )
        if group.slots == 0:
            return
        take_slots_kernel[(group.heads, rows)](
            seq_lens,
            self.page_slot,
            self.slot_key,
            self.filled,
            self.used,
            self.hand,
            group.now,
            group.reading,
            group.spans,
            group.taken,
            group.counters,
            group.slots,
            group.max_read,
            # Twice round for all programs together, or until a program has what it wants.
            2 * group.slots // (WINDOW * rows * group.heads) + 8,
            HEADS=group.heads,
            TILE=group.tile,
            WINDOW=WINDOW,
            g=group.geometry,
            num_warps=4,
        )
        pages = 2
        fetch_pages_kernel[(-(-group.max_read // pages), group.heads, rows)](
            pool,
            seq_lens,
            self.slot_key,
            self.content,
            group.reading,
            group.spans,
            *pool.stride()[:3],
            group.max_read,
            HEADS=group.heads,
            HEAD_SIZE=group.head_size,
            COLS=next_power_of_2(2 * group.head_size),
            PAGES=pages,
            g=group.geometry,
            num_warps=4,
        )
