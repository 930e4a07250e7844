"""KV pages of a pool in slow memory, copied into fast memory: what is where, what goes, what a step must fetch.

The pool may lie in host memory; a few of its pages, of single KV heads, are kept on the device as *entries*. An entry
holds the first ``filled`` tokens of its page. A step that writes tokens into a page cuts the entry off before them;
whoever reads the page fetches what the entry lacks. So the page that a sequence is writing costs one token a step, a
block that changes hands is fetched anew, and nothing stale can be read: there is no case for either.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_rc_backend.kernels.reference.paged import PagedKV


@dataclass
class Traffic:
    """What was asked of a page cache, in pages of one KV head (tokens of one KV head where so named)."""

    wanted: int = 0
    hits: int = 0
    evictions: int = 0
    tokens_fetched: int = 0


@dataclass
class PageCache:
    """The entries of one layer.

    Attributes:
        page_slot: int64 ``[pages, heads]``, the slot of an entry, -1 if there is none.
        slot_key: int64 ``[slots]``, page * heads + head of a slot's entry, -1 if it is free.
        filled: int64 ``[slots]``, tokens of its page that an entry holds.
        used: int64 ``[slots]``, the request that last used a slot, by number; 0 is never.
        content: ``[slots, page_size, 2 * head_size]``, K then V of each token, in the pool's dtype.
        requests: how many there were.
        traffic: what they came to.
    """

    page_slot: Tensor
    slot_key: Tensor
    filled: Tensor
    used: Tensor
    content: Tensor
    requests: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def empty(
        cls, pages: int, heads: int, slots: int, page_size: int, head_size: int, dtype: torch.dtype
    ) -> PageCache:
        """A cache without entries, of any number of slots from 0 up, on the CPU."""
        return cls(
            page_slot=torch.full((pages, heads), -1),
            slot_key=torch.full((slots,), -1),
            filled=torch.zeros(slots, dtype=torch.long),
            used=torch.zeros(slots, dtype=torch.long),
            content=torch.empty(slots, page_size, 2 * head_size, dtype=dtype),
        )

    def truncate(self, page_ids: Tensor, tokens: Tensor) -> None:
        """Cut entries off: pages ``page_ids`` keep their first ``tokens``, whatever follows is about to be written.

        Args:
            page_ids: int64 ``[n]``, physical pages; all their KV heads are meant.
            tokens: int64 ``[n]``.
        """
        slots = self.page_slot[page_ids]
        kept = tokens.unsqueeze(-1).expand_as(slots)[slots >= 0]
        slots = slots[slots >= 0]
        self.filled[slots] = torch.minimum(self.filled[slots], kept)

    def request(self, page_ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entries of pages, or make them in place of those that were not used for the longest time.

        Entries of the same request never replace each other: where there is no room, a page gets none.

        Args:
            page_ids: int64 ``[heads, n]``, physical pages of each KV head, none twice.
            tokens: int64 ``[n]``, tokens that are wanted of each page, from its first on.

        Returns:
            int64 ``[heads, n]`` twice: the slot, -1 for a page that must be read from the pool; and the first token
            that must be fetched, ``tokens`` if none. The slots count as filled: the caller fetches at once.
        """
        self.requests += 1
        keys = (page_ids * page_ids.shape[0] + torch.arange(page_ids.shape[0]).unsqueeze(-1)).flatten()
        wanted = tokens.expand_as(page_ids).flatten()
        directory = self.page_slot.view(-1)
        slots = directory[keys]
        found = slots >= 0
        self.used[slots[found]] = self.requests

        missing = (~found).nonzero().squeeze(-1)
        idle = (self.used < self.requests).nonzero().squeeze(-1)
        taken = idle[self.used[idle].argsort(stable=True)][: len(missing)]
        given = missing[: len(taken)]
        old = self.slot_key[taken]
        directory[old[old >= 0]] = -1
        directory[keys[given]] = taken
        self.slot_key[taken] = keys[given]
        self.filled[taken] = 0
        self.used[taken] = self.requests
        slots[given] = taken

        held = torch.where(slots >= 0, self.filled[slots] if len(self.filled) else 0, 0)
        begin = torch.minimum(held, wanted)
        self.filled[slots[slots >= 0]] = torch.maximum(held, wanted)[slots >= 0]
        self.traffic.wanted += len(keys)
        self.traffic.hits += int(found.sum())
        self.traffic.evictions += int((old >= 0).sum())
        self.traffic.tokens_fetched += int((wanted - begin).sum())
        return slots.view_as(page_ids), begin.view_as(page_ids)


@dataclass(frozen=True)
class CachedKV(PagedKV):
    """A pool that is read through a page cache: the same numbers as without, from fewer reads of the pool.

    Attributes:
        pages: the cache, which the reads fill.
    """

    pages: PageCache = field(kw_only=True)

    @classmethod
    def over(cls, kv: PagedKV, pages: PageCache) -> CachedKV:
        """The same pool behind a cache."""
        return cls(**vars(kv), pages=pages)

    def read(self, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See PagedKV."""
        return self._read(page_ids, torch.full_like(page_ids[0], self.page_size))

    def read_range(self, block_table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """See PagedKV."""
        assert first % self.page_size == 0
        pages = torch.arange(first // self.page_size, -(-last // self.page_size))
        tokens = (last - pages * self.page_size).clamp(max=self.page_size)
        keys, values = self._read(self.page_ids(block_table, pages).unsqueeze(0), tokens)
        return keys.flatten(1, 2)[:, : last - first], values.flatten(1, 2)[:, : last - first]

    def _read(self, page_ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        page_ids = page_ids.expand(self.heads, -1)
        slots, begin = self.pages.request(page_ids, tokens)
        out = torch.empty(*page_ids.shape, self.page_size, 2 * self.head_size)
        for at in (begin < tokens).nonzero().tolist():
            head, i = at
            slot = int(slots[head, i])
            fetched = torch.cat(self.gather(page_ids[head, i], torch.tensor(head)), dim=-1)
            if slot < 0:
                out[head, i] = fetched
            else:
                span = slice(int(begin[head, i]), int(tokens[i]))
                self.pages.content[slot, span] = fetched[span].to(self.pages.content.dtype)
        for head, i in (slots >= 0).nonzero().tolist():
            out[head, i] = self.pages.content[slots[head, i]].float()
        keys, values = out.split(self.head_size, dim=-1)
        return keys * self.key_scale, values * self.value_scale


def written_pages(seq_len: int, query_len: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Logical pages that a step writes to, and how many tokens each of them keeps.

    Args:
        seq_len: tokens in the sequence after the step.
        query_len: tokens that the step writes.

    Returns:
        int64 ``[n]`` twice.
    """
    first = seq_len - query_len
    pages = torch.arange(first // page_size, -(-seq_len // page_size) if query_len else first // page_size)
    return pages, (first - pages * page_size).clamp(min=0)
