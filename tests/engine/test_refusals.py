"""What cannot be served right is refused at start, with the cause and the way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ..harness import MODEL, engine

TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def start(options: dict[str, Any] | None = None, **kwargs: Any) -> None:
    with engine("rc_topk", options, **({"max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20} | kwargs)):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bugdet": 256}, ["bugdet", "256", "Did you mean budget"]),
        ({"budget": 40}, ["budget", "40", "63 or more"]),
        ({"selection": "quest"}, ["selection", "quest", "box"]),
        ({"completion": "linaer"}, ["completion", "Did you mean linear"]),
        ({"dense_layers": [0, 6]}, ["dense_layers", "[0, 6]", "layers 0 to 5"]),
        ({"kv_residency": "host"}, ["host_kv_gib", "None", "a number above 0"]),
        ({"page_size": 64, "sink_tokens": 0, "budget": 512}, ["page_size", "64", "--block-size 64"]),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], words: list[str]) -> None:
    settings = {"block_size": 32} if "page_size" in options else {}
    with pytest.raises(Exception) as error:  # noqa: PT011 - vLLM wraps it; the words are what counts
        start(options, **settings)
    text = _chain(error.value)
    assert all(word in text for word in words), text


def test_kv_connector() -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011
        start(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    assert "KV connector" in _chain(error.value)


def test_speculative_decoding() -> None:
    # In a process of its own: vLLM loads numba for this, and cannot start another engine on a CPU after that.
    flag = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    command = (
        f"vllm.LLM({MODEL!r}, attention_backend='rc_topk', max_model_len=1024, kv_cache_memory_bytes=1 << 25, "
        f"speculative_config={flag})"
    )
    done = subprocess.run([sys.executable, "-c", f"import vllm; {command}"], capture_output=True, text=True)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "speculative decoding" in text
    assert "--speculative-config" in text
    assert "start without --attention-backend rc_topk" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            TINY | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
                    "final_logit_softcapping": None, "sliding_window": 4096, "query_pre_attn_scalar": 64,
                    "hidden_activation": "gelu_pytorch_tanh"},
            ["soft-capping at 50"],
        ),
        (
            TINY | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 128,
                    "q_lora_rank": None, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
                    "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
                    "first_k_dense_replace": 2,
                    "moe_intermediate_size": 64, "rope_theta": 10000.0},
            ["MLA"],
        ),
        (
            {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 4096, "hidden_size": 256,
             "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-5, "bos_token_id": 0, "eos_token_id": 1,
             "seq_length": 2048},
            ["ALiBi"],
        ),
    ],
    ids=["softcap", "mla", "alibi"],
)  # fmt: skip
def test_models(config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception) as error:  # noqa: PT011
        start(model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True)
    text = _chain(error.value)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"head_size": 48}, "head_size"),
        ({"dtype": torch.float64}, "dtype"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder"),
        ({"attn_type": "encoder"}, "encoder"),
        ({"use_mla": True}, "MLA"),
        ({"has_sink": True}, "sinks"),
        ({"use_kv_connector": True}, "KV connector"),
        ({"use_non_causal": True}, "non-causal"),
        ({"use_mm_prefix": True}, "multimodal"),
    ],
    ids=str,
)
def test_layers(changes: dict[str, Any], word: str) -> None:
    """What vLLM asks a backend before it builds a layer; a reason stops the start."""
    from vllm_rc_backend.backend import RCTopKBackend

    plain = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 128,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": "decoder",
    }
    assert RCTopKBackend.validate_configuration(**plain) == []
    (reason,) = RCTopKBackend.validate_configuration(**(plain | changes))
    assert word in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
    ids=str,
)
def test_parallelism_and_offloading(changes: dict[str, Any], words: str) -> None:
    """Features that a machine without a GPU cannot start at all: the check itself."""
    from vllm_rc_backend import compat

    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "use_ubatching": False}
    cache = {"kv_offloading_size": None, "kv_sharing_fast_prefill": False}

    def config(**changed: Any) -> SimpleNamespace:
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**{k: changed.get(k, v) for k, v in parallel.items()}),
            cache_config=SimpleNamespace(**{k: changed.get(k, v) for k, v in cache.items()}),
            speculative_config=None,
            kv_transfer_config=None,
        )

    compat.check_engine(config())
    with pytest.raises(compat.UnsupportedError, match=words):
        compat.check_engine(config(**changes))


def test_unsupported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from vllm_rc_backend import compat

    monkeypatch.setattr(vllm, "__version__", "0.25.1")
    with pytest.raises(compat.UnsupportedError, match=r"0\.25\.1 is not supported; supported: .*0\.26"):
        compat.check_version()


def test_defaults_start(caplog: pytest.LogCaptureFixture) -> None:
    """The refusals above are not refusals of everything."""
    start(model=MODEL)


def _chain(error: BaseException | None) -> str:
    """The messages of an exception and of all that led to it."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
