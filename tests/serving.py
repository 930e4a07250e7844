"""A real ``vllm serve`` in processes of its own, for the tests that look at it as a client or an operator does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import openai

from vllm_rc_backend.observability import metrics

T = TypeVar("T")
MODEL = str(Path(__file__).parents[1] / "examples" / "model")


def eventually(look: Callable[[], T], seconds: float = 60) -> T:
    """What ``look`` gives once that counts as true, or at the end of this time."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


class Server:
    """A running ``vllm serve``; without ``options``, those that ``extra`` brings."""

    def __init__(
        self, log: Path, options: str | None, extra: tuple[str, ...] = (), **environment: str
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [
            *(
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--max-model-len",
                "4096",
                "--max-num-seqs",
                "16",
            ),
            *("--enforce-eager", "--attention-backend", "rc_topk"),
            *(("--additional-config", options) if options is not None else ()),
            *("--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(128 << 20)),
        ]
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        # An engine that ran in this process left its folder of counters there; a server of its own has its own.
        inherited = {name: value for name, value in os.environ.items() if name != metrics.RUN_DIR}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).parent / "vllm"), "serve", MODEL, *arguments, *extra],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=inherited | defaults | environment,
                start_new_session=True,
            )

    def wait(self, seconds: int = 600) -> bool:
        """Until it is healthy (True) or has ended (False)."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            if self.healthy():
                return True
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-4000:])

    def healthy(self) -> bool:
        """What its health check says."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=30) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metrics(self, name: str) -> list[float]:
        """The values of a metric on /metrics, one for each set of labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return [float(x) for x in re.findall(rf"^{name}(?:{{.*}})? ([0-9.e+]+)$", text, re.MULTILINE)]

    def metric(self, name: str) -> float:
        """The first of them."""
        found = self.metrics(name)
        assert found, name
        return found[0]

    def metric_when(self, name: str, least: float) -> float:
        """A counter once it has reached ``least``, or what it has reached by then; one more write of the workers shows
        what was counted too much."""
        eventually(lambda: self.metric(name) >= least)
        return self.settled(name)[0]

    def settled(self, *names: str) -> list[float]:
        """Counters of a server that does nothing, once no write of the workers changes them, who write once a second.

        A busy machine may write later: so two readings that agree.
        """
        values = [self.metric(name) for name in names]
        while True:
            time.sleep(2.5)
            before, values = values, [self.metric(name) for name in names]
            if values == before:
                return values

    def logged(self, pattern: str) -> re.Match[str]:
        """The first match in its log, once there is one."""
        found = eventually(lambda: re.search(pattern, self.log.read_text()))
        assert found, f"{pattern!r} is not in ...{self.log.read_text()[-3000:]}"
        return found

    @property
    def client(self) -> openai.OpenAI:
        """A client of this server."""
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=600, max_retries=0)

    def stop(self) -> None:
        """Stop it and everything it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@contextmanager
def serving(log: Path, options: dict[str, Any], *extra: str, **environment: str) -> Iterator[Server]:
    """A healthy server with these options of rc_topk; stopped at the end."""
    server = Server(log, json.dumps({"rc_topk": options}), extra, **environment)
    try:
        assert server.wait(), log.read_text()[-4000:]
        yield server
    finally:
        server.stop()
