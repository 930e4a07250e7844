"""Programmatic dependent launch: a kernel may start while the one before it in the stream still runs.

Within a layer, ``select`` starts with ``update``, of which it needs nothing, and ``decode`` gets ready while ``select``
finishes. Each waits before it ends or reads, so when a kernel is done all before it are. Needs compute capability 9.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def let_next_start(ON: tl.constexpr):
    """The next kernel may start once every program of this one has got here."""
    if ON:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(ON: tl.constexpr):
    """Until the kernel before this one is done and what it wrote can be read."""
    if ON:
        cuda.gdc_wait()
