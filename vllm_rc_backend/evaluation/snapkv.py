"""SnapKV (Li et al., arXiv 2404.14469): pages chosen once, by what the end of the prompt attends to.

The last queries of the prompt are the observation window. The pages that hold most of their attention are kept for the
whole decode; what is generated later is kept as well. No page statistics are read. For evaluation only: a choice that
depends on the queries of one prompt belongs to a request, where the backend's side store is a function of the pages
alone, and holds for every request that shares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rc_backend.kernels.geometry import Geometry
from vllm_rc_backend.kernels.reference import select_pages

OBSERVED = 32
"""Tokens of the observation window, the paper's."""


@dataclass(frozen=True)
class SnapKV:
    """Stands where a ``PagePolicy`` does, without statistics or a score for each query: see ``choose_pages``."""

    name: ClassVar[str] = "snapkv"


def choose_pages(observed: Tensor, keys: Tensor, geometry: Geometry) -> Tensor:
    """The pages of the prompt that are kept: those with most of the attention of the observed queries, summed over them
    and the group's heads.

    Args:
        observed: queries of the prompt's last tokens, float32 ``[batch, observed, heads, group, d]``, scaled.
        keys: ``[batch, heads, tokens, d]`` of the prompt.

    Returns:
        int64 ``[batch, heads, count]``, pages of the prompt's mid region counted from its first, ascending; as many as
        the budget pays for at the prompt's length.
    """
    count, tokens, page = observed.shape[1], keys.shape[2], geometry.page_size
    future = torch.ones(count, tokens, dtype=torch.bool, device=keys.device).triu(tokens - count + 1)
    attention = torch.stack(
        [
            torch.einsum("whgd,htd->hgwt", q, k).masked_fill_(future, -torch.inf).softmax(dim=-1).sum((1, 2))
            for q, k in zip(observed, keys.float(), strict=True)
        ]
    )
    mid = attention[:, :, geometry.sink_tokens : geometry.mid_end(tokens) * page]
    return select_pages(mid.unflatten(-1, (-1, page)).sum(dim=-1), geometry.retrieved_pages(tokens))
