"""Waiting: for the kernel before this one, and for other programs of the same one.

Programmatic dependent launch: a kernel may start while the one before it in the stream still runs. Within a layer,
scoring starts with ``update``, of which it needs nothing, and attention gets ready while scoring finishes. Each waits
before it ends or reads, so when a kernel is done all before it are. Needs compute capability 9.
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


@triton.jit
def wait_for_count(counter, count):
    """Until other programs of this launch have brought an int32 counter to ``count``; then what they wrote before can
    be read. They must run at the same time, or this never ends."""
    while _acquire(counter) < count:
        pass
    tl.debug_barrier()


@triton.jit
def _acquire(pointer):
    """Every thread reads by itself: an atomic operation would be done by one and handed on through shared memory."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )
