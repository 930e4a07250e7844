"""``vllm serve`` with the plugin, as a client sees it: the OpenAI API, disconnects, restarts, metrics, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from ..harness import Prompt
from ..serving import MODEL, Server, serving

BUDGET = 192


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = {"budget": BUDGET, "log_interval": 1, "log_requests": True}
    # float32, so that answers in another batch can be compared.
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, options, "--dtype", "float32") as running:
        yield running


def complete(server: Server, tokens: list[int], **kwargs: Any) -> Any:
    defaults = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return server.client.completions.create(model=MODEL, prompt=tokens, **(defaults | kwargs))


def test_completion_and_stream_agree(server: Server, prompt: Prompt) -> None:
    tokens = prompt(1000)["prompt_token_ids"]
    # Fills the prefix cache: in 16 bits a hit and a prefill may break a tie differently.
    complete(server, tokens)
    whole = complete(server, tokens).choices[0].text
    parts = [chunk.choices[0].text for chunk in complete(server, tokens, stream=True)]
    assert len(parts) > 5
    assert "".join(parts) == whole


def test_features_of_the_api(server: Server, prompt: Prompt) -> None:
    tokens = prompt(700, 1)["prompt_token_ids"]
    several = complete(server, tokens, n=3, temperature=0.9, logprobs=2)
    assert len(several.choices) == 3
    assert all(len(c.logprobs.token_logprobs) == 24 for c in several.choices)
    text = complete(server, tokens).choices[0].text
    stop = text[len(text) // 2]
    assert complete(server, tokens, stop=[stop]).choices[0].text == text[: text.index(stop)]
    shaped = complete(server, tokens, extra_body={"structured_outputs": {"regex": "[0-9]{6}"}}, max_tokens=12)
    assert re.fullmatch("[0-9]{6}", shaped.choices[0].text)


def test_turns_reuse_the_prefix(server: Server, prompt: Prompt) -> None:
    history = prompt(800, 2)["prompt_token_ids"]
    before = server.metric("vllm:prefix_cache_hits_total")
    for turn in range(3):
        answer = complete(server, history, extra_body={"ignore_eos": True, "return_token_ids": True})
        history = [*history, *answer.choices[0].token_ids, *prompt(60, turn)["prompt_token_ids"][1:]]
    assert server.metric("vllm:prefix_cache_hits_total") > before


def test_vanishing_clients_among_others(server: Server, prompt: Prompt) -> None:
    """Half the streaming clients hang up in the middle; the others' answers are those they get alone."""
    prompts = [prompt(500 + 40 * i, i)["prompt_token_ids"] for i in range(8)]
    alone = [complete(server, p).choices[0].text for p in prompts]

    def client(i: int) -> str | None:
        stream = complete(server, prompts[i], stream=True)
        parts = []
        for chunk in stream:
            parts.append(chunk.choices[0].text)
            if i % 2 and len(parts) == 4:
                stream.close()
                return None
        return "".join(parts)

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(client, range(8)))
    assert got[1::2] == [None] * 4
    # Batches differ, so rounding may: nearly all answers must be letter for letter the same.
    assert sum(g == a for g, a in zip(got[::2], alone[::2], strict=True)) >= 3
    assert server.healthy()


def test_bad_requests_do_not_hurt(server: Server, prompt: Prompt) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(server, prompt(3000)["prompt_token_ids"] * 2)
    with pytest.raises(openai.APIStatusError):
        complete(server, [10**9])
    assert server.healthy()
    assert complete(server, prompt(300)["prompt_token_ids"]).choices[0].text


def test_metrics_and_log(server: Server, prompt: Prompt) -> None:
    names = [f"vllm_rc_topk_tokens_{kind}_total" for kind in ("held", "read")]
    before = server.settled(*names)
    length, steps = 1500, 24
    # The first token comes from prefill, each of the others from a decode over everything so far.
    expected = sum(length + i for i in range(1, steps))
    complete(server, prompt(length, 9)["prompt_token_ids"])
    server.metric_when(names[0], before[0] + expected)
    held, read = (server.metric(name) - was for name, was in zip(names, before, strict=True))
    assert held == expected
    assert 0 < read <= BUDGET * (steps - 1)
    server.logged(r"rc_topk: read \d+ of \d+ tokens")
    # The line of the request says of its lengths what the worker counted.
    line = rf"rc_topk: cmpl-\S+: {length} prompt and {steps} generated tokens; {steps - 1} of {steps - 1} decode steps"
    found = server.logged(line + r" sparse, read ([0-9.]+) % of the tokens, ([0-9.]+) % of the bytes")
    tokens, everything = map(float, found.groups())
    assert tokens == pytest.approx(100 * read / held, abs=0.06)
    assert tokens < everything < 100


def test_restart_and_bad_options(tmp_path: Path, prompt: Prompt) -> None:
    for options, words in (
        ('{"rc_topk": {"budget": "many"}}', ["budget", "'many'", "allowed"]),
        ('{"rc_topk": 7}', ["rc_topk", "a JSON object"]),
    ):
        refused = Server(tmp_path / "refused", options)
        try:
            assert not refused.wait()
            assert refused.process.returncode != 0
            text = refused.log.read_text()
            assert all(word in text for word in words), text[-3000:]
        finally:
            refused.stop()
    texts = []
    for attempt in ("first", "second"):
        with serving(tmp_path / attempt, {"budget": BUDGET}) as running:
            texts.append(complete(running, prompt(600, 4)["prompt_token_ids"]).choices[0].text)
    assert texts[0] == texts[1]
