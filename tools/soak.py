"""Many clients of every kind against a live ``vllm serve`` with rc_topk on the CPU, for as long as asked.

Fails if a client sees an error, if the server's memory grows after warm-up, if an answer after the load differs from
the one before it, or if the counters contradict each other. ``tests/engine/test_soak.py`` runs a short form of it, too
short to judge memory by.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoTokenizer

from tests.serving import MODEL, Server, serving

OPTIONS = {"budget": 192, "log_interval": 10}
CHAT_TEMPLATE = "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
# float32, so that an answer can be compared with itself under another load. A pool that the clients overfill: blocks
# are reused all the time and running sequences are preempted.
ARGUMENTS = ("--dtype", "float32", "--kv-cache-memory-bytes", str(28 << 20), "--chat-template", CHAT_TEMPLATE)
# oneDNN keeps a compiled kernel for each of the last 1024 shapes of matrices, some 500 MiB in the end: a growth that
# would hide others.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
CONTEXT = 1600
"""Longest prompt, in tokens."""

WARM_UP = 1000
"""Requests after which memory must not grow: by then the KV pool, the side store and the allocators' free lists have
been touched. Requests, not seconds: a machine with other work on it takes several times as long to get there."""
SAMPLES = 60
"""What growth is judged by, at least."""
GROWTH, FLOOR = 0.02, 24 << 20
"""Growth allowed from the first third of the samples after warm-up to the last third, median to median: 2 %, or 24 MiB
where that is more. Allocators keep what a burst took, so single samples say nothing; a leak moves the median."""


@dataclass(frozen=True)
class Sample:
    """One look at the server."""

    requests: int
    """Finished until then."""
    resident: dict[str, int]
    """Bytes of each of its processes."""


@dataclass
class Record:
    """What the clients and the watcher have seen."""

    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    preemptions: int = 0
    memory: list[Sample] = field(default_factory=list)
    """Once a second."""

    @property
    def sums(self) -> list[int]:
        """Resident bytes of all processes together."""
        return [sum(sample.resident.values()) for sample in self.memory]

    @property
    def warm(self) -> list[dict[str, int]]:
        """The samples after warm-up that growth is judged by; none where they are too few for that."""
        samples = [sample.resident for sample in self.memory if sample.requests >= WARM_UP]
        return samples if len(samples) >= SAMPLES else []


class Clients:
    """The workload: each method is one request of its kind, checked."""

    def __init__(self, server: Server, record: Record, seed: int) -> None:
        self.record = record
        self.random = random.Random(seed)
        self.api = openai.AsyncOpenAI(
            base_url=server.url + "/v1",
            api_key="none",
            timeout=600,
            max_retries=0,
            # uvicorn closes a connection that idles for 5 seconds; a request sent at that moment would be lost.
            http_client=openai.DefaultAsyncHttpxClient(limits=httpx.Limits(keepalive_expiry=2)),
        )
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        text = "".join(
            Path(module.__file__).read_text() for module in (argparse, asyncio.base_events, statistics)
        )
        self.corpus: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self.lines = text.splitlines()

    def prompt(self) -> list[int]:
        """Mostly short, sometimes long; every second one begins as one of four documents do."""
        length = min(int(self.random.expovariate(1 / 350)) + 4, CONTEXT)
        shared = self.random.randrange(4) * 2000 if self.random.random() < 0.5 else None
        start = self.random.randrange(len(self.corpus) - CONTEXT) if shared is None else shared
        return [0, *self.corpus[start : start + length]]

    async def complete(self, **request: object) -> openai.types.Completion:
        """One completion, not streamed; counted."""
        defaults = {"prompt": self.prompt(), "max_tokens": self.random.randint(1, 40), "temperature": 0.8}
        answer = await self.api.completions.create(model=MODEL, **(defaults | request))
        self.record.tokens += answer.usage.completion_tokens
        return answer

    async def whole(self) -> None:
        answer = await self.complete(max_tokens=24, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == 24, answer.usage

    async def streamed(self) -> None:
        stream = await self.api.completions.create(
            model=MODEL,
            prompt=self.prompt(),
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage.completion_tokens == 30, chunks[-1]
        self.record.tokens += 30

    async def hung_up(self) -> None:
        """The connection is closed in the middle of the answer."""
        stream = await self.api.completions.create(
            model=MODEL, prompt=self.prompt(), max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        left = self.random.randint(1, 12)
        async for _ in stream:
            self.record.tokens += 1
            left -= 1
            if not left:
                break
        await stream.close()

    async def impatient(self) -> None:
        """The client gives up: waiting, prefilling or decoding, whatever its request is doing."""
        asked = asyncio.ensure_future(self.complete(max_tokens=200))
        await asyncio.wait({asked}, timeout=self.random.uniform(0, 4))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def several(self) -> None:
        answer = await self.complete(n=3, max_tokens=20)
        assert len(answer.choices) == 3, answer

    async def stopped(self) -> None:
        answer = await self.complete(stop=["e", "\n"], max_tokens=40)
        assert not re.search("[e\n]", answer.choices[0].text), answer

    async def with_logprobs(self) -> None:
        answer = await self.complete(logprobs=3, max_tokens=10, extra_body={"ignore_eos": True})
        values = answer.choices[0].logprobs.token_logprobs
        assert len(values) == 10, values
        assert all(value <= 0 for value in values), values

    async def structured(self) -> None:
        answer = await self.complete(
            max_tokens=16, extra_body={"structured_outputs": {"regex": "[a-f]{3}[0-9]{4}"}}
        )
        assert re.fullmatch("[a-f]{3}[0-9]{4}", answer.choices[0].text), answer

    async def chat(self) -> None:
        """Two turns; the second one's prompt begins with the first one's."""
        messages = []
        for _ in range(2):
            start = self.random.randrange(len(self.lines) - 40)
            question = "\n".join(self.lines[start : start + self.random.randint(1, 30)])
            messages.append({"role": "user", "content": question})
            answer = await self.api.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
            self.record.tokens += answer.usage.completion_tokens
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})

    @property
    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        """All of them."""
        return [
            *(self.whole, self.streamed, self.hung_up, self.impatient, self.several, self.stopped),
            *(self.with_logprobs, self.structured, self.chat),
        ]

    async def one_after_another(self, deadline: float) -> None:
        """A client's life: a request, a short pause, the next."""
        while time.monotonic() < deadline:
            kind = self.random.choice(self.kinds)
            try:
                await kind()
            except (openai.OpenAIError, AssertionError) as error:
                # The kind and the first line: what differs between two errors of one cause comes later.
                line = (str(error) or traceback.format_exc().strip()).splitlines()[0]
                self.record.errors[f"{kind.__name__}: {type(error).__name__}: {line[:200]}"] += 1
            self.record.requests[kind.__name__] += 1
            await asyncio.sleep(self.random.uniform(0, 0.5))

    async def answers(self) -> list[str]:
        """What the server answers to four fixed prompts, one at a time, with nothing random."""
        texts = []
        for start in range(4):
            prompt = [0, *self.corpus[start * 2000 : start * 2000 + 700 + 100 * start]]
            texts.append((await self.complete(prompt=prompt, max_tokens=16, temperature=0)).choices[0].text)
        return texts


def resident(server: Server) -> dict[str, int]:
    """Resident bytes of the server and its engine processes."""
    root, sizes = psutil.Process(server.process.pid), {}
    for process in (root, *root.children(recursive=True)):
        # A compiler that the engine ran may have ended since its parent was asked for its children.
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes[f"{process.name()} {process.pid}"] = process.memory_info().rss
    return sizes


async def watch(server: Server, record: Record) -> None:
    """Sample memory once a second until cancelled."""
    while True:
        record.memory.append(Sample(record.requests.total(), resident(server)))
        await asyncio.sleep(1)


async def show(record: Record, seconds: float, console: Console) -> None:
    """A line of progress until cancelled; nothing where nobody watches."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task, begun = progress.add_task("", total=seconds), time.monotonic()
        while True:
            memory = record.sums[-1] / 2**20 if record.memory else 0
            progress.update(
                task,
                completed=time.monotonic() - begun,
                description=f"{record.requests.total()} requests, {record.tokens} tokens, "
                f"{record.errors.total()} errors, {memory:.0f} MiB resident",
            )
            await asyncio.sleep(0.5)


async def load(
    server: Server, seconds: float, clients: int, console: Console, sparse: bool = True
) -> tuple[Record, list[str]]:
    """The whole run.

    Args:
        sparse: whether the server runs rc_topk.

    Returns:
        The record, and what is wrong, in words.
    """
    record, workload = Record(), Clients(server, Record(), seed=0)
    before = await workload.answers()
    workload.record = record  # what is asked outside of the load does not count
    begun = time.monotonic()
    helpers = [asyncio.ensure_future(job) for job in (watch(server, record), show(record, seconds, console))]
    await asyncio.gather(*(workload.one_after_another(begun + seconds) for _ in range(clients)))
    for job in helpers:
        job.cancel()
    finished = await asyncio.gather(*helpers, return_exceptions=True)
    problems = [f"the run itself: {r!r}" for r in finished if not isinstance(r, asyncio.CancelledError)]
    problems += [f"{count} x {error}" for error, count in record.errors.items()]
    problems += grown(record.warm)
    if not server.healthy():
        return record, [*problems, "the server is not healthy"]
    if (after := await workload.answers()) != before:
        problems.append(f"answers differ from those before the load: {before} became {after}")
    record.preemptions = int(server.metric("vllm:num_preemptions_total"))
    problems += contradictions(server, sparse)
    await workload.api.close()
    return record, problems


def grown(samples: Sequence[dict[str, int]]) -> list[str]:
    """The processes that grew, by the rule that GROWTH states; of no samples, none."""
    third, found = len(samples) // 3, []
    for process in samples[-1] if samples else ():
        early, late = (
            statistics.median(sample.get(process, 0) for sample in part)
            for part in (samples[:third], samples[-third:])
        )
        if late - early > max(GROWTH * early, FLOOR):
            found.append(f"{process} grew after warm-up, from {early / 2**20:.0f} to {late / 2**20:.0f} MiB")
    return found


def contradictions(server: Server, sparse: bool) -> list[str]:
    """What the counters must not say once everything has ended."""
    claims = {
        "requests are still running": server.metric("vllm:num_requests_running") == 0,
        "requests are still waiting": server.metric("vllm:num_requests_waiting") == 0,
    }
    if sparse:
        names = ("tokens_held", "tokens_read", "sparse_rows", "missing_summaries")
        held, read, rows, missing = server.settled(*(f"vllm_rc_topk_{name}_total" for name in names))
        claims |= {
            f"read {read} of {held} tokens": 0 < read < held,
            f"{rows} sparse rows": rows > 0,
            f"{missing} of them without a summary": missing == 0,
        }
    return [claim for claim, right in claims.items() if not right]


def report(record: Record, problems: list[str], seconds: float, console: Console) -> None:
    """The result as a table."""
    table = Table("what", "", title=f"Soak of {seconds / 60:.1f} minutes")
    for kind, count in sorted(record.requests.items()):
        table.add_row(f"requests: {kind}", str(count))
    table.add_row("tokens received", str(record.tokens))
    table.add_row("preemptions", str(record.preemptions))
    sums, warm = record.sums, record.warm
    marks = {
        "at first": sums[0],
        **({"after warm-up": sum(warm[0].values())} if warm else {}),
        "at the end": sums[-1],
        "at most": max(sums),
    }
    for when, resident_bytes in marks.items():
        table.add_row(f"resident, {when}", f"{resident_bytes / 2**20:.0f} MiB")
    console.print(table)
    if not warm:
        console.print(
            f"[yellow]memory was not judged:[/] that takes {SAMPLES} seconds after the first {WARM_UP} requests; "
            "give more --minutes"
        )
    for problem in problems:
        console.print(f"[red]wrong:[/] {problem}", highlight=False)
    if not problems:
        console.print(f"[green]no errors, {'no growth, ' * bool(warm)}the same answers, counters agree[/]")


def main() -> int:
    """Start a server and load it; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--dense", action="store_true", help="on vLLM's own attention, to compare with")
    parser.add_argument(
        "--record", type=Path, help="write the samples of memory and the counts to this JSON file"
    )
    arguments = parser.parse_args()
    console, seconds = Console(), arguments.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        console.print("starting vllm serve ...")
        backend = ("--attention-backend", "CPU_ATTN") if arguments.dense else ()
        with serving(Path(folder) / "log", OPTIONS, *ARGUMENTS, *backend, **ENVIRONMENT) as server:
            record, problems = asyncio.run(
                load(server, seconds, arguments.clients, console, not arguments.dense)
            )
    report(record, problems, seconds, console)
    if arguments.record:
        arguments.record.write_text(
            json.dumps({"requests": record.requests, "memory": [asdict(sample) for sample in record.memory]})
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
