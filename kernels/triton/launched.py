"""How kernels are compiled that are launched with what differs from step to step."""

import triton

VARYING = (
    "attenders",
    "block_table",
    "filled",
    "hand",
    "layers",
    "most_windows",
    "page_slot",
    "plan_first",
    "plan_last",
    "plan_slot",
    "plan_source",
    "query_start",
    "rows",
    "scorers",
    "seq_lens",
    "slot_key",
    "stride_table",
    "used",
)
"""Arguments that no kernel is specialised on. Triton makes kernels of their own for numbers that are 1 or multiples of
16, and for tensors that do not start at multiples of 16 bytes, as the rows of prefills behind those of decodes or the
page cache's directory of any layer but the first; each would be compiled when it first occurs, while requests wait. It
would gain nothing: these are read one by one."""

launched = triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING)
"""In place of ``triton.jit`` for a kernel that the host launches."""
