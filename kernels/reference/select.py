"""Scoring the mid region's pages for one query and choosing the Top-K of each KV head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_rc_backend.selection import PagePolicy

SHARE_WEIGHT = 0.7
"""How much of the log of what a head's pages weigh together the group rule ``share`` takes off its scores: with 0 it is
``max``, with 1 a page's largest share of a head's softmax. Of those two at 1/32 of 8K the first has KL 0.0202 on text
and 0.222 on chains of look-ups, the second 0.0230 and 0.043, and this weight 0.0189 and 0.043 (docs/accuracy.md)."""


def check_group_rule(rule: str, policy: PagePolicy) -> None:
    """
    Raises:
        ValueError: the rule adds up scores as log-masses, and this policy's are none.
    """
    if rule == "share" and not policy.estimates_mass:
        raise ValueError(
            f"group_rule=share adds up the mass of a head's pages, which scores of selection={policy.name} do not "
            "estimate; take group_rule=max, or a selection whose scores do, such as runs"
        )


def reduce_group(scores: Tensor, rule: str) -> Tensor:
    """One score per (KV head, page) from those of its query heads.

    Args:
        scores: ``[..., group, pages]``.
        rule: ``max``; ``mean``; ``sum``: the log of the sum over the query heads of exp(score); ``softmax``: the sum
            over the query heads of the page's share of that head's softmax over pages; or ``share``: the largest
            score minus ``SHARE_WEIGHT`` times the log of the sum over that head's pages of exp(score), for scores that
            are log-masses (``PagePolicy.estimates_mass``).

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
    if rule == "share":
        return (scores - SHARE_WEIGHT * scores.logsumexp(dim=-1, keepdim=True)).amax(dim=-2)
    raise ValueError(f"group rule {rule!r} is not max, mean, sum, softmax or share")


def score_pages(query: Tensor, statistics: Tensor, policy: PagePolicy, rule: str) -> Tensor:
    """Page scores of one row.

    Args:
        query: float32 ``[heads, group, head_size]``, multiplied by the softmax scale.
        statistics: float32 ``[heads, pages, vectors, head_size]`` of the mid region's pages (or their keys
            ``[heads, pages, page_size, head_size]`` if the policy reads keys).

    Returns:
        ``[heads, pages]``.

    Raises:
        ValueError: see ``check_group_rule``.
    """
    check_group_rule(rule, policy)
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
