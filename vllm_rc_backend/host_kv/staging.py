"""The buffer through which a prefill reads earlier tokens from the host, once a chunk instead of once a query tile."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.triton.shape import next_power_of_2
from vllm_rc_backend.kernels.triton.stage import stage_kernel

BLOCK = 128
"""Tokens of a block of the buffer, which attention reads as a paged cache."""

TOKENS = 16384
"""Tokens of the buffer, if that gives each row a block: 64 MiB with 8 KV heads of 128 at 16 bits."""


class Staging:
    """One buffer for all layers of a KV-cache group."""

    def __init__(
        self,
        geometry: Geometry,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rows: int,
    ) -> None:
        self.geometry, self.heads, self.head_size = geometry, heads, head_size
        blocks = max(TOKENS // BLOCK, max_rows)
        self.buffer = torch.zeros(blocks, BLOCK, heads, 2 * head_size, dtype=dtype, device=device)
        self.lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.table = torch.arange(blocks, dtype=torch.int32, device=device)

    def room(self, rows: int) -> int:
        """Tokens of each of so many rows that the buffer takes at a time."""
        return len(self.table) // rows * BLOCK

    def copy(
        self, pool: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, first: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bring tokens ``[first, first + room)`` of what each row had before this step.

        Args:
            pool: ``[blocks, heads, block_size, 2 * head_size]``, any strides.
            block_table: int32 ``[rows, max_blocks]``.
            seq_lens: int32 ``[rows]``, this step's tokens included.
            query_start: int32 ``[rows + 1]``.

        Returns:
            Keys and values ``[blocks, BLOCK, heads, head_size]``, their block table int32 ``[rows, blocks per row]``,
            and how many tokens each row has in them, int32 ``[rows]``.
        """
        rows, tile = len(seq_lens), 16
        room = self.room(rows)
        stage_kernel[(room // tile, self.heads, rows)](
            pool,
            block_table,
            seq_lens,
            query_start,
            self.buffer,
            self.lengths,
            first,
            room,
            *pool.stride()[:3],
            block_table.stride(0),
            HEADS=self.heads,
            HEAD_SIZE=self.head_size,
            COLS=next_power_of_2(2 * self.head_size),
            TILE=tile,
            g=self.geometry,
            num_warps=4,
        )
        keys, values = self.buffer.split(self.head_size, dim=-1)
        return keys, values, self.table[: rows * (room // BLOCK)].view(rows, -1), self.lengths[:rows]
