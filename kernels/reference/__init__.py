"""The definition of every kernel in plain torch, float32, one row at a time: what the fast kernels are held to."""

from vllm_rc_backend.kernels.reference.decode import complete_softmax, damp, decode_dense, decode_sparse
from vllm_rc_backend.kernels.reference.memory import linear_scan, memory_step
from vllm_rc_backend.kernels.reference.page_cache import CachedKV, PageCache, Traffic, written_pages
from vllm_rc_backend.kernels.reference.paged import PagedKV
from vllm_rc_backend.kernels.reference.select import (
    check_group_rule,
    reduce_group,
    score_pages,
    select_pages,
    unread_log_mass,
)
from vllm_rc_backend.kernels.reference.statistics import (
    STATISTICS_DTYPES,
    STATISTICS_SCALE_BYTES,
    decode_statistics,
    encode_statistics,
    finish_pages,
    finished_pages,
    round_query,
)
from vllm_rc_backend.kernels.reference.summary import (
    SummaryPlan,
    SummaryTags,
    absorb_pages,
    plan_summaries,
    read_state,
)

__all__ = [
    "STATISTICS_DTYPES",
    "STATISTICS_SCALE_BYTES",
    "CachedKV",
    "PageCache",
    "PagedKV",
    "SummaryPlan",
    "SummaryTags",
    "Traffic",
    "absorb_pages",
    "check_group_rule",
    "complete_softmax",
    "damp",
    "decode_dense",
    "decode_sparse",
    "decode_statistics",
    "encode_statistics",
    "finish_pages",
    "finished_pages",
    "linear_scan",
    "memory_step",
    "plan_summaries",
    "read_state",
    "reduce_group",
    "round_query",
    "score_pages",
    "select_pages",
    "unread_log_mass",
    "written_pages",
]
