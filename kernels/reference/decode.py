"""Exact attention over what was read, joined with the estimate of what was not: one normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_rc_backend.completion import Completion, Residual, Retrieved
from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference.paged import PagedKV


def decode_dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of one query position.

    Args:
        query: float32 ``[heads, group, head_size]``, multiplied by the softmax scale.
        keys, values: float32 ``[heads, tokens, head_size]``.

    Returns:
        float32 ``[heads, group, head_size]``.
    """
    return (query @ keys.mT).softmax(dim=-1) @ values


def decode_sparse(
    query: Tensor,
    kv: PagedKV,
    block_table: Tensor,
    seq_len: int,
    geometry: Geometry,
    pages: Tensor,
    completion: Completion,
    state: Tensor | None,
    unread_log_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One row of sparse decode (arXiv 2604.05438, section 3; the completion's own file says what it estimates).

        num = sum_{A+R} exp(s_i - M) v_i + D_U v_U       den = sum_{A+R} exp(s_i - M) + D_U       o = num / den

    with M the largest of the exact scores and the residual's log-mass, so that D_U = exp(log_mass - M) in [0, 1].

    Args:
        query: float32 ``[heads, group, head_size]``, multiplied by the softmax scale.
        kv: the cache.
        block_table: int ``[max_blocks]`` of this row.
        seq_len: tokens in the sequence, the query's own included.
        geometry: the regions.
        pages: int64 ``[heads, count]``, retrieved logical pages, inside the mid region, no repetition.
        completion: the estimator.
        state: float32 ``[heads, state_rows, head_size]`` over the mid region; None if it is not known, which drops
            the residual (selection only).
        unread_log_mass: float32 ``[heads, group]`` from ``select.unread_log_mass``, for completions that need it.

    Returns:
        Output float32 ``[heads, group, head_size]``, and the residual's share of the softmax mass
        ``[heads, group]``.
    """
    mid_end = geometry.mid_end(seq_len)
    sink_keys, sink_values = kv.read_range(block_table, 0, geometry.sink_tokens)
    tail_keys, tail_values = kv.read_range(block_table, mid_end * kv.page_size, seq_len)
    page_keys, page_values = (x.flatten(1, 2) for x in kv.read(kv.page_ids(block_table, pages)))

    retrieved = Retrieved(query @ page_keys.mT, page_keys, page_values, unread_log_mass)
    scores = torch.cat((query @ sink_keys.mT, retrieved.scores, query @ tail_keys.mT), dim=-1)
    values = torch.cat((sink_values, page_values, tail_values), dim=-2)

    if state is None:
        residual = Residual(torch.full_like(scores[..., 0], -torch.inf), torch.zeros_like(query))
    else:
        mid_tokens = (mid_end - geometry.sink_pages) * kv.page_size
        residual = completion.residual(query, state, mid_tokens, retrieved)

    return complete_softmax(scores, values, damp(residual, scores.logsumexp(dim=-1)))


def damp(residual: Residual, read_log_mass: Tensor) -> Residual:
    """Believe a residual the less the larger it says that it is: a share w of the softmax becomes w (1 - damping w).

    What a wrong value costs grows with its share, and a large share leaves little that was read to correct it.

    Args:
        residual: the estimate.
        read_log_mass: float32 ``[..., group]``, log of the softmax mass that was read.
    """
    if residual.damping is None:
        return residual
    excess = residual.log_mass - read_log_mass
    share, rest = excess.sigmoid(), (-excess).sigmoid()
    # Not one minus what is left of the share: that is zero where what was read has hardly any mass.
    rest = (rest + residual.damping * share.square()).clamp(min=torch.finfo(rest.dtype).tiny)
    log_odds = (share * (1 - residual.damping * share)).log() - rest.log()
    return residual._replace(log_mass=read_log_mass + log_odds)


def complete_softmax(scores: Tensor, values: Tensor, residual: Residual) -> tuple[Tensor, Tensor]:
    """Join what was read with the estimate of what was not, and divide once. Leading dimensions are rows.

    Args:
        scores: float32 ``[..., group, tokens]`` of the tokens that were read; -inf masks one.
        values: float32 ``[..., tokens, head_size]``.
        residual: the estimate.

    Returns:
        Output float32 ``[..., group, head_size]``, and the residual's share of the softmax mass ``[..., group]``.
    """
    log_mass = residual.log_mass.unsqueeze(-1)
    M = torch.maximum(scores.amax(dim=-1, keepdim=True), log_mass)
    weights = (scores - M).exp()
    D_U = (log_mass - M).exp()
    denominator = weights.sum(dim=-1, keepdim=True) + D_U
    return (weights @ values + D_U * residual.value) / denominator, (D_U / denominator).squeeze(-1)
