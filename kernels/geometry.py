"""Which tokens of a sequence are anchors, mid region and budget. Integer arithmetic, the same on host and device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The regions of a sequence, from its length alone.

    ``[0, sink)`` and ``[mid_end * page, seq_len)`` are the anchors, the full pages between them the mid region. The
    unfinished page always falls into the tail.
    """

    page_size: int
    block_size: int
    sink_tokens: int
    tail_tokens: int
    budget: float
    dense_threshold: int

    @property
    def pages_per_block(self) -> int:
        """Pages in one vLLM KV block."""
        return self.block_size // self.page_size

    @property
    def sink_pages(self) -> int:
        """First page of the mid region."""
        return self.sink_tokens // self.page_size

    def mid_end(self, seq_len: int) -> int:
        """One past the last page of the mid region."""
        return max(self.sink_pages, (seq_len - self.tail_tokens) // self.page_size)

    def retrieved_pages(self, seq_len: int) -> int:
        """Pages of the mid region that the budget pays for; at least one, at most all."""
        mid_end = self.mid_end(seq_len)
        mid_pages = mid_end - self.sink_pages
        budget = int(self.budget) if self.budget >= 1 else int(self.budget * seq_len)
        anchors = self.sink_tokens + seq_len - mid_end * self.page_size
        return min(max((budget - anchors) // self.page_size, 1), mid_pages)

    def is_sparse(self, seq_len: int) -> bool:
        """Whether a decode at this length leaves anything unread."""
        return (
            seq_len > self.dense_threshold
            and self.retrieved_pages(seq_len) < self.mid_end(seq_len) - self.sink_pages
        )

    def tokens_read(self, seq_len: int) -> int:
        """Tokens whose K and V one query reads exactly, per KV head."""
        if not self.is_sparse(seq_len):
            return seq_len
        tail = seq_len - self.mid_end(seq_len) * self.page_size
        return self.sink_tokens + self.retrieved_pages(seq_len) * self.page_size + tail
