"""The batch shapes that vLLM's own tests put its attention backends through, against plain attention by torch.

Our backend is made as vLLM makes it, layer, metadata builder and all, but stands alone: the keys and values are random
numbers, and so are the blocks that they lie in. With a budget that covers the context nothing is left to estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .harness import FULL, MODEL

SHAPES = {
    "small decode": ([32, 40], [1, 1]),
    "small prefill": ([32, 40], [8, 8]),
    "small mixture": ([32, 40, 48, 56], [1, 1, 5, 5]),
    "medium decode": ([128, 256, 512, 1024] * 2, [1] * 8),
    "medium prefill": ([256, 512, 1024, 2048], [16] * 4),
    "medium mixture": ([512, 1024, 2048] * 2, [1] * 3 + [7] * 3),
    "large decode": ([2048] * 32, [1] * 32),
    "large prefill": ([4096] * 8, [32] * 8),
    "large mixture": ([1024, 2048, 4096] * 2, [1] * 3 + [32] * 3),
    "one decode": ([1024], [1]),
    "one prefill": ([1024], [64]),
}
"""Tokens of each row, and how many of them are new. vLLM has two more, of encoders, which we refuse."""


def check_shape(
    name: str, heads: int, kv_heads: int, head_size: int, device: str, dtype: torch.dtype, tolerance: float
) -> None:
    """A step that prefills all contexts, and then one of this shape: every row beside plain attention.

    Args:
        tolerance: of a row's output, relative to its norm.
    """
    seq_lens, query_lens = SHAPES[name]
    layer = Layer(heads, kv_heads, head_size, device, dtype, seq_lens)
    contexts = [n - q for n, q in zip(seq_lens, query_lens, strict=True)]
    for lengths, new in ((contexts, contexts), (seq_lens, query_lens)):
        for row, (got, expected) in enumerate(layer.step(lengths, new)):
            assert not got.isnan().any(), f"row {row} of {name}: not all of the output was written"
            error = float((got.float() - expected).norm() / expected.norm())
            assert error < tolerance, f"row {row} of {name}: off by {error:.1e}"


class Layer:
    """One attention layer of an engine that is not there, with rows of random tokens."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_size: int,
        device: str,
        dtype: torch.dtype,
        seq_lens: list[int],
    ) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.attention import Attention

        size = 128 if device == "cpu" else 16
        width = -(-max(seq_lens) // size)
        blocks = 1 + len(seq_lens) * width
        self.config = EngineArgs(
            model=MODEL,
            attention_backend="rc_topk",
            additional_config={"rc_topk": FULL | {"log_interval": 0}},
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max(seq_lens),
            max_num_seqs=len(seq_lens),
            block_size=size,
            num_gpu_blocks_override=blocks,
            hf_overrides={
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": head_size,
            },
        ).create_engine_config()
        self.config.cache_config.num_gpu_blocks = blocks
        name, self.device = "model.layers.0.self_attn.attn", torch.device(device)
        cache = self.config.cache_config
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with set_current_vllm_config(self.config), self.device:
                self.layer = Attention(
                    heads, head_size, head_size**-0.5, kv_heads, cache_config=cache, prefix=name
                )
        finally:
            torch.set_default_dtype(before)
        with set_current_vllm_config(self.config):
            self.layer.process_weights_after_loading(dtype)
            builder = self.layer.attn_backend.get_builder_cls()
            spec = self.layer.get_kv_cache_spec(self.config)
            self.builder = builder(spec, [name], self.config, self.device)
        self.size = size
        # Each platform's usual order of a block's tokens and heads.
        middle = (kv_heads, size) if device == "cpu" else (size, kv_heads)
        self.kv_cache = torch.zeros(blocks, *middle, 2 * head_size, dtype=dtype, device=device)
        if device != "cpu":
            self.kv_cache = self.kv_cache.transpose(1, 2)
        ids = torch.randperm(blocks - 1, device=device)[: len(seq_lens) * width] + 1  # block 0 is nobody's
        self.table = ids.view(len(seq_lens), width).int()
        shape = len(seq_lens), max(seq_lens)
        self.queries, self.keys, self.values = (
            torch.randn(*shape, n, head_size, device=device).to(dtype) for n in (heads, kv_heads, kv_heads)
        )

    def step(self, seq_lens: list[int], query_lens: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each row's output, and what plain attention gives in float32: ``[new tokens, heads, head_size]``."""
        from vllm.config import set_current_vllm_config

        rows = range(len(seq_lens))
        places = [torch.arange(seq_lens[r] - query_lens[r], seq_lens[r], device=self.device) for r in rows]
        query, key, value = (
            torch.cat([x[r, places[r]] for r in rows]) for x in (self.queries, self.keys, self.values)
        )
        slots = torch.cat(
            [self.table[r, places[r] // self.size] * self.size + places[r] % self.size for r in rows]
        )
        common = self._common(seq_lens, query_lens, slots.long())
        out, impl = torch.full_like(query, torch.nan), self.layer.impl
        with set_current_vllm_config(self.config):
            impl.do_kv_cache_update(self.layer, key, value, self.kv_cache, common.slot_mapping)
            out = impl.forward(
                self.layer, query, key, value, self.kv_cache, self.builder.build(0, common), out
            )
        for row, got in zip(rows, out.split(query_lens), strict=True):
            yield got, self._plain(row, seq_lens[row], query_lens[row])

    def _plain(self, row: int, seq_len: int, query_len: int) -> Tensor:
        keys, values = (x[row, :seq_len].float().transpose(0, 1) for x in (self.keys, self.values))
        query = self.queries[row, seq_len - query_len : seq_len].float().transpose(0, 1)
        causal = torch.ones(query_len, seq_len, dtype=torch.bool, device=self.device).tril(
            seq_len - query_len
        )
        out = functional.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=causal, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _common(self, seq_lens: list[int], query_lens: list[int], slots: Tensor) -> Any:
        """vLLM's description of the step, in the fields that this vLLM has."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32)
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        values = {
            "query_start_loc": starts.to(self.device),
            "query_start_loc_cpu": starts,
            "seq_lens": lengths.to(self.device),
            "seq_lens_cpu_upper_bound": lengths,
            "num_reqs": len(seq_lens),
            "num_actual_tokens": sum(query_lens),
            "max_query_len": max(query_lens),
            "max_seq_len": max(seq_lens),
            "block_table_tensor": self.table,
            "slot_mapping": slots,
            "causal": True,
        }
        known = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
        return CommonAttentionMetadata(**{k: v for k, v in values.items() if k in known})
