"""Sparse attention of a whole window of positions at once, from the product's own policy and completion.

Position p sees what a decode at ``seq_len = p + 1`` sees: its own sink, tail, mid region, Top-K pages and summary.
Positions that share a mid region and a number of retrieved pages (at most a page's worth, so a few dozen runs in a
window) are computed together. ``kernels.reference.decode_sparse`` is the definition; a test holds this to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vllm_rc_backend.completion import Completion, Retrieved
from vllm_rc_backend.evaluation.snapkv import SnapKV, choose_pages
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import (
    STATISTICS_DTYPES,
    complete_softmax,
    damp,
    decode_statistics,
    encode_statistics,
    read_state,
    reduce_group,
    select_pages,
    unread_log_mass,
)
from vllm_rc_backend.kernels.reference.summary import split_planes
from vllm_rc_backend.selection import PagePolicy


@dataclass(frozen=True)
class Setting:
    """What one sparse run does, as the options of an engine would have it."""

    geometry: Geometry
    policy: PagePolicy | SnapKV
    group_rule: str
    completion: Completion
    statistics_bits: int


@dataclass(frozen=True)
class Run:
    """Consecutive positions that share a mid region and a number of retrieved pages.

    Attributes:
        first, last: the positions ``[first, last)``, as offsets into the window.
        query: float32 ``[rows, batch, heads, group, d]``, scaled.
        scores: float32 ``[rows, batch, heads, group, tokens]`` of the tokens that were read, -inf beyond a position.
        output: like the query.
        share: the residual's share of the softmax mass, ``[rows, batch, heads, group]``.
    """

    first: int
    last: int
    query: Tensor
    scores: Tensor
    output: Tensor
    share: Tensor


Probe = Callable[[Run], None]


def dense_window(query: Tensor, keys: Tensor, values: Tensor, layer: int = 0) -> Tensor:
    """Causal softmax attention of the last positions of each sequence.

    Args:
        query: float32 ``[batch, window, heads, group, d]``, multiplied by the softmax scale.
        keys, values: ``[batch, heads, tokens, d]``; the window's are the last.
        layer: not used; there for ``llama.Attention``.

    Returns:
        float32, like the query.
    """
    window, tokens = query.shape[1], keys.shape[2]
    mask = torch.ones(window, tokens, dtype=torch.bool, device=query.device).triu(tokens - window + 1)
    outputs = []
    for q, k, v in zip(query, keys.float(), values.float(), strict=True):
        scores = torch.einsum("whgd,htd->hgwt", q, k).masked_fill_(mask, -torch.inf)
        outputs.append(torch.einsum("hgwt,htd->whgd", scores.softmax(dim=-1), v))
    return torch.stack(outputs)


def sparse_window(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    setting: Setting,
    observed: Tensor | None = None,
    probe: Probe | None = None,
) -> Tensor:
    """Sparse attention of the last positions of each sequence; shapes as ``dense_window``.

    Args:
        observed: the last queries before the window, as ``KVCache.queries`` has them, for ``snapkv``.
        probe: is shown every run of sparse positions.
    """
    geometry, page = setting.geometry, setting.geometry.page_size
    tokens = keys.shape[2]
    start = tokens - query.shape[1]
    paged_keys, paged_values = (
        x[:, :, : tokens // page * page].unflatten(2, (-1, page)) for x in (keys, values)
    )
    summary = _Summary(keys, values, setting)
    policy = setting.policy
    if isinstance(policy, SnapKV):
        assert observed is not None
        kept = choose_pages(observed, keys[:, :, :start], geometry)
    else:
        statistics = _statistics(paged_keys, policy, setting.statistics_bits)
    output = torch.empty_like(query)
    for first, last in _runs(geometry, start, query.shape[1]):
        seq_len = start + first + 1
        if not geometry.is_sparse(seq_len):
            end = start + last
            output[:, first:last] = dense_window(query[:, first:last], keys[:, :, :end], values[:, :, :end])
            continue
        mid_end = geometry.mid_end(seq_len)
        rows = query[:, first:last].transpose(0, 1)  # [rows, batch, heads, group, d]
        if isinstance(policy, SnapKV):
            later = torch.arange(geometry.mid_end(start), mid_end, device=kept.device) - geometry.sink_pages
            selected = torch.cat((kept, later.expand(*kept.shape[:2], -1)), dim=-1).expand(
                len(rows), -1, -1, -1
            )
            unread = None
        else:
            mid = statistics[:, :, geometry.sink_pages : mid_end]
            selected, unread = _select(rows, mid, policy, setting, geometry.retrieved_pages(seq_len))
        pages = selected + geometry.sink_pages

        page_keys, page_values = (_take(x, pages) for x in (paged_keys, paged_values))
        retrieved = Retrieved(rows @ page_keys.mT, page_keys, page_values, unread)
        mid_tokens = (mid_end - geometry.sink_pages) * page
        residual = setting.completion.residual(rows, summary.until(mid_end), mid_tokens, retrieved)

        anchor_keys, anchor_values = (
            torch.cat(
                (x[:, :, : geometry.sink_tokens], x[:, :, mid_end * page : start + last]), dim=2
            ).float()
            for x in (keys, values)
        )
        future = torch.ones(last - first, anchor_keys.shape[2], dtype=torch.bool, device=query.device)
        future = future.triu(anchor_keys.shape[2] - (last - first) + 1).view(last - first, 1, 1, 1, -1)
        anchor_scores = (rows @ anchor_keys.mT).masked_fill(future, -torch.inf)
        scores = torch.cat((retrieved.scores, anchor_scores), dim=-1)
        run_values = torch.cat(
            (page_values, anchor_values.expand(last - first, *anchor_values.shape)), dim=-2
        )

        residual = damp(residual, scores.logsumexp(dim=-1))
        out, share = complete_softmax(scores, run_values, residual)
        output[:, first:last] = out.transpose(0, 1)
        if probe is not None:
            probe(Run(first, last, rows, scores, out, share))
    return output


def _runs(geometry: Geometry, start: int, window: int) -> Iterator[tuple[int, int]]:
    def shape(offset: int) -> tuple[int, int, bool]:
        seq_len = start + offset + 1
        return geometry.mid_end(seq_len), geometry.retrieved_pages(seq_len), geometry.is_sparse(seq_len)

    for _, members in groupby(range(window), key=shape):
        offsets = list(members)
        yield offsets[0], offsets[-1] + 1


def _statistics(paged_keys: Tensor, policy: PagePolicy, bits: int) -> Tensor:
    """``[batch, heads, pages, vectors, d]`` as read back from the store, float32; the keys if the policy reads them."""
    keys = paged_keys.float()
    if policy.reads_keys:
        return keys
    return decode_statistics(*encode_statistics(policy.statistics(keys), STATISTICS_DTYPES[bits]))


def _select(
    rows: Tensor, statistics: Tensor, policy: PagePolicy, setting: Setting, count: int
) -> tuple[Tensor, Tensor | None]:
    """Retrieved pages ``[rows, batch, heads, count]`` of the mid region, and the log-mass of the others if needed."""

    def by_row(scores: Tensor) -> Tensor:
        split: Tensor = scores.unflatten(2, (rows.shape[0], -1))
        return split  # [batch, heads, rows, group, pages]

    flat = rows.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [batch, heads, rows * group, d]
    scores = by_row(policy.score(flat, statistics))
    pages = select_pages(reduce_group(scores, setting.group_rule), count)  # [batch, heads, rows, count]
    unread = None
    if setting.completion.needs_mass:
        unread = unread_log_mass(scores, pages, setting.geometry.page_size).permute(2, 0, 1, 3)
    return pages.permute(2, 0, 1, 3), unread


def _take(paged: Tensor, pages: Tensor) -> Tensor:
    """Tokens of pages, float32 ``[rows, batch, heads, tokens, d]``, from ``[batch, heads, pages, page, d]``."""
    _, batch, heads, _ = pages.shape
    b = torch.arange(batch, device=pages.device).view(-1, 1, 1)
    h = torch.arange(heads, device=pages.device).view(-1, 1)
    return paged[b, h, pages].flatten(3, 4).float()


class _Summary:
    """The completion's state over a growing mid region, as decoding reads it."""

    def __init__(self, keys: Tensor, values: Tensor, setting: Setting) -> None:
        self.keys, self.values, self.setting = keys, values, setting
        self.end = setting.geometry.sink_pages
        self.total: Tensor | float = 0.0

    def until(self, mid_end: int) -> Tensor:
        """float32 ``[batch, heads, state_rows, d]``; ``mid_end`` never decreases."""
        completion, page = self.setting.completion, self.setting.geometry.page_size
        if mid_end > self.end:
            keys, values = (
                x[:, :, self.end * page : mid_end * page].float() for x in (self.keys, self.values)
            )
            self.total = self.total + completion.contribution(keys, values)
            self.end = mid_end
        planes = torch.stack(split_planes(torch.as_tensor(self.total)), dim=-3)
        return read_state(planes, completion.precise_rows)
