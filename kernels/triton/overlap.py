"""Waiting: for the kernel before this one, and for other programs of the same one.

Programmatic dependent launch: a kernel may start while the one before it in the stream still runs. Within a layer,
attention gets ready while scoring finishes. It waits before it reads, so when a kernel is done all before it are. Needs
compute capability 9.
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


ARRIVAL = tl.constexpr(32)
"""Numbers per counter of arrivals: each has a line of the second-level cache for itself."""

WAIT = tl.constexpr("""
{
    .reg .pred p;
    .reg .u32 seen;
    mov.u32 seen, %tid.x;
    setp.ne.u32 p, seen, 0;
    @p bra DONE;
AGAIN:
    ld.acquire.gpu.global.u32 seen, [$1];
    setp.lt.u32 p, seen, $2;
    @p bra AGAIN;
DONE:
    mov.u32 $0, 0;
}
""")
"""One thread asks, so that the others' asking does not hold up those who are waited for."""


@triton.jit
def wait_for_count(counter, count):
    """Until other programs of this launch have brought an int32 counter to ``count``; then what they wrote before can
    be read. They must run at the same time, or this never ends."""
    tl.inline_asm_elementwise(WAIT, "=r,l,r", [counter, count], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


PASS = tl.constexpr("""
{
    .reg .pred first;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    mov.u32 $0, 0;
    @first atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
}
""")


@triton.jit
def count_up(counter):
    """Add 1 to an int32 counter and do not wait for the answer: what it was before, in one thread, for ``clear_after``
    only."""
    return tl.inline_asm_elementwise(PASS, "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1)


CLEAR = tl.constexpr("""
{
    .reg .pred last;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 last, thread, 0;
    setp.eq.and.u32 last, $1, $2, last;
    @last st.relaxed.gpu.global.u32 [$3], 0;
    @last st.relaxed.gpu.global.u32 [$4], 0;
    @last st.relaxed.gpu.global.u32 [$5], 0;
    mov.u32 $0, 0;
}
""")


@triton.jit
def clear_after(count, last, first_counter, second_counter, third_counter):
    """Set three int32 counters to zero, in the program to which ``count_up`` gave ``last``."""
    tl.inline_asm_elementwise(
        CLEAR,
        "=r,r,r,l,l,l",
        [count, last, first_counter, second_counter, third_counter],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
