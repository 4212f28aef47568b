"""Mutated reviews: the parser never fails, never leaves the scale, and never reads the question's own numbers."""

from __future__ import annotations

import string

from hypothesis import given, settings
from hypothesis import strategies as st

from almost_eval.judge.brackets import parse_letters
from almost_eval.judge.records import Unparsed, Verdict
from almost_eval.judge.verdicts import parse_scores

REASONS = {"empty", "no_scores", "no_verdict", "ambiguous", "out_of_range"}
FRAGMENTS = (
    "8 9", "0 9", "10 10", "(8, 9)", "(-1, 12)", "Scores:", "Assistant 1: 8", "Assistant 2: 9/10", "Assistant 1", "7.5",
    "score of 11", "a score of 0", "provided no answer", "tuple", "Output: (3, 4)", "[[A]]", "[[B]] if", "**", "```",
    "\n", "\n\n", " ", ", ", " and ", "\u2013", "\u201c", "\u00a0", "2 + 3 = 5", "x^2", "1e5", "\u0664\u0665", "\u00b2",
    "\U0001f600", "Assistant 2's score is 6.", "final", "1.", "|",
)  # fmt: skip
REVIEWS = st.one_of(
    st.text(max_size=200),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(string.printable, max_size=8)), max_size=25).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(" ".join),
)
QUICK = settings(max_examples=400, deadline=None, derandomize=True)
HALVES = st.integers(2, 20).map(lambda n: n / 2)


@QUICK
@given(review=REVIEWS, question=st.one_of(st.just(""), REVIEWS))
def test_never_fails_and_never_leaves_the_scale(review: str, question: str) -> None:
    found = parse_scores(review, question)
    if isinstance(found, Unparsed):
        assert found.reason in REASONS
        return
    for score in (found.score_1, found.score_2):
        assert score is not None
        # A 0 is read only where the first line has it and words say that it is meant.
        meant = "score of 0" in review or "no answer" in review
        assert 1 <= score <= 10 or (score == 0 and meant)
    letters = parse_letters(review, question)
    assert isinstance(letters, Verdict) or letters.reason in REASONS


@QUICK
@given(first=HALVES, second=HALVES, cut=st.integers(0, 60), noise=st.text(string.ascii_letters + " .\n", max_size=60))
def test_official_form_survives_what_follows(first: float, second: float, cut: int, noise: str) -> None:
    review = f"{first:g} {second:g}\nAssistant 1 gave 3 examples. Assistant 2 made 2 errors.\n{noise}"
    found = parse_scores(review[: max(cut, len(f"{first:g} {second:g}"))])
    assert isinstance(found, Verdict)
    assert (found.score_1, found.score_2) == (first, second)


@QUICK
@given(
    numbers=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    form=st.sampled_from(
        (
            "Assistant 1: {} Assistant 2: {}",
            "The scores are {} and {}",
            "Output the tuple ({}, {})",
            "Assistant 1 receives a score of {} and Assistant 2 a score of {}",
            "{} {}",
        )
    ),
    before=st.sampled_from(("", "The question is:\n", "The user asks: ", '> "')),
    after=st.sampled_from(("", "\nThat is all.", '" was asked.', "\n\nBoth answers are good.")),
)
def test_no_score_is_taken_from_the_question(numbers: tuple[int, int], form: str, before: str, after: str) -> None:
    question = form.format(*numbers)
    assert parse_scores(before + question + after, question) == Unparsed("no_scores")


@QUICK
@given(question=REVIEWS, first=HALVES, second=HALVES)
def test_a_quoted_question_changes_no_official_scores(question: str, first: float, second: float) -> None:
    line = f"{first:g} {second:g}"
    found = parse_scores(f"{line}\nThe user asks:\n{question}", question)
    if isinstance(found, Verdict):
        assert (found.score_1, found.score_2) == (first, second)
