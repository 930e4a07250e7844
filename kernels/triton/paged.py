"""Addresses in a paged KV cache ``[block, head, token, K then V]`` of any strides, in 64 bits."""

import triton
import triton.language as tl


@triton.jit
def page_in(block, page, g: tl.constexpr):
    """Physical page ids of logical pages that are in these blocks."""
    return block * g.pages_per_block + page % g.pages_per_block


@triton.jit
def page_of(block_table, page, mask, g: tl.constexpr):
    """Physical page ids of logical pages; ``block_table`` points to the row."""
    return page_in(tl.load(block_table + page // g.pages_per_block, mask=mask, other=0), page, g)


@triton.jit
def page_rows(page, token, stride_block, stride_token, g: tl.constexpr):
    """Element offsets of tokens (numbered within their page) of physical pages."""
    block = (page // g.pages_per_block).to(tl.int64)
    place = (page % g.pages_per_block) * g.page_size + token
    return block * stride_block + place.to(tl.int64) * stride_token


@triton.jit
def token_blocks(block_table, token, mask, g: tl.constexpr):
    """Blocks of a sequence's tokens."""
    return tl.load(block_table + token // g.block_size, mask=mask, other=0)


@triton.jit
def block_rows(block, token, stride_block, stride_token, g: tl.constexpr):
    """Element offsets of a sequence's tokens that are in these blocks."""
    return block.to(tl.int64) * stride_block + (token % g.block_size).to(tl.int64) * stride_token


@triton.jit
def token_rows(block_table, token, mask, stride_block, stride_token, g: tl.constexpr):
    """Element offsets of a sequence's tokens."""
    block = token_blocks(block_table, token, mask, g)
    return block_rows(block, token, stride_block, stride_token, g)
