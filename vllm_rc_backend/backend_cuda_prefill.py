"""Prefill with the KV pages in host memory: attention over the chunk itself, then over what came before, in pieces.

FlashAttention reads K and V once for every tile of queries, which over the bus would be most of a prefill. The chunk's
own K and V are on the device anyway; earlier tokens are copied through a buffer there. Each part leaves its
log-sum-exp, by which two parts are merged ("Online normalizer calculation for softmax", arXiv 1805.02867).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_rc_backend.host_kv.staging import Staging


def staged_prefill(
    impl: Any,
    staging: Staging,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    max_query_len: int,
    longest_context: int,
    output: Tensor,
) -> None:
    """Causal attention of rows with several new tokens.

    Args:
        impl: vLLM's FlashAttention implementation object, for its constants.
        query: ``[tokens, query_heads, head_size]``.
        key, value: ``[tokens, heads, head_size]``, this step's.
        pool: ``[blocks, heads, block_size, 2 * head_size]``, this step's tokens written.
        block_table: int32 ``[rows, max_blocks]``.
        seq_lens: int32 ``[rows]``, this step's tokens included.
        query_start: int32 ``[rows + 1]``, beginning with 0.
        max_query_len, longest_context: upper bounds of the new and the earlier tokens of a row.
        output: ``[tokens, query_heads, head_size]``, out.
    """
    common = {
        "softmax_scale": impl.scale,
        "cu_seqlens_q": query_start,
        "max_seqlen_q": max_query_len,
        "fa_version": impl.vllm_flash_attn_version,
        "return_softmax_lse": True,
    }
    done, lse = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        cu_seqlens_k=query_start,
        max_seqlen_k=max_query_len,
        causal=True,
        **common,
    )
    room = staging.room(len(seq_lens))
    for first in range(0, longest_context, room):
        keys, values, table, lengths = staging.copy(pool, block_table, seq_lens, query_start, first)
        part, part_lse = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            seqused_k=lengths,
            max_seqlen_k=min(room, longest_context - first),
            block_table=table,
            causal=False,
            **common,
        )
        merged, merged_lse = torch.empty_like(done), torch.empty_like(lse)
        merge_attn_states(merged, part, part_lse, done, lse, output_lse=merged_lse)
        done, lse = merged, merged_lse
    output.copy_(done)
