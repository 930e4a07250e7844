"""The same rows through real vLLM: the engine decodes the window of each sample, one token at a time.

A logits processor makes the engine say the true next token and keeps the distribution that it had computed. So every
position of the window is a decode step of the attention under test, for plain text as for answers, and an answer is
matched exactly if greedy decoding would have given it. The engine runs in this process, on one device.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_rc_backend.config import KEY, RCTopKConfig
from vllm_rc_backend.evaluation.measure import PerSample, Result, compare, summarise
from vllm_rc_backend.evaluation.samples import Drawn

VERSION: str = vllm.__version__
ARGUMENT = "rc_topk_forced"


@dataclass
class Forced:
    """One sample's window, as a logits processor of its request.

    Attributes:
        tokens: what the engine is to say.
        counted: which of them count; never the first, whose distribution is the prefill's.
        kept: float32 log-probabilities ``[vocabulary]`` by place in ``tokens``.
    """

    tokens: list[int]
    counted: list[bool]
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, said: list[int], logits: Tensor) -> Tensor:
        step = len(said)
        if self.counted[step]:
            self.kept[step] = logits.float().log_softmax(dim=-1).cpu()
        logits.fill_(-torch.inf)
        logits[self.tokens[step]] = 0
        return logits

    @property
    def log_p(self) -> Tensor:
        """``[counted, vocabulary]``."""
        return torch.stack([self.kept[step] for step, counts in enumerate(self.counted) if counts])


_requests: list[Forced] = []
"""Those of the running ``decode``; a request names its own by number."""


class TeacherForcing(AdapterLogitsProcessor):  # type: ignore[misc]
    """Hands each request its ``Forced``."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Forced | None:
        place = (params.extra_args or {}).get(ARGUMENT)
        return None if place is None else _requests[place]


@contextmanager
def start(
    model: Path, options: RCTopKConfig | None, context: int, batch: int, arguments: Mapping[str, Any]
) -> Iterator[LLM]:
    """An engine, torn down at the end.

    Args:
        options: of the backend; None for vLLM's own choice of a dense one.
        arguments: further ones of ``vllm.LLM``.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    # In this process, where the distributions are kept; and model runner V2 has logits processors of another kind.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    backend: dict[str, Any] = {}
    if options is not None:
        config = asdict(options) | {"log_interval": 0}
        backend = {"attention_backend": "rc_topk", "additional_config": {KEY: config}}
    llm = LLM(
        model=str(model),
        max_model_len=context,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        async_scheduling=False,
        logits_processors=[TeacherForcing],
        disable_log_stats=True,
        **backend,
        **arguments,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def decode(llm: LLM, drawn: Drawn) -> list[Tensor]:
    """Log-probabilities of each sample's counted tokens, float32 ``[counted, vocabulary]``, on the host."""
    start = drawn.tokens.shape[1] - drawn.window
    _requests[:] = [
        Forced(tokens, counted)
        for tokens, counted in zip(
            drawn.tokens[:, start:].tolist(), drawn.answers[:, start:].tolist(), strict=True
        )
    ]
    prompts = [{"prompt_token_ids": tokens} for tokens in drawn.tokens[:, :start].tolist()]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=drawn.window,
            ignore_eos=True,
            detokenize=False,
            extra_args={ARGUMENT: place},
        )
        for place in range(len(prompts))
    ]
    llm.generate(prompts, params, use_tqdm=False)
    return [request.log_p for request in _requests]


def measure(drawn: Drawn, dense: list[Tensor], found: list[Tensor]) -> Result:
    """A row from what ``decode`` gave for dense attention and for the one under test."""

    def one(tokens: Tensor, answers: Tensor, expected: Tensor, log_p: Tensor) -> PerSample:
        targets = tokens[answers].unsqueeze(0)
        return compare(
            expected.unsqueeze(0), log_p.unsqueeze(0), targets, torch.ones_like(targets, dtype=torch.bool)
        )

    return summarise([one(*sample) for sample in zip(drawn.tokens, drawn.answers, dense, found, strict=True)])
