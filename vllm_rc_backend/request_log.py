"""What decoding read for each finished request, as a log line of the API server; vLLM's stat-logger entry point.

The backend in the worker never learns which request a row belongs to. The front end knows each request's lengths, and
from a length follows what its decode steps read, exactly.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_rc_backend import compat
from vllm_rc_backend.completion.feature_file import layer_completion
from vllm_rc_backend.config import RCTopKConfig
from vllm_rc_backend.selection import make_policy
from vllm_rc_backend.side_store import StoreLayout

logger = logging.getLogger("vllm.rc_topk")


class RequestLog(StatLoggerBase):  # type: ignore[misc]  # vLLM is not typed
    """Logs finished requests if rc_topk decodes and its option ``log_requests`` is on; otherwise does nothing."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.layout: StoreLayout | None = None
        if not compat.uses_rc_topk(vllm_config):
            return
        config = RCTopKConfig.from_additional_config(vllm_config.additional_config)
        if config.log_requests:
            self.layout = layout(config, vllm_config)
            self.writer = ThreadPoolExecutor(1, "rc-topk-requests")

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after each step of the front end."""
        if self.layout is None or iteration_stats is None:
            return
        for request in iteration_stats.finished_requests:
            prompt, generated = request.num_prompt_tokens, request.num_generation_tokens
            # Not here, in the server's event loop: of 32768 tokens it takes a quarter of a second.
            self.writer.submit(self._log, request.request_id, prompt, generated)

    def _log(self, request: str, prompt: int, generated: int) -> None:
        assert self.layout is not None
        logger.info("rc_topk: %s: %s", request, sentence(self.layout, prompt, generated))

    def log_engine_initialized(self) -> None:
        """Nothing to say before there are requests."""


def layout(config: RCTopKConfig, vllm_config: Any) -> StoreLayout:
    """What a sparse layer of this model reads, pages as blocks."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    facts, ranks = model.hf_text_config.to_dict(), parallel.tensor_parallel_size
    return StoreLayout(
        heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        kv_bytes=1 if vllm_config.cache_config.cache_dtype.startswith("fp8") else model.dtype.itemsize,
        slots=0,
        statistics_bits=config.stored_bits,
        geometry=config.geometry(),
        policy=make_policy(config.selection, config.selection_weight),
        completion=layer_completion(config.estimator, config.features_file, facts, 0, 0, ranks),
    )


def sentence(layout: StoreLayout, prompt: int, generated: int) -> str:
    """What the decode steps of a request read; the first token comes out of the prefill.

    Args:
        prompt, generated: tokens.
    """
    lengths = range(prompt + 1, prompt + generated)
    held = sum(lengths)
    reads = [layout.token_equivalents(length) for length in lengths]
    tokens = sum(read["tokens"] for read in reads)
    everything = sum(sum(read.values()) for read in reads)
    sparse = sum(layout.geometry.is_sparse(length) for length in lengths)
    text = f"{prompt} prompt and {generated} generated tokens; {sparse} of {len(lengths)} decode steps sparse"
    if held:
        text += (
            f", read {100 * tokens / held:.1f} % of the tokens, {100 * everything / held:.1f} % of the bytes"
        )
    return text
