"""Write ``docs/supported.md`` from the table below, after a look for the test behind each row."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.families import FAMILIES
from tools.generated import write_or_check
from vllm_rc_backend.compat import SUPPORTED

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "supported.md"
WORKS, DENSE, REFUSED, UNTESTED = "works", "dense fallback", "refused", "not tested"


class Row(NamedTuple):
    """What, with which outcome, and the test behind it (``file::function`` below tests/), where there is one."""

    what: str
    outcome: str
    note: str = ""
    test: str = ""


def family_outcome(sparse: Sequence[bool]) -> str:
    """Of a family, from which of its layers decode sparsely."""
    return WORKS if all(sparse) else f"{WORKS}, some layers {DENSE}" if any(sparse) else DENSE


FAMILY_TEST = "engine/test_families.py::test_family"
REFUSALS = "engine/test_refusals.py::test_models"
EVENTS = "engine/test_events.py"
UNSAFE = "compat/checks.py::check_unsafe_features_are_refused"

TABLES: dict[str, list[Row]] = {
    "vLLM and platforms": [
        Row(f"vLLM {SUPPORTED}", WORKS, "any other version stops the start",
            "compat/checks.py::check_the_version_is_supported_and_others_are_refused"),
        Row("vLLM 0.26.0", WORKS, "registration, configuration and planning, against its sources",
            "compat/test_versions.py::test_compat"),
        Row("vLLM 0.32.0", WORKS, "the whole engine suite, on the CPU", f"{EVENTS}::test_full_budget_equals_dense"),
        Row("vLLM 0.33.0", WORKS, "registration, configuration and planning, against its sources",
            "compat/test_versions.py::test_compat"),
        Row("CPU (x86-64)", WORKS, "reference kernels: right, slow", f"{EVENTS}::test_side_store_is_right"),
        Row("NVIDIA GPU, head sizes 64, 96, 128, 256", WORKS, "needs a GPU to run", "gpu/test_engine.py"),
        Row("AMD, Intel, TPU", UNTESTED, "no kernels of ours have run there"),
        Row("model runner V1", WORKS, "vLLM's CPU build has no other", f"{EVENTS}::test_side_store_is_right"),
        Row("model runner V2", WORKS, "needs a GPU to run", "gpu/test_engine.py"),
    ],
    "Model families": [
        *(Row(f.name, family_outcome(f.sparse), f.note, FAMILY_TEST) for f in FAMILIES),
        Row("RAT+ (RATPlusForCausalLM, ours)", WORKS, "with any backend; [what it is](exponential-memory.md)",
            "engine/test_rat_plus.py::test_every_scheduling_event"),
        Row("RAT+ on a GPU", UNTESTED, "its scan is tested there, the model inside vLLM is not: needs a GPU to run",
            "gpu/test_engine.py::test_rat_plus_is_plain_torch"),
        Row("RAT+ with speculative decoding", REFUSED, "the memory of rejected tokens cannot be taken back",
            "engine/test_rat_plus.py::test_speculation_is_refused"),
        Row("gpt-oss", REFUSED, "attention sinks", "engine/test_families.py::test_gpt_oss_is_refused"),
        Row("DeepSeek (MLA)", REFUSED, "multi-head latent attention", REFUSALS),
        Row("Bloom, MPT (ALiBi)", REFUSED, "position-dependent bias", REFUSALS),
        Row("Gemma2 (logits soft-capping)", REFUSED, "scores are not plain dot products", REFUSALS),
        Row("encoders, encoder-decoders", REFUSED, "not causal", "compat/checks.py::check_refusals_name_their_reason"),
    ],
    "Features": [
        Row("prefix caching", WORKS, "", f"{EVENTS}::test_full_budget_equals_dense"),
        Row("chunked prefill, mixed batches", WORKS, "prefill is always dense",
            f"{EVENTS}::test_full_budget_equals_dense"),
        Row("preemption", WORKS, "", "engine/test_events.py::test_preemption_with_full_budget"),
        Row("n > 1, aborts, disconnects", WORKS, "", "engine/test_server.py::test_vanishing_clients_among_others"),
        Row("structured output, stop strings, logprobs", WORKS, "", "engine/test_server.py::test_features_of_the_api"),
        Row("torch.compile", WORKS, "", "engine/test_events.py::test_torch_compile"),
        Row("killed engines and servers, restarts, full KV cache", WORKS, "",
            "engine/test_faults.py::test_killed_engine_ends_the_server_and_a_restart_serves"),
        Row("LoRA", WORKS, "", "engine/test_features.py::test_lora"),
        Row("prompt embeddings", WORKS, "the way by which images and audio reach a decoder",
            "engine/test_features.py::test_prompt_embeddings"),
        Row("multi-modal prompts", WORKS,
            "tested with sound; models that attend to such tokens in both directions are refused",
            "engine/test_multimodal.py::test_sounds"),
        Row("fp8 KV cache", WORKS, "on CPUs with AVX-512 or AMX, and on GPUs",
            "engine/test_models.py::test_fp8_kv_cache"),
        Row("learned feature maps (completion=features)", WORKS, "on the CPU",
            "engine/test_agreement.py::test_window_and_engine_agree"),
        Row("learned feature maps on a GPU", WORKS, "needs a GPU to run",
            "gpu/test_processes.py::test_tensor_parallel_equals_one_rank"),
        Row("sliding-window layers", DENSE, "a window is a budget of its own",
            "engine/test_models.py::test_sliding_window_layers_stay_dense"),
        Row("dense_layers, dense_threshold", DENSE, "as asked for", "engine/test_events.py::test_options"),
        Row("sleep mode, levels 1 and 2", WORKS, "needs a GPU to run; the plugin's own memory stays on the device",
            "gpu/test_processes.py::test_sleep_frees_the_pool_and_changes_no_answer"),
        Row("speculative decoding", REFUSED, "verification decodes several tokens at once",
            "engine/test_refusals.py::test_speculative_decoding"),
        Row("KV connectors, P/D disaggregation", REFUSED, "pages arrive without statistics",
            "engine/test_refusals.py::test_kv_connector"),
        Row("KV offloading (--kv-offloading-size)", REFUSED, "the same", UNSAFE),
        Row("microbatching (--enable-dbo)", REFUSED, "half batches would share summaries", UNSAFE),
        Row("KV-sharing fast prefill", REFUSED, "", UNSAFE),
        Row("hits within a block (--prefix-match-unit)", REFUSED, "pages arrive as copies without statistics", UNSAFE),
    ],
    "Parallelism": [
        Row("tensor parallel, mp executor", WORKS, "on the CPU",
            "engine/test_models.py::test_tensor_parallel_equals_one_rank"),
        Row("tensor parallel on two GPUs, mp and Ray", WORKS, "needs two GPUs to run",
            "gpu/test_processes.py::test_tensor_parallel_equals_one_rank"),
        Row("tensor parallel, Ray executor", WORKS, "both of vLLM's, on the CPU; see below",
            "engine/test_ray.py::test_actors_answer_as_one_process_does"),
        Row("pipeline parallel", WORKS, "on the CPU not with --enforce-eager: vLLM's own second stage fails there",
            "engine/test_features.py::test_pipeline_parallel_equals_one_rank"),
        Row("replicas of Ray Serve (deploy/ray)", WORKS, "",
            "engine/test_ray.py::test_replicas_of_ray_serve_behind_one_endpoint"),
        Row("data parallel", WORKS, "", "engine/test_features.py::test_data_parallel_behind_one_endpoint"),
        Row("decode context parallel (DCP)", REFUSED, "a rank holds a share of each page", UNSAFE),
        Row("prefill context parallel (PCP)", REFUSED, "the same", UNSAFE),
    ],
}  # fmt: skip

INTRODUCTION = """\
# What is supported

<!-- Written by `make docs` from tools/supported_page.py and tests/families.py. Do not edit. -->

*works*: sparse decode, held to vLLM's own attention by the test. *dense fallback*: these layers or steps run vLLM's
attention. *refused*: the start stops with a message that names the feature and the way out. Tests are below `tests/`.
"""

RAY = """\
## Ray on the CPU

vLLM's CPU platform does not support Ray: its `ray_device_key` is empty, and `initialize_ray_cluster` ends with
`current platform cpu does not support ray`. The tests set it to `GPU` in every process and give Ray two logical GPUs,
which Ray only counts; then both of vLLM's Ray executors run as on a GPU machine. NCCL between actors is tested on a
machine with two GPUs; actors on several nodes are not. The counters of Ray's actors are on `/metrics` where rank 0 runs
on the node of the API server, as vLLM places it; otherwise they are in that worker's log, which says so.

`ray.serve.llm` of Ray 2.56 asks for vLLM 0.22 and does not import with 0.32: `deploy/ray` runs `vllm serve` in replicas
of Ray Serve instead.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(section(title, rows) for title, rows in TABLES.items()), RAY])


def section(title: str, rows: list[Row]) -> str:
    """A heading and a table."""
    lines = [f"## {title}", "", "| what | outcome | note | test |", "|---|---|---|---|"]
    lines += [f"| {r.what} | {r.outcome} | {r.note} | {f'`{r.test}`' if r.test else ''} |" for r in rows]
    return "\n".join([*lines, ""])


def problems() -> Iterator[str]:
    """Rows without the test that they claim."""
    for row in (row for rows in TABLES.values() for row in rows):
        file, _, function = row.test.partition("::")
        if not row.test:
            if row.outcome != UNTESTED:
                yield f"{row.what}: {row.outcome}, without a test"
            continue
        path = ROOT / "tests" / file
        if not path.exists():
            yield f"{row.what}: there is no {path}"
        elif function and function not in functions(path):
            yield f"{row.what}: {path} has no {function}"


def functions(path: Path) -> set[str]:
    """Names of a file's functions."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def checked_page() -> str:
    """The page, if every row has the test that it claims."""
    if wrong := list(problems()):
        raise SystemExit("\n".join(wrong))
    return page()


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, checked_page, __doc__))
