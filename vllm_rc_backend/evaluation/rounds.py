"""Times of one round of answers: several prompts that arrive together, driven step by step.

A time per token that is a difference between runs drowns in what precedes decoding. Here every step of the engine is
timed, and those in which all sequences decode are kept apart from the rest.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SETTLED = 4
"""Steps with all sequences decoding that are left out: they build summaries, fill caches."""

_names = itertools.count()


@dataclass(frozen=True)
class Round:
    """Seconds of one round.

    Attributes:
        first: until every sequence has its first token.
        settling: the steps of all sequences that are left out of ``steps``.
        total: until every sequence has its last.
        steps: each step between two in which all sequences got a token.
        together: the most sequences that got a token in one step.
        answers: tokens that were generated, by prompt.
    """

    first: float
    settling: float
    total: float
    steps: list[float]
    together: int
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        """That were generated."""
        return sum(len(answer) for answer in self.answers)


def answer_all(
    llm: Any, prompts: list[list[int]], params: Any, settled: Callable[[], None] = lambda: None
) -> Round:
    """Let an engine answer prompts.

    Args:
        llm: vLLM's ``LLM``. With its engine in another process a step is what lies between two of its answers.
        params: vLLM's ``SamplingParams``, of all.
        settled: called once, when all have been decoding for ``SETTLED`` steps.
    """
    engine = llm.llm_engine
    begun = last = time.perf_counter()
    names = [f"round-{next(_names)}" for _ in prompts]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    said: dict[str, list[int]] = {}
    first, settling, together, full, steps = 0.0, 0.0, 0, 0, []
    while engine.has_unfinished_requests():
        grown = 0
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            grown += len(tokens) > len(said.get(output.request_id, []))
            said[output.request_id] = tokens
        now = time.perf_counter()
        if len(said) == len(prompts) and not first:
            first = now - begun
        together = max(together, grown)
        full = full + 1 if grown == len(prompts) else 0
        if 0 < full <= SETTLED:
            settling += now - last
        if full == SETTLED:
            settled()
            now = time.perf_counter()
        elif full > SETTLED:
            steps.append(now - last)
        last = now
    return Round(first, settling, last - begun, steps, together, [said[name] for name in names])
