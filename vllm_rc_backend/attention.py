"""One decode step of one layer: finish pages, score, select, attend and complete. Plain torch, for any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.kernels import reference
from vllm_rc_backend.kernels.reference import CachedKV, PageCache, PagedKV, SummaryPlan, written_pages
from vllm_rc_backend.side_store import SideStore


@dataclass(frozen=True)
class Batch:
    """The rows of one step, lengths on the host.

    Attributes:
        block_table: int ``[rows, max_blocks]``.
        seq_lens: tokens in each sequence after this step.
        query_lens: tokens of this step.
        plan: the summaries' plan, shared by all layers of the group; None without a completion.
    """

    block_table: Tensor
    seq_lens: list[int]
    query_lens: list[int]
    plan: SummaryPlan | None


class ReferenceAttention:
    """Sparse attention by the reference kernels.

    Args:
        store: the layer's page statistics and summaries.
        scale: the softmax scale.
        group_rule: how query heads that share a KV head agree on pages.
        pages: with the KV pages in host memory, the copies through which decoding reads them; otherwise None.

    Raises:
        ValueError: a group rule that the store's policy has no scores for.
    """

    def __init__(
        self, store: SideStore, scale: float, group_rule: str, pages: PageCache | None = None
    ) -> None:
        reference.check_group_rule(group_rule, store.layout.policy)
        self.store = store
        self.scale = scale
        self.group_rule = group_rule
        self.pages = pages

    def update(self, kv: PagedKV, batch: Batch) -> None:
        """Bring the side store up to this step: copies of pages cut off, statistics of finished pages, summaries."""
        layout = self.store.layout
        if self.pages is not None:
            for table, seq_len, query_len in zip(
                batch.block_table, batch.seq_lens, batch.query_lens, strict=True
            ):
                pages, kept = written_pages(seq_len, query_len, kv.page_size)
                self.pages.truncate(kv.page_ids(table, pages), kept)
        reference.finish_pages(
            kv,
            batch.block_table,
            batch.seq_lens,
            batch.query_lens,
            layout.policy,
            self.store.codes,
            self.store.scales,
        )
        if batch.plan is not None:
            reference.absorb_pages(kv, batch.block_table, batch.plan, layout.completion, self.store.states)

    def decode(self, query: Tensor, kv: PagedKV, batch: Batch, row: int) -> tuple[Tensor, float]:
        """Attention of one sparse decode row.

        Args:
            query: ``[query_heads, head_size]``, unscaled.

        Returns:
            float32 ``[query_heads, head_size]``, and the mean share of the residual in the softmax mass.
        """
        layout, block_table, seq_len = self.store.layout, batch.block_table[row], batch.seq_lens[row]
        geometry = layout.geometry
        q = query.float().unflatten(0, (layout.heads, -1)) * self.scale

        mid = torch.arange(geometry.sink_pages, geometry.mid_end(seq_len), device=query.device)
        statistics = self._statistics(kv, block_table, mid)
        scores = layout.policy.score(q, statistics)
        best = reference.reduce_group(scores, self.group_rule)
        selected = reference.select_pages(best, geometry.retrieved_pages(seq_len))
        unread = None
        if layout.completion.needs_mass:
            unread = reference.unread_log_mass(scores, selected, geometry.page_size)

        slot = -1 if batch.plan is None else int(batch.plan.slot[row])
        state = None
        if slot >= 0:
            state = reference.read_state(self.store.states[slot], layout.completion.precise_rows)
        output, residual = reference.decode_sparse(
            q,
            kv if self.pages is None else CachedKV.over(kv, self.pages),
            block_table,
            seq_len,
            geometry,
            selected + geometry.sink_pages,
            layout.completion,
            state,
            unread,
        )
        return output.flatten(0, 1), float(residual.mean())

    def _statistics(self, kv: PagedKV, block_table: Tensor, pages: Tensor) -> Tensor:
        ids = kv.page_ids(block_table, pages)
        if self.store.layout.policy.reads_keys:
            return kv.read(ids.unsqueeze(0))[0]
        scales = None if self.store.scales is None else self.store.scales[ids]
        return reference.decode_statistics(self.store.codes[ids], scales).transpose(0, 1)
