"""What breaks, breaks with a clear error, and what can go on does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from ..harness import Prompt
from ..serving import MODEL, Server, eventually, serving

OPTIONS = {"budget": 192, "log_interval": 1}
POOL = ("--kv-cache-memory-bytes", str(16 << 20))


def ask(server: Server, prompt: list[int] | list[list[int]], max_tokens: int) -> list[str]:
    """One request, of one prompt or several: the answers."""
    answer = server.client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return [choice.text for choice in answer.choices]


def complete(server: Server, tokens: list[int], max_tokens: int = 24) -> str:
    return ask(server, tokens, max_tokens)[0]


def run_folders(server: Server) -> list[Path]:
    """Where the server's workers write their counters."""
    return list(Path(tempfile.gettempdir()).glob(f"rc-topk-*-{server.process.pid}-*"))


def engine_process(server: Server) -> psutil.Process:
    """The process of the server that runs the model."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (core,) = (child for child in children if "EngineCore" in child.name())
    return core


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its KV pool holds about three of the prompts of ``test_full_pool_queues``."""
    with serving(tmp_path_factory.mktemp("faults") / "log", OPTIONS, *POOL) as running:
        yield running


def test_full_pool_queues(server: Server, prompt: Prompt) -> None:
    prompts = [prompt(700 + 90 * i, i)["prompt_token_ids"] for i in range(24)]
    with ThreadPoolExecutor(1) as pool:
        # Together: as many clients would take their time to start, and the first be answered before the last ask.
        answers = pool.submit(ask, server, prompts, 40)
        waiting = 0.0
        while not answers.done():
            waiting = max(waiting, server.metric("vllm:num_requests_waiting"))
            time.sleep(0.2)
    assert waiting > 8
    assert len(answers.result()) == len(prompts)
    assert all(answers.result())


def test_killed_engine_ends_the_server_and_a_restart_serves(
    server: Server, tmp_path: Path, prompt: Prompt
) -> None:
    tokens = prompt(600, 4)["prompt_token_ids"]
    expected = complete(server, tokens)
    (folder,) = run_folders(server)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, server, tokens, 3000)
        assert server.metric_when("vllm:num_requests_running", 1) == 1
        engine_process(server).kill()
        with pytest.raises(openai.APIError):
            waiting.result(60)
    server.process.wait(60)  # with exit status 0: a supervisor must restart it always, not on failure alone
    assert "EngineDeadError" in server.log.read_text()
    assert eventually(lambda: not folder.exists())  # the orphaned worker lives on for some seconds

    with serving(tmp_path / "log", OPTIONS, *POOL) as restarted:
        assert complete(restarted, tokens) == expected
        assert restarted.metric_when("vllm_rc_topk_sparse_rows_total", 23) == 23
        (folder,) = run_folders(restarted)
        os.killpg(restarted.process.pid, signal.SIGKILL)  # as an out-of-memory killer does: nobody cleans up
        restarted.process.wait()
    assert [file.suffix for file in folder.iterdir()] == [".json"]
    assert folder.stat().st_mode & 0o77 == 0
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("additional", "words"),
    [
        ("{budget: 192", ["additional_config", "valid dictionary", "{budget: 192"]),
        ('{"rc_topk": {"budgte": 192}}', ["budgte", "Did you mean budget"]),
    ],
    ids=["not-json", "misspelt"],
)
def test_garbage_in_an_option_file(additional: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"additional-config: {json.dumps(additional)}\n")
    server = Server(tmp_path / "log", None, ("--config", str(file)))
    try:
        assert not server.wait()
        assert server.process.returncode != 0
        text = server.log.read_text()
        assert all(word in text for word in words), text[-3000:]
    finally:
        server.stop()
