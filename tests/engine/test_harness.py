"""What the comparison of bfloat16 answers lets pass, and what not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ..harness import Answer, assert_close

TOKENS = tuple(range(8))
PLAIN = Answer((1, 2), TOKENS, (-0.5,) * 8, tuple({t: -0.5, 100: -3.0} for t in TOKENS))


def parted(second: float) -> Answer:
    """Another token at place 4, where the two have these log-probabilities: -0.6 its own, ``second`` the other."""
    return replace(
        PLAIN,
        tokens=(*TOKENS[:4], 50, 60, 70, 80),
        likeliest=(*PLAIN.likeliest[:4], {50: -0.6, 4: second}, *PLAIN.likeliest[5:]),
    )


def tied(answer: Answer) -> Answer:
    """The same, but for token 50 at place 4 being nearly as likely as the one it has."""
    return replace(answer, likeliest=(*answer.likeliest[:4], {4: -0.5, 50: -0.6}, *answer.likeliest[5:]))


def test_the_same_answers_are_close() -> None:
    assert_close([PLAIN], [PLAIN])


def test_a_tie_in_both_may_part_two_answers() -> None:
    assert_close([parted(second=-0.65)], [tied(PLAIN)])


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (parted(second=-0.65), PLAIN),
        (parted(second=-1.5), tied(PLAIN)),
        (replace(parted(second=-0.65), likeliest=PLAIN.likeliest), tied(PLAIN)),
    ],
    ids=["no tie in the second", "no tie in the first", "not among the likeliest"],
)
def test_parting_without_a_tie_is_an_error(got: Answer, expected: Answer) -> None:
    with pytest.raises(AssertionError):
        assert_close([got], [expected])


@pytest.mark.parametrize("drift", [(-0.9, *(-0.5,) * 7), (-0.6,) * 8], ids=["one place", "all places"])
def test_other_probabilities_are_an_error(drift: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError):
        assert_close([replace(PLAIN, logprobs=drift)], [PLAIN])


def test_parting_at_once_compares_too_little() -> None:
    early = replace(PLAIN, tokens=(90, *TOKENS[1:]), likeliest=({90: -0.5, 0: -0.5}, *PLAIN.likeliest[1:]))
    with pytest.raises(AssertionError, match="only 0 of 8"):
        assert_close([early], [replace(PLAIN, likeliest=({0: -0.5, 90: -0.5}, *PLAIN.likeliest[1:]))])


def test_another_history_is_not_compared() -> None:
    other = replace(PLAIN, prompt=(9,), tokens=TOKENS[::-1])
    assert_close([PLAIN, other], [PLAIN, PLAIN])
