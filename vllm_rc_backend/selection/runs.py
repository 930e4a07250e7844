"""Runs: the mean keys of short runs of a page, rotated so that two bits an element are enough.

Neighbouring keys resemble each other, so the mean of two of them stands for both, where one vector a page, or a box
around it, mixes sixteen. The score is the log of the mean of exp(q.mean) over the runs: by Jensen's inequality, run by
run, a lower bound of the page's log-mass but for rounding, so that scores also add up to the mass of what is not read.
A Hadamard rotation spreads each key's few large elements
over all dimensions (as in QuIP, Chee et al., arXiv 2307.13304), after which the elements are close to normally
distributed and a fixed grid of four levels quantises them: 8 vectors at 2 bits cost what one vector costs at 16. The
noise of that grid averages out over the elements of a dot product, so smaller heads need more vectors: 16.
docs/accuracy.md compares it with the other policies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rc_backend.selection.base import PagePolicy

SMALL_HEAD = 64
"""Head sizes up to this keep 16 runs a page, larger ones 8."""


@dataclass(frozen=True)
class Runs(PagePolicy):
    """score = log of the mean of exp(q.mean(k of run j)) over the page's runs."""

    name: ClassVar[str] = "runs"
    statistics_bits: ClassVar[tuple[int, ...]] = (2, 8, 16)
    estimates_mass: ClassVar[bool] = True

    def vectors(self, head_size: int) -> int:
        return 16 if head_size <= SMALL_HEAD else 8

    def statistics(self, keys: Tensor) -> Tensor:
        page_size, head_size = keys.shape[-2:]
        runs = self.vectors(head_size)
        if page_size < runs:
            keys = keys.repeat_interleave(runs // page_size, dim=-2)
        return rotate(keys.unflatten(-2, (runs, -1)).mean(dim=-2))

    def score(self, query: Tensor, statistics: Tensor) -> Tensor:
        # A rotation of both sides leaves every dot product as it was.
        scores = rotate(query) @ statistics.flatten(-3, -2).mT
        by_run: Tensor = scores.unflatten(-1, statistics.shape[-3:-1])
        return by_run.logsumexp(dim=-1) - math.log(statistics.shape[-2])


def rotate(x: Tensor) -> Tensor:
    """Orthonormal Hadamard transform of the last dimension (of equal blocks, if it is no power of two)."""
    size = x.shape[-1] & -x.shape[-1]
    blocks: Tensor = x.unflatten(-1, (-1, size))
    return (blocks @ hadamard(size).to(x)).flatten(-2)


@cache
def hadamard(size: int) -> Tensor:
    """The symmetric orthonormal Hadamard matrix (Sylvester's), float32 ``[size, size]``; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.div(size**0.5)
