"""Scoring the mid region's pages for one query and choosing the Top-K of each KV head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_rc_backend.selection import PagePolicy


def reduce_group(scores: Tensor, rule: str) -> Tensor:
    """One score per (KV head, page) from those of its query heads.

    Args:
        scores: ``[..., group, pages]``.
        rule: ``max``; ``mean``; ``sum``: the log of the sum over the query heads of exp(score); or ``softmax``: the sum
            over the query heads of the page's share of that head's softmax over pages.

    Returns:
        ``[..., pages]``.
    """
    if rule == "max":
        return scores.amax(dim=-2)
    if rule == "mean":
        return scores.mean(dim=-2)
    if rule == "sum":
        return scores.logsumexp(dim=-2)
    if rule == "softmax":
        return scores.softmax(dim=-1).sum(dim=-2)
    raise ValueError(f"group rule {rule!r} is not max, mean, sum or softmax")


def score_pages(query: Tensor, statistics: Tensor, policy: PagePolicy, rule: str) -> Tensor:
    """Page scores of one row.

    Args:
        query: float32 ``[heads, group, head_size]``, multiplied by the softmax scale.
        statistics: float32 ``[heads, pages, vectors, head_size]`` of the mid region's pages (or their keys
            ``[heads, pages, page_size, head_size]`` if the policy reads keys).

    Returns:
        ``[heads, pages]``.
    """
    return reduce_group(policy.score(query, statistics), rule)


def select_pages(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best pages of each KV head, ascending. Ties go to the earlier page.

    Args:
        scores: ``[..., pages]``.

    Returns:
        int64 ``[..., count]``.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def unread_log_mass(scores: Tensor, selected: Tensor, page_size: int) -> Tensor:
    """Estimated softmax mass of the pages that were not selected: log of the sum of page_size * exp(score).

    Args:
        scores: float32 ``[..., group, pages]`` of the mid region's pages, by a policy that ``estimates_mass``.
        selected: int64 ``[..., count]``, indices into those pages.

    Returns:
        ``[..., group]``; -inf if every page was selected.
    """
    index = selected.unsqueeze(-2).expand(*scores.shape[:-1], -1)
    return scores.scatter(-1, index, -torch.inf).logsumexp(dim=-1) + math.log(page_size)
