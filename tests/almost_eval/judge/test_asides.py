"""What reviews state and do not give: conditions, denials, what others say, sources, fields that stand twice."""

from __future__ import annotations

import time

import pytest

from almost_eval.judge.asides import without_asides
from almost_eval.judge.brackets import parse_letters, parse_rating
from almost_eval.judge.prompts import parse_review
from almost_eval.judge.records import Answer, Pair, Question, Unparsed, Verdict
from almost_eval.judge.verdicts import parse_scores

PAIR = Pair(Question("1", "Why?"), Answer("1", "Because.", "a"), Answer("1", "So.", "b"), "forward")

ASIDES = [
    "If Assistant 2 had shown its work, I would give scores of 9 and 4.",
    "If the user wanted brevity, then the scores would be (9, 4).",
    "If style mattered: (9, 4). Otherwise: scores of (4, 9).",
    "Had it been complete, Assistant 1: 9/10, Assistant 2: 4/10.",
    "Were it complete, I would rate them 9 and 4.",
    "Without the error I would have given scores of 9 and 4.",
    "With more detail it would be scores of 9 and 4.",
    "I would give scores of 9 and 4 if both were complete.",
    "Assistant 1 would have received a score of 9, and Assistant 2 would have received a score of 4.",
    "I would not give scores of 9 and 4.",
    "The scores are not 9 and 4.",
    "Assistant 1 does not deserve a score of 9, and Assistant 2 does not deserve a score of 4.",
    "I cannot give Assistant 1 a score of 9. Assistant 2 receives a score of 4.",
    "Scores of 9 and 4 would be too harsh.",
    "Should the scores be 9 and 4?",
    "One could argue for scores of 9 and 4.",
    "Other reviewers gave scores of 9 and 4.",
    "A reader who values brevity would give scores of 9 and 4.",
    'The answer of Assistant 1 says "Scores: 9 and 4".',
    'Assistant 1 rates itself 9/10 and writes "Assistant 1: 9/10, Assistant 2: 4/10".',
    "Assistant 1 claims a score of 9 for itself, and Assistant 2 claims a score of 4.",
    "For example, Assistant 1: 9/10, Assistant 2: 4/10.",
    "My first impression was scores of 9 and 4.",
    "Score if complete | 9 | 4",
]
"""Each states 9 and 4 and gives neither."""


@pytest.mark.parametrize("aside", ASIDES)
def test_an_aside_is_no_verdict_and_contradicts_none(aside: str) -> None:
    assert parse_scores(aside) == Unparsed("no_scores")
    for review in (f"{aside}\nScores: 5 and 8", f"5 8\n\n{aside}", f"Assistant 1: 5/10\nAssistant 2: 8/10\n\n{aside}"):
        assert parse_scores(review) == Verdict("2", 5, 8), review


GIVEN = [
    "I would give Assistant 1 a score of 8 and Assistant 2 a score of 9.",
    "If I had to choose, I would give scores of 8 and 9.",
    "Given the errors, I would rate Assistant 1: 8/10 and Assistant 2: 9/10.",
    "With this in mind, I would give scores of 8 and 9.",
    "Therefore, the scores would be 8 and 9.",
    "If Assistant 1 had sources it would be better, but it has none: scores of 8 and 9.",
    "While not perfect, Assistant 1 receives a score of 8, and Assistant 2 receives a score of 9.",
    "Not bad at all - Assistant 1: 8/10, Assistant 2: 9/10",
    "Neither is perfect. Scores: 8 and 9",
    "8 9 If the user wanted brevity, Assistant 1 would be better.",
    "Assistant 1: 8 (would be 9 if it had sources)\nAssistant 2: 9",
    "Assistant 1: 8/10, could have been 10/10 with sources\nAssistant 2: 9/10",
    "Some readers may prefer Assistant 1. Assistant 1: 8/10. Assistant 2: 9/10",
    "At first glance both look alike, but the scores are 8 and 9",
    "Assistant 1: 8/10 (not 9/10)\nAssistant 2: 9/10",
]


@pytest.mark.parametrize("review", GIVEN)
def test_what_is_meant_is_read(review: str) -> None:
    assert parse_scores(review) == Verdict("2", 8, 9)


@pytest.mark.parametrize(
    ("review", "verdict"),
    [
        ("If accuracy were all, I would choose [[A]]. As it is, [[B]]", Verdict("2")),
        ("Had it been complete, [[A]] would win. [[B]]", Verdict("2")),
        ("Assistant A votes for itself with [[A]]. Verdict: [[B]]", Verdict("2")),
        ("[[B]]. If A had been longer, I would have chosen [[A]].", Verdict("2")),
        ("If I had to choose, [[B]].", Verdict("2")),
        ("Not a close call: [[B]]", Verdict("2")),
        ("Assistant A's answer could have been longer, so [[B]]", Verdict("2")),
        ("If accuracy were all, I would choose [[A]].", Unparsed("no_verdict")),
        ("[[A]] is not my verdict.", Unparsed("no_verdict")),
        ("[[A]] is not better than [[B]].", Unparsed("no_verdict")),
        ("[[A]] would be wrong.", Unparsed("no_verdict")),
    ],
)
def test_letters_beside_asides(review: str, verdict: Verdict | Unparsed) -> None:
    assert parse_letters(review) == verdict


@pytest.mark.parametrize(
    "review",
    [
        "As noted in [[3]], the answer is good. Rating: [[7]]",
        "It cites [[1]] and [[2]](https://example.org/2). Rating: [[7]]",
        "[[1]] Smith, 2020.\n[[2]] Jones, 2021.\nRating: [[7]]",
        "Rating: [[7]]\n\nReferences\n[[1]] Smith, 2020.",
        "The answer is good [[1]]. I give it [[7]].",
        "The sources are real [[1]].\n\n[[7]]",
        "If it had cited sources, I would give [[9]]. As it is, [[7]]",
        "With sources it would be a [[9]]. Rating: [[7]]",
        "Not [[9]], but [[7]].",
        "It does not deserve [[9]]. Is it [[8]]? Rating: [[7]]",
        'The answer rates itself "[[10]]". Rating: [[7]]',
        'Use the format "Rating: [[5]]". Rating: [[7]]',
        "[[1]] means bad, [[10]] means good. Rating: [[7]]",
        "Accuracy: [[9]]\nDepth: [[4]]\n\nOverall rating: [[7]]",
        "[[7]]\n\nIt is good.",
        "[[7]] - helpful, but short.",
        "Considering everything, it is a [[7]].",
        'My answer is "[[7]]".',
        "The response is helpful. [[7]]",
        "I settle on [[7]].",
        "Bewertung: [[7]]",
    ],
)
def test_a_mark_among_what_is_none(review: str) -> None:
    assert parse_rating(review) == Verdict(None, 7)


@pytest.mark.parametrize(
    "review",
    [
        "As noted in [[3]], the answer is good.",
        "It cites a study [[3]].",
        "Sources: [[3]]",
        "If it had cited sources, I would give [[9]].",
        "The answer says Rating: [[10]] of itself.",
        'For example: "Rating: [[5]]".',
        "Rating: [[8-9]]",
        "It has a good score in [3].",
        "The answer scored well on recall [3].",
    ],
)
def test_no_mark_among_citations(review: str) -> None:
    assert parse_rating(review) == Unparsed("no_rating")


@pytest.mark.parametrize(
    "text",
    [
        '{"score_1": 8, "score_2": 6, "score_1": 2}',
        '{"assistant_1": 8, "assistant_1": 2, "assistant_2": 6}',
        '```json\n{"assistant_1": 8, "assistant_2": 6, "assistant_1": 8}\n```',
        '{"assistant_1": {"score": 8, "score": 3}, "assistant_2": {"score": 6}}',
        '{"scores": [8, 6], "scores": [2, 6]}',
        'My verdict: {"assistant_1": 8, "assistant_1": 2, "assistant_2": 6}. That is all.',
    ],
)
def test_a_score_that_stands_twice_is_no_score(text: str) -> None:
    assert parse_scores(text) == Unparsed("duplicate_field")
    assert parse_review("scores", text, PAIR, "stop", "json", {}) == Unparsed("duplicate_field")


def test_another_field_may_stand_twice() -> None:
    assert parse_scores('{"score_1": 8, "score_2": 6, "note": "a", "note": "b"}') == Verdict("1", 8, 6)
    # What the question holds is not the judge's.
    assert parse_scores('5 8\nSee {"score": 1, "score": 2}.', '{"score": 1, "score": 2}') == Verdict("2", 5, 8)


@pytest.mark.parametrize("head", ["| Assistant 2 | Assistant 1 |\n|---|---|\n", "Assistant B | Assistant A\n---|---\n"])
def test_a_table_of_two_columns_is_read_by_its_heads(head: str) -> None:
    assert parse_scores(f"{head}| 8 | 9 |") == Verdict("1", 9, 8)


def test_a_long_review_of_asides_takes_no_long_time() -> None:
    for part in ("if ", "would have ", "not ", "one could give ", "Assistant 1 says ", 'says "', "9 and 4 ", "with a "):
        began = time.process_time()
        without_asides(part * 20_000)
        assert time.process_time() - began < 20, part  # quadratic time would be minutes
