"""Ray's real runtime under vLLM's real Ray executors, on the CPU.

vLLM's CPU platform names no Ray resource (``ray_device_key``), so its Ray executors refuse to start there. The tests
name one for it, in every process: logical GPUs, which Ray only counts. Everything else is what a GPU machine runs: the
placement group, the actors, the configuration pickled into them, the environment they get.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import httpx
import openai
import psutil
import pytest
from prometheus_client import REGISTRY

from vllm_rc_backend.observability import metrics

from ..harness import MODEL, SMALL, Answer, Prompt, answers, assert_same, engine, greedy
from ..serving import eventually

ray = pytest.importorskip("ray")

# Actors import neither this module nor, with it, the plugin.
for library in (cloudpickle, ray.cloudpickle):
    library.register_pickle_by_value(sys.modules[__name__])

VLLM = Path(sys.executable).parent / "vllm"
SERVE_APP = Path(__file__).parents[2] / "deploy" / "ray"
POOL = {"kv_cache_memory_bytes": 64 << 20}


def name_a_ray_resource() -> None:
    """Runs in every Ray worker process before anything else."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        from vllm.platforms.cpu import CpuPlatform

        patch.setattr(CpuPlatform, "ray_device_key", "GPU")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        patch.setenv("PATH", f"{VLLM.parent}{os.pathsep}{os.environ['PATH']}")
        patch.syspath_prepend(SERVE_APP)
        patch.setenv("PYTHONPATH", str(SERVE_APP))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=2,
            object_store_memory=128 << 20,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": name_a_ray_resource},
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def prompts(prompt: Prompt) -> list[dict[str, list[int]]]:
    return [prompt(700, 1), prompt(450, 2)]


@pytest.fixture(scope="module")
def without_ray(prompts: list[dict[str, list[int]]]) -> list[Answer]:
    """What one rank in this process answers."""
    with engine("rc_topk", SMALL, **POOL) as llm:
        return answers(llm.generate(prompts, greedy(16), use_tqdm=False))


V2 = "vllm.v1.executor.ray_executor_v2.RayExecutorV2"
V1 = "vllm.v1.executor.ray_executor.RayDistributedExecutor"


@pytest.mark.parametrize(("executor", "ranks"), [(V2, 1), (V2, 2), (V1, 2)])
def test_actors_answer_as_one_process_does(
    executor: str, ranks: int, prompts: list[dict[str, list[int]]], without_ray: list[Answer]
) -> None:
    """A budget that leaves most unread: the same answers only if the options reached the actors."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    read = REGISTRY.get_sample_value("vllm_rc_topk_tokens_read_total")
    settings = {
        "tensor_parallel_size": ranks,
        "distributed_executor_backend": resolve_obj_by_qualname(executor),
    }
    with engine("rc_topk", SMALL, **POOL, **settings) as llm:
        placement = llm.llm_engine.vllm_config.parallel_config.placement_group
        got = answers(llm.generate(prompts, greedy(16), use_tqdm=False))
        options = llm.collective_rpc(options_of_worker)
        publishing = llm.collective_rpc(publishes)
    give_back(placement)
    assert_same(got, without_ray, tolerance=5e-3)
    assert [o["budget"] for o in options] == [SMALL["budget"]] * ranks
    assert publishing == [True] + [False] * (ranks - 1)
    assert REGISTRY.get_sample_value("vllm_rc_topk_tokens_read_total") > read


def give_back(placement: Any) -> None:
    """Remove a placement group and wait until its devices are free again: Ray does that in its own time."""
    ray.util.remove_placement_group(placement)
    assert eventually(lambda: ray.available_resources().get("GPU") == ray.cluster_resources()["GPU"]), (
        f"a removed placement group still holds devices: {ray.available_resources()}"
    )


def options_of_worker(worker: Any) -> dict[str, Any]:
    """Runs in the worker: what its layers were made with."""
    from dataclasses import asdict

    from vllm_rc_backend.layer import own_layers

    return asdict(next(iter(own_layers(worker.vllm_config).values())).config)


def publishes(worker: Any) -> bool:
    """Runs in the worker: whether it brings its counters to /metrics, which it does once a second."""
    import threading
    import time

    time.sleep(2.5)
    return any(thread.name == "rc-topk-metrics" for thread in threading.enumerate())


def test_configuration_reaches_an_actor_that_knows_nothing_of_the_plugin() -> None:
    """The actor's process has loaded no plugin when it unpickles the configuration."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=MODEL, attention_backend="rc_topk", additional_config={"rc_topk": SMALL}, max_model_len=1024
    ).create_engine_config()

    class Reader:
        def loaded(self) -> bool:
            return "vllm_rc_backend" in sys.modules

        def read(self, config: Any) -> tuple[str, str, float, str | None]:
            from vllm_rc_backend.config import RCTopKConfig

            backend = config.attention_config.backend
            options = RCTopKConfig.from_additional_config(config.additional_config)
            return (
                backend.name,
                backend.get_class().get_name(),
                options.budget,
                os.environ.get("RC_TOPK_RUN_DIR"),
            )

    actor = ray.remote(Reader).options(num_cpus=0).remote()
    assert not ray.get(actor.loaded.remote())
    *read, folder = ray.get(actor.read.remote(config))
    assert read == ["RC_TOPK", "RC_TOPK", SMALL["budget"]]
    # No folder of its own for metrics: it has this process's, or none until vLLM tells it which one the server reads.
    assert folder in (None, os.environ.get(metrics.RUN_DIR))


def test_a_worker_elsewhere_says_that_its_counters_stay_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(metrics.RUN_DIR, "/somewhere/rc-topk-another-machine-1-0123456789abcdef")
    metrics.publish.__wrapped__()
    assert "another machine than the API server" in caplog.text


def servers() -> list[psutil.Process]:
    """The ``vllm serve`` processes of this cluster's replicas."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    return [
        process
        for process in psutil.process_iter(["cmdline"])  # a zombie's is empty
        if process.pid in mine and (process.info["cmdline"] or [])[1:3] == [str(VLLM), "serve"]
    ]


def test_replicas_of_ray_serve_behind_one_endpoint(prompt: Prompt) -> None:
    """The application of deploy/ray, as it is deployed: two replicas answer, alike, and nothing of them is left."""
    from ray import serve
    from serve_app import Settings, build

    arguments = [
        MODEL,
        "--attention-backend",
        "rc_topk",
        "--additional-config",
        json.dumps({"rc_topk": SMALL}),
    ]
    arguments += ["--max-model-len", "1024", "--enforce-eager", "--kv-cache-memory-bytes", str(16 << 20)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(Settings(arguments=arguments, replicas=2, gpus=0)), route_prefix="/")
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0
        )
        request = {
            "model": MODEL,
            "prompt": prompt(500, 1)["prompt_token_ids"],
            "max_tokens": 12,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: client.completions.create(**request).choices[0].text, range(8)))
        assert len(set(texts)) == 1
        streamed = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
        assert len(streamed) > 5
        assert "".join(streamed) == texts[0]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**request | {"model": "another"})
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).status_code == 404
        running = servers()
        assert len(running) == 2
    finally:
        serve.shutdown()
    _, alive = psutil.wait_procs(running, timeout=60)
    assert not alive
