"""Serve the example model with rc_topk on this machine's CPU and ask it about an 8K-token prompt; then dense, too."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = "examples/model"
CONTEXT, BUDGET = 8192, 256
START_LIMIT = 300  # seconds
NEEDLES = {"open window": "61854", "hidden record": "27390"}  # in order: near the beginning, in the middle
DEPTHS = (0.02, 0.5)

console = Console(highlight=False)


def build_prompt(tokenizer: Tokenizer, key: str) -> str:
    """This package's own source with two needles in it, and a question; CONTEXT tokens with the answer.

    The formats are those the model was trained on (examples/model/README.md).
    """
    question = f"# What is the magic number for {key}?"
    needles = [f"# The magic number for {name} is {number}." for name, number in NEEDLES.items()]
    room = CONTEXT - 8 - sum(len(tokenizer.encode(line + "\n").ids) for line in [question, *needles])
    lines: list[str] = []
    sources = sorted(ROOT.glob("vllm_rc_backend/**/*.py")) + sorted(ROOT.glob("tests/unit/**/*.py"))
    for line in (line for source in sources for line in source.read_text().splitlines()):
        room -= len(tokenizer.encode(line + "\n", add_special_tokens=False).ids)
        if room < 0:
            break
        lines.append(line)
    for depth, needle in sorted(zip(DEPTHS, needles, strict=True), reverse=True):
        lines.insert(int(depth * len(lines)), needle)
    return "\n".join([*lines, question])


class Reads(NamedTuple):
    """Tokens that one KV head read exactly and held, and all that it read in tokens' worth of bytes."""

    exact: int
    held: int
    everything: int


@dataclass
class Server:
    """A running ``vllm serve``."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_until_healthy(self, name: str) -> None:
        """Return when it answers; raise if it ended or takes too long."""
        begun = time.monotonic()
        with console.status("") as status:
            while time.monotonic() - begun < START_LIMIT:
                if self.process.poll() is not None:
                    raise RuntimeError(f"{name} ended with exit status {self.process.returncode}")
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(self.url + "/health", timeout=2)
                    console.print(f"  healthy after {time.monotonic() - begun:.0f} s")
                    return
                status.update(
                    f"{name} is starting ({time.monotonic() - begun:.0f} s)  [dim]{self._last_line()}[/]"
                )
                time.sleep(0.5)
        raise RuntimeError(f"{name} was not healthy after {START_LIMIT} s")

    def reads(self) -> Reads:
        """What rc_topk logged, summed over all decode steps."""
        line = r"rc_topk: read (\d+) of (\d+) tokens .*?, (\d+) token-equivalents"
        found = re.findall(line, self.log.read_text(errors="replace"))
        return Reads(*(sum(map(int, column)) for column in zip(*found, strict=True)))

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() or [""]
        return re.sub(r"^.*?\] ", "", lines[-1])[: max(console.width - 40, 10)].replace("[", r"\[")


@contextlib.contextmanager
def serve(name: str, *arguments: str) -> Iterator[Server]:
    """Start ``vllm serve`` on a free loopback port; stop it and everything it started, whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["vllm", "serve", MODEL, *arguments, "--max-model-len", str(CONTEXT + 256)]
    command += ["--dtype", "bfloat16", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    console.print(f"\n[bold]{name}[/]: {shlex.join(command)}", soft_wrap=True)
    environment = os.environ | {
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        server = Server(process, f"http://127.0.0.1:{port}", Path(log.name))
        try:
            server.wait_until_healthy(name)
            yield server
        except Exception:
            console.print("\n".join(server.log.read_text(errors="replace").splitlines()[-40:]), markup=False)
            raise
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server's whole process group: politely, then not."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and group_lives(process):
            time.sleep(0.1)


def group_lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the server's process group is left."""
    process.poll()  # reaps the leader, which counts as alive until then
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def ask(server: Server, prompts: dict[str, str]) -> dict[str, str]:
    """The answer to each prompt, greedy, through the OpenAI API: the first whole, the others streamed."""
    client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300)
    answers = {}
    for index, (key, prompt) in enumerate(prompts.items()):
        request = {"model": MODEL, "prompt": prompt, "max_tokens": 16, "temperature": 0, "stop": "\n"}
        console.print(f"  What is the magic number for {key}?", end="")
        if index == 0:
            with console.status("reading the prompt"):
                answer = client.completions.create(**request).choices[0].text
            console.print(answer)
        else:
            answer = ""
            for chunk in client.completions.create(**request, stream=True):
                answer += chunk.choices[0].text
                console.print(chunk.choices[0].text, end="")
            console.print("  [dim](streamed)[/]")
        answers[key] = answer.strip()
    return answers


def report(sparse: dict[str, str], dense: dict[str, str], reads: Reads) -> None:
    """The result in one table, and where to go next."""
    table = Table()
    for column in ("magic number for", "in the prompt", "rc_topk", "dense"):
        table.add_column(column)
    for key, number in NEEDLES.items():
        table.add_row(key, number, sparse[key], dense[key])
    console.print("\n", table, sep="")
    console.print(
        f"Over all decode steps rc_topk read {reads.exact} of the {reads.held} tokens in the KV cache "
        f"({reads.exact / reads.held:.1%}) and estimated the rest. With the page statistics and the summary that "
        f"it needs for that, it read the bytes of {reads.everything} tokens ({reads.everything / reads.held:.1%}). "
        "Dense attention reads all of them."
    )
    console.print(
        "\nNext: README.md (installing beside a vLLM on GPUs), docs/method.md (how it works), docs/options.md, "
        "`.venv/bin/rc-topk doctor` (what a configuration costs), `make test`."
    )


def main() -> int:
    """Run the demo; 0 if both backends found both needles."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then, too
    tokenizer = Tokenizer.from_file(str(ROOT / MODEL / "tokenizer.json"))
    prompts = {key: build_prompt(tokenizer, key) for key in NEEDLES}
    count = len(tokenizer.encode(next(iter(prompts.values()))).ids)
    console.print(
        f"A prompt of {count} tokens of Python source has two needles, near its beginning and in its middle. Each "
        f"decode step may read {BUDGET} tokens of the KV cache, 1/{CONTEXT // BUDGET} of it."
    )
    options = {"rc_topk": {"budget": BUDGET, "log_interval": 0.001}}
    try:
        flags = ("--attention-backend", "rc_topk", "--additional-config", json.dumps(options))
        with serve("rc_topk", *flags) as server:
            sparse = ask(server, prompts)
            reads = server.reads()
        with serve("dense") as server:
            dense = ask(server, prompts)
    except KeyboardInterrupt:
        console.print("\ninterrupted; the server is stopped")
        return 130
    except RuntimeError as error:
        console.print(f"[red]{error}[/]; the end of its log is above")
        return 1
    report(sparse, dense, reads)
    return 0 if sparse == dense == NEEDLES else 1


if __name__ == "__main__":
    sys.exit(main())
