"""RAT+ on real vLLM: whatever the scheduler does, the answers are those of plain torch over each whole sequence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rc_backend.evaluation.llama import Llama

from ..harness import FULL, SCENARIOS, Prompt, engine, greedy
from ..rat_plus import assert_plain, write_rat_plus
from .conftest import Audit


@pytest.fixture(scope="module")
def rat_plus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rat_plus(tmp_path_factory.mktemp("rat_plus"))


@pytest.fixture(scope="module")
def plain(rat_plus: Path) -> Llama:
    return Llama(rat_plus, "cpu", torch.float32)


@pytest.mark.parametrize(("backend", "caching"), [("CPU_ATTN", True), ("CPU_ATTN", False), ("rc_topk", True)])
def test_every_scheduling_event(
    backend: str,
    caching: bool,
    rat_plus: Path,
    plain: Llama,
    prompt: Prompt,
    audit: Audit,
    always_sparse: None,
) -> None:
    with engine(backend, FULL, model=str(rat_plus), enable_prefix_caching=caching) as llm:
        for scenario in SCENARIOS:
            outputs = scenario(llm, prompt)
            assert_plain(outputs, plain)
            if scenario.__name__ == "prefix_hits":
                assert any(output.num_cached_tokens for output in outputs) == caching
    if backend == "rc_topk":
        audit.assert_right()


def test_preemption(rat_plus: Path, plain: Llama, prompt: Prompt) -> None:
    prompts = [prompt(500 + 60 * i, i) for i in range(6)]
    settings = {"model": str(rat_plus), "max_model_len": 1024, "num_gpu_blocks_override": 40}
    with engine("CPU_ATTN", **settings) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempted, preempt = [], scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            preempted.append(1)
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted
        assert_plain(llm.generate(prompts, greedy(100), use_tqdm=False), plain)
        assert preempted, "the pool was large enough; the test tests nothing"


def test_torch_compile(rat_plus: Path, plain: Llama, prompt: Prompt) -> None:
    with engine("CPU_ATTN", model=str(rat_plus), enforce_eager=False) as llm:
        assert_plain(llm.generate([prompt(300, 1), prompt(700, 2)], greedy(20), use_tqdm=False), plain)


def test_gpu_path_interpreted(rat_plus: Path) -> None:
    """What runs on a GPU, by Triton's interpreter, under vLLM's real metadata; in a process of its own.

    Chunked prefills beside decodes, a prompt of one token, and a prefix hit.
    """
    pytest.importorskip("triton")
    script = Path(__file__).parent / "rat_plus_interpreted.py"
    done = subprocess.run(
        [sys.executable, script, rat_plus],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_tensor_parallel(
    rat_plus: Path, plain: Llama, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, each with one KV head, its gates and its memory."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = {"model": str(rat_plus), "tensor_parallel_size": 2, "kv_cache_memory_bytes": 64 << 20}
    with engine("rc_topk", FULL, **settings) as llm:
        assert_plain(llm.generate([prompt(300, 1), prompt(150, 2)], greedy(12), use_tqdm=False), plain)


def test_ranks_that_split_a_head_are_refused(rat_plus: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_rc_backend.compat import UnsupportedError
    from vllm_rc_backend.models.rat_plus import RATPlusForCausalLM

    config = EngineArgs(model=str(rat_plus), dtype="float32").create_engine_config()
    config.parallel_config.tensor_parallel_size = 4
    with pytest.raises(UnsupportedError, match="--tensor-parallel-size 4"):
        RATPlusForCausalLM(vllm_config=config)


def test_speculation_is_refused(rat_plus: Path) -> None:
    # In a process of its own: vLLM loads numba for this, and cannot start another engine on a CPU after that.
    flag = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    command = (
        f"vllm.LLM({str(rat_plus)!r}, attention_backend='CPU_ATTN', max_model_len=512, "
        f"kv_cache_memory_bytes=1 << 25, skip_tokenizer_init=True, speculative_config={flag})"
    )
    done = subprocess.run([sys.executable, "-c", f"import vllm; {command}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "memory of rejected tokens" in done.stdout + done.stderr
