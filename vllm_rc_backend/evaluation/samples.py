"""Contexts to measure on, prefilled once and decoded densely once: what every sparse run is held against."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rc_backend.evaluation.llama import Attention, KVCache, Llama
from vllm_rc_backend.evaluation.sparse import dense_window
from vllm_rc_backend.evaluation.tasks import HELD_OUT, make_prompts
from vllm_rc_backend.evaluation.text import Corpus


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        sequences, positions: passages of held-out text, and the last positions of each that count.
        prompts: prompts of every other task.
        seed: of everything that is drawn.
        batch: sequences computed at a time; changes nothing but speed and memory.
    """

    sequences: int = 16
    positions: int = 512
    prompts: int = 100
    seed: int = 0
    batch: int = 4


@dataclass(frozen=True)
class Samples:
    """One task at one context length.

    Attributes:
        caches: keys and values of everything before the window, a batch of samples each.
        windows: int64 ``[batch, window]``, the tokens that are decoded.
        counted: bool ``[batch, window - 1]``: whether predicting token i + 1 of the window from token i counts.
        dense: float32 log-probabilities ``[batch, window - 1, vocabulary]`` under dense attention.
    """

    task: str
    context: int
    caches: list[KVCache]
    windows: list[Tensor]
    counted: list[Tensor]
    dense: list[Tensor]


def predict(model: Llama, cache: KVCache, window: Tensor, attention: Attention) -> Tensor:
    """Log-probabilities of each token that follows one of the window, float32 ``[batch, window - 1, vocabulary]``."""
    return model.window(cache, window[:, :-1], attention).log_softmax(dim=-1)


@dataclass(frozen=True)
class Drawn:
    """Texts of one task before any model saw them.

    Attributes:
        tokens: int64 ``[samples, context]``.
        answers: bool, like ``tokens``: which of them count.
        window: tokens from the one before the first that counts to the end; those before are the prompt.
    """

    tokens: Tensor
    answers: Tensor
    window: int


def draw(corpus: Corpus, task: str, wording: str, context: int, sizes: Sizes) -> Drawn:
    """The samples of a task; the same arguments give the same ones.

    Args:
        wording: a key of ``tasks.FORMATS``.
        context: tokens per sample, the last predicted one included.

    Raises:
        ValueError: the context is too short for the task.
    """
    tokens, answers = _tokens(corpus, task, wording, context, sizes)
    window = context - int(answers.any(dim=0).nonzero()[0]) + 1
    if window >= context:
        raise ValueError(f"a context of {context} tokens is too short for {task}: its answers take {window}")
    return Drawn(tokens, answers, window)


def make_samples(model: Llama, drawn: Drawn, task: str, batch: int) -> Samples:
    """Prefill densely, and decode the window densely."""
    context = drawn.tokens.shape[1]
    prompt = context - drawn.window
    samples = Samples(task, context, [], [], [], [])
    for rows, counted in zip(drawn.tokens.split(batch), drawn.answers.split(batch), strict=True):
        rows = rows.to(model.device)
        cache = model.prefill(rows[:, :prompt])
        samples.caches.append(cache)
        samples.windows.append(rows[:, prompt:])
        samples.counted.append(counted[:, prompt + 1 :].to(model.device))
        samples.dense.append(predict(model, cache, samples.windows[-1], dense_window))
    return samples


def _tokens(corpus: Corpus, task: str, wording: str, context: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are answers, ``[samples, context]``."""
    if task == HELD_OUT:
        rng = random.Random(f"{task} {context} {sizes.seed}")
        tokens = torch.tensor([corpus.passage(context, rng) for _ in range(sizes.sequences)])
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        answers[:, -sizes.positions :] = True
        return tokens, answers
    prompts = make_prompts(task, corpus, wording, context, sizes.prompts, sizes.seed)
    return torch.tensor([p.tokens for p in prompts]), torch.tensor([p.answer for p in prompts])
