"""The eight needle tasks of RULER (Hsieh et al., arXiv 2404.06654), as arXiv 2605.28640 compares policies on them.

Three haystacks: a sentence over and over, text of the corpus, or nothing but other needles. Keys are pairs of words,
values are numbers of five digits; the third of each series has identifiers instead, keys included for ``multi_key_3``.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from vllm_rc_backend.evaluation.tasks import Prompt, Workshop, multi_query, multi_value, single_needle

NOISE = "# The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


def identifier(rng: random.Random) -> str:
    """Sixteen hexadecimal digits in groups of four."""
    return "-".join(f"{rng.randrange(2**16):04x}" for _ in range(4))


def single_1(shop: Workshop, length: int) -> Prompt:
    """One needle in a sentence that is repeated over and over."""
    (key,) = shop.keys(1)
    return _ask(shop, length, {key: shop.number()}, lambda: NOISE)


def single_3(shop: Workshop, length: int) -> Prompt:
    """One needle in text; its value is an identifier."""
    (key,) = shop.keys(1)
    return _ask(shop, length, {key: identifier(shop.rng)})


def multi_key_1(shop: Workshop, length: int) -> Prompt:
    """Four needles in text, one asked."""
    return _ask(shop, length, {key: shop.number() for key in shop.keys(4)})


def multi_key_2(shop: Workshop, length: int) -> Prompt:
    """One needle among nothing but others."""
    others = (shop.format.needle.format(key, shop.number()) for key in iter(lambda: shop.keys(1)[0], ""))
    (key,) = shop.keys(1)
    return _ask(shop, length, {key: shop.number()}, functools.partial(next, others))


def multi_key_3(shop: Workshop, length: int) -> Prompt:
    """The same with identifiers as keys and values."""

    def other() -> str:
        return shop.format.needle.format(" " + identifier(shop.rng), identifier(shop.rng))

    return _ask(shop, length, {" " + identifier(shop.rng): identifier(shop.rng)}, other)


def _ask(
    shop: Workshop, length: int, needles: dict[str, str], hay: Callable[[], str] | None = None
) -> Prompt:
    """Needles strewn over hay (lines of the corpus unless given), and a question about one of them."""
    asked = shop.rng.choice(list(needles))
    lines = [shop.format.needle.format(key, value) for key, value in needles.items()]
    turns = [(shop.format.needle_question.format(asked), " " + needles[asked])]
    return shop.assemble(length, lines, turns, hay)


NEEDLES: dict[str, Callable[[Workshop, int], Prompt]] = {
    "single_1": single_1,
    "single_2": single_needle,
    "single_3": single_3,
    "multi_key_1": multi_key_1,
    "multi_key_2": multi_key_2,
    "multi_key_3": multi_key_3,
    "multi_value": multi_value,
    "multi_query": multi_query,
}
