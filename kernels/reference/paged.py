"""Reading tokens out of a paged KV cache, whatever the order of elements inside a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedKV:
    """A view of one layer's KV cache.

    Attributes:
        cache: ``[blocks, heads, ...]``; what follows the head holds ``block_size`` tokens of K and V in any order.
        key_index, value_index: int64 ``[block_size, head_size]``: where an element of K or V stands in the flattened
            rest of a (block, head).
        page_size: tokens per page; divides the block size.
        key_scale, value_scale: factors of a quantised cache.
    """

    cache: Tensor
    key_index: Tensor
    value_index: Tensor
    page_size: int
    key_scale: float = 1.0
    value_scale: float = 1.0

    @classmethod
    def packed(
        cls, cache: Tensor, page_size: int, key_scale: float = 1.0, value_scale: float = 1.0
    ) -> PagedKV:
        """vLLM's GPU order: ``[block, head, token, K then V]``, any strides."""
        block_size, width = cache.shape[2:]
        index = torch.arange(block_size * width, device=cache.device).view(block_size, width)
        keys, values = index.split(width // 2, dim=-1)
        return cls(cache, keys.contiguous(), values.contiguous(), page_size, key_scale, value_scale)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.key_index.shape[0]

    @property
    def pages_per_block(self) -> int:
        """Pages per block."""
        return self.block_size // self.page_size

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.cache.shape[1]

    @property
    def head_size(self) -> int:
        """Elements of a key."""
        return self.key_index.shape[1]

    def page_ids(self, block_table: Tensor, pages: Tensor) -> Tensor:
        """Physical page ids (block * pages_per_block + place) of a sequence's logical pages.

        Args:
            block_table: int ``[max_blocks]``, one row.
            pages: int, any shape: logical page numbers.
        """
        blocks = block_table.long()[pages // self.pages_per_block]
        return blocks * self.pages_per_block + pages % self.pages_per_block

    def read(self, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of physical pages.

        Args:
            page_ids: int64 ``[heads, pages]``, the pages of each KV head (or ``[1, pages]``, the same for all).

        Returns:
            float32 ``[heads, pages, page_size, head_size]`` twice.
        """
        heads = torch.arange(self.heads, device=page_ids.device).unsqueeze(-1)
        keys, values = self.gather(page_ids, heads)
        return keys * self.key_scale, values * self.value_scale

    def gather(self, page_ids: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache holds of physical pages, not yet scaled.

        Args:
            page_ids, heads: int64, of shapes that broadcast: which page of which KV head.

        Returns:
            float32 ``[..., page_size, head_size]`` twice.
        """
        page_ids, heads = torch.broadcast_tensors(page_ids, heads)
        blocks, places = page_ids // self.pages_per_block, page_ids % self.pages_per_block
        # [..., 2 * block_size * head_size]; widened first: fp8 tensors cannot be gathered.
        content = self.cache[blocks, heads].flatten(start_dim=page_ids.dim()).float()

        def take(index: Tensor) -> Tensor:
            rows: Tensor = content.gather(-1, index.view(self.pages_per_block, -1)[places])
            tokens: Tensor = rows.unflatten(-1, (self.page_size, self.head_size))
            return tokens

        return take(self.key_index), take(self.value_index)

    def read_range(self, block_table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens ``[first, last)`` of one sequence; ``first`` begins a page.

        Returns:
            float32 ``[heads, last - first, head_size]`` twice.
        """
        assert first % self.page_size == 0
        pages = torch.arange(first // self.page_size, -(-last // self.page_size), device=self.cache.device)
        keys, values = self.read(self.page_ids(block_table, pages).unsqueeze(0))
        return keys.flatten(1, 2)[:, : last - first], values.flatten(1, 2)[:, : last - first]
