"""Run by test_rat_plus.py in a process with TRITON_INTERPRET=1: the memory's GPU path on the CPU platform."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.harness import engine, greedy, run
from tests.rat_plus import assert_plain
from vllm_rc_backend.evaluation.llama import Llama
from vllm_rc_backend.models.memory import DecayingMemory


def main(model: str) -> None:
    """Raises unless the answers are those of plain torch."""
    DecayingMemory.forward_native = DecayingMemory.forward_cuda  # type: ignore[method-assign]
    tokens = torch.randint(3, 4096, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = {"a": 150, "b": 40, "c": 1, "d": 150}
    arrivals = [
        (step, name, {"prompt_token_ids": [0, *tokens[: length - 1]]}, greedy(4, detokenize=False))
        for step, (name, length) in zip((0, 1, 2, 6), lengths.items(), strict=True)
    ]
    with engine("CPU_ATTN", model=model, max_num_batched_tokens=64, max_model_len=512) as llm:
        outputs = run(llm, arrivals, {})
    assert outputs[3].num_cached_tokens == 128
    # Plain torch prefills at least one token before the first that it compares.
    assert_plain(
        [o for o in outputs if len(o.prompt_token_ids) > 1], Llama(Path(model), "cpu", torch.float32)
    )


if __name__ == "__main__":
    main(sys.argv[1])
