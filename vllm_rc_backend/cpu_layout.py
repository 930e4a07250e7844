"""Where vLLM's CPU kernels keep an element of K or V inside a block.

The order depends on the instruction set (K is transposed, or tiled for AMX), and no Python code states it. So it is
read off the kernel that writes the cache: tokens whose elements encode their own position are written to a block, and
what stands where afterwards is the map.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from vllm import _custom_ops as ops

DIGIT = 16
"""Base of the encoding: 0 to 15 are exact in every cache dtype, float8 included."""


@functools.cache
def block_layout(
    isa: str,
    dtype: torch.dtype,
    kv_cache_dtype: str,
    cache_dtype: torch.dtype,
    block_size: int,
    head_size: int,
) -> tuple[Tensor, Tensor]:
    """Positions of K and V in the flattened content of one (block, head).

    Args:
        isa: vLLM's name of the kernel variant.
        dtype: of keys and values as the model computes them.
        kv_cache_dtype: vLLM's name, ``auto`` or an fp8 one.
        cache_dtype: of the cache tensor.

    Returns:
        Two int64 tensors ``[block_size, head_size]`` into ``2 * block_size * head_size`` elements.
    """
    elements = block_size * head_size
    number = torch.arange(elements).view(block_size, 1, head_size)
    slots = torch.arange(block_size)
    decoded = torch.zeros(2, elements, dtype=torch.long)
    power = 1
    while power < elements:
        digit = (number // power % DIGIT).to(dtype)
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=cache_dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            digit, digit, key_cache, value_cache, slots, isa, 1.0, 1.0, kv_cache_dtype=kv_cache_dtype
        )
        decoded += as_numbers(cache, kv_cache_dtype).view(2, elements).long() * power
        power *= DIGIT
    keys, values = decoded
    everything = torch.arange(elements)
    if not (torch.equal(keys.sort().values, everything) and torch.equal(values.sort().values, everything)):
        raise RuntimeError(
            f"rc_topk: the CPU kernel {isa} does not write a plain permutation of keys and values for head size "
            f"{head_size}, block size {block_size}, {kv_cache_dtype}; this CPU is not supported."
        )
    return (
        keys.argsort().view(block_size, head_size),
        elements + values.argsort().view(block_size, head_size),
    )


def as_numbers(cache: Tensor, kv_cache_dtype: str) -> Tensor:
    """The cache in a dtype that torch computes with: vLLM keeps fp8 as bytes."""
    if not kv_cache_dtype.startswith("fp8"):
        return cache
    return cache.view(torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn)
