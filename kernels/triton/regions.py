"""Device twin of ``kernels.geometry.Geometry``: the regions of a sequence from its length.

Triton's integer division truncates and Python's floors; they differ only for negative quotients, which every use here
clamps away.
"""

import triton
import triton.language as tl


@triton.jit
def mid_end(seq_len, g: tl.constexpr):
    """One past the last page of the mid region."""
    return tl.maximum(g.sink_pages, (seq_len - g.tail_tokens) // g.page_size)


@triton.jit
def retrieved_pages(seq_len, g: tl.constexpr):
    """Pages of the mid region that the budget pays for."""
    end = mid_end(seq_len, g)
    if g.budget >= 1:
        budget = g.budget
    else:
        # Python multiplies in double precision and truncates, and so does this.
        budget = (seq_len.to(tl.float64) * tl.full([], g.budget, tl.float64)).to(tl.int32)
    anchors = g.sink_tokens + seq_len - end * g.page_size
    return tl.minimum(tl.maximum((budget - anchors) // g.page_size, 1), end - g.sink_pages)


@triton.jit
def is_sparse(seq_len, g: tl.constexpr):
    """Whether a decode at this length leaves anything unread."""
    return (seq_len > g.dense_threshold) & (retrieved_pages(seq_len, g) < mid_end(seq_len, g) - g.sink_pages)
