"""Sequences laid out in a paged cache whose every other element is NaN."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import PagedKV

HEADS, GROUP, HEAD_SIZE = 2, 3, 8


def geometry(**changes: float) -> Geometry:
    """A small geometry: pages of 4 in blocks of 8, sink 4, tail 5, budget 20."""
    values = {
        "page_size": 4,
        "block_size": 8,
        "sink_tokens": 4,
        "tail_tokens": 5,
        "budget": 20,
        "dense_threshold": 0,
    }
    return Geometry(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class Cache:
    """A paged cache, its free blocks, and the sequences that were written into it.

    The elements of a (block, head) stand in a random order, as on vLLM's CPU platform, and everything that no token was
    written to is NaN.
    """

    kv: PagedKV
    free: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, blocks: int, shape: Geometry, heads: int = HEADS, head_size: int = HEAD_SIZE) -> Cache:
        elements = 2 * shape.block_size * head_size
        order = torch.randperm(elements).view(2, shape.block_size, head_size)
        cache = torch.full((blocks, heads, elements), torch.nan)
        return cls(PagedKV(cache, order[0], order[1], shape.page_size), torch.randperm(blocks).tolist())

    def write(self, table: list[int], first: int, keys: Tensor, values: Tensor) -> None:
        """Write tokens from position ``first`` on; takes blocks for them. ``[heads, tokens, head_size]``."""
        size, last = self.kv.block_size, first + keys.shape[1]
        table += [self.take() for _ in range(-(-last // size) - len(table))]
        for begin in range(first // size * size, last, size):
            span = torch.arange(max(first, begin), min(last, begin + size))
            block = self.kv.cache[table[begin // size]]
            for index, content in ((self.kv.key_index, keys), (self.kv.value_index, values)):
                block[:, index[span % size]] = content[:, span - first]

    def take(self) -> int:
        """A free block, its old content gone."""
        block = self.free.pop()
        self.kv.cache[block] = torch.nan
        return block


def random_tokens(count: int, heads: int = HEADS, head_size: int = HEAD_SIZE) -> tuple[Tensor, Tensor]:
    """Keys and values ``[heads, count, head_size]``."""
    return torch.randn(heads, count, head_size), torch.randn(heads, count, head_size)


def as_table(table: list[int], width: int = 64) -> Tensor:
    """One row of a block table, as vLLM pads it."""
    return torch.tensor(table + [0] * (width - len(table)), dtype=torch.int32)


def random_query(heads: int = HEADS, group: int = GROUP, head_size: int = HEAD_SIZE) -> Tensor:
    """A scaled query ``[heads, group, head_size]``."""
    return torch.randn(heads, group, head_size) * head_size**-0.5
