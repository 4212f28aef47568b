"""Reviews in the forms that judges write them in: what a person reads in each, or nothing, and never the other side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from almost_eval.judge.brackets import parse_letters
from almost_eval.judge.prompts import parse_review
from almost_eval.judge.records import Answer, Pair, Question, Unparsed, Verdict
from almost_eval.judge.verdicts import parse_scores

PAIR = Pair(Question("1", "Why?"), Answer("1", "Because.", "a"), Answer("1", "So.", "b"), "forward")

READ: list[tuple[str, str, tuple[float, float] | str]] = [
    (
        "scores",
        "<think>\nThe scores would be 7 and 8. No: 2 errs.\n</think>\n\n9 7\n\nOne is right.",
        (9, 7),
    ),
    ("scores", "<think>\nOverall score: Assistant 1: 8, Assistant 2: 6. But no.\n</think>\n5 8\n\nHalf.", (5, 8)),
    ("scores", "First impression: 5 and 8. It does not run at all.\n</think>\n\n9 4\n\nOne runs.", (9, 4)),
    ("scores", "<reasoning>\nFinal scores: 6 and 7? No.\n</reasoning>\n8 5\n\nTwo ignored the format.", (8, 5)),
    ("scores", '{"assistant_1": 7, "assistant_2": 9, "reason": "more depth"}', (7, 9)),
    ("scores", '{"assistant_2": {"score": 6}, "assistant_1": {"score": 9}}', (9, 6)),
    ("scores", '```json\n{"score_1": 8, "score_2": 6}\n```', (8, 6)),
    ("scores", "**7 8**\n\nAssistant 2 is a little better.", (7, 8)),
    ("scores", "### Assistant 1\n**Score: 6.5/10**\nShort.\n\n### Assistant 2\n**Score: 8/10**\nGood.", (6.5, 8)),
    ("scores", "Assistant 1 gets 8 out of 10 and Assistant 2 gets 8 out of 10.", (8, 8)),
    ("scores", "Assistant 2: 7/10\nAssistant 1: 9/10\n\nAssistant 1 is better.", (9, 7)),
    ("scores", "\uff17 \uff19\n\n助手2的回答更详细。", (7, 9)),
    ("letters", "<think>\nAt first sight [[A]], but its proof has a gap.\n</think>\nB's is complete. [[B]]", "2"),
    ("scores", '{"assistant_1": {"depth": 2, "score": 9}, "assistant_2": {"depth": 9, "score": 3}}', (9, 3)),
    ("scores", 'My verdict:\n```json\n{"assistant_1": 9, "assistant_2": 3}\n```\nThat is all.', (9, 3)),
    ("scores", "A long comparison.\nOf both.\nIn lines.\nFinal: 9 3", (9, 3)),
    ("scores", "9\u2004" + "3\n\nOne is better.", (9, 3)),
    ("scores", "9\ufe0f\u20e3 3\ufe0f\u20e3\n\nOne is better.", (9, 3)),
    (
        "scores",
        "| Assistant | Depth | Overall |\n|---|---|---|\n| Assistant 1 | 7 | 5 |\n| Assistant 2 | 9 | 4 |",
        (5, 4),
    ),
    ("letters", "\uff3b\uff3b\uff21\uff3d\uff3d", "1"),
    ("letters", "It is not [[B]]; it is [[A]].", "1"),
    ("letters", "I choose [[B]] rather than [[A]].", "2"),
    ("letters", "[[A]] for its greater depth.", "1"),
    ("letters", "<think>Could be [[C]]. Hmm.</think>\n\nAssistant A is more precise.\n\n[[A]]", "1"),
]
SILENT = [
    ("scores", "<think>\nI could say 8 and 6, but first the arithmetic. 17 times 23 is"),
    ("scores", "85 90\n\nAssistant 2 is better."),
    ("scores", "4/5 3/5\n\nAssistant 1 is better."),
    ("scores", "Assistant 1 makes 3 errors, Assistant 2 makes 5. I cannot rate them."),
    ("scores", "Assistant 1 says 1969 and Assistant 2 says 1970."),
    ("scores", "I'm sorry, but I can't compare these responses."),
    ("scores", "| Assistant | Depth | Style |\n|---|---|---|\n| Assistant 1 | 7 | 5 |\n| Assistant 2 | 9 | 4 |"),
    ("scores", '{"assistant_1": 9, "assistant_2": 3, "score_1": 2, "score_2": 8}'),
    ("scores", "9 3\nWait, I had that the wrong way round. 3 9."),
    ("letters", "I would say [[A]] if accuracy matters most, otherwise [[B]]."),
    ("scores", "| Assistant | Rank |\n|---|---|\n| Assistant 1 | 1 |\n| Assistant 2 | 2 |"),
    ("scores", "Errors:\nAssistant 1: 3\nAssistant 2: 5"),
    ("letters", "The R code x[[b]] is right."),
    ("letters", "Is it [[A]]?"),
    ("letters", "I cannot choose [[A]]."),
    ("letters", "Neither [[A]] nor [[B]]."),
    ("letters", '<think>\nThe format wants "[[A]]" if A is better. I lean towards [[A]]. Let me check'),
]
EITHER: list[tuple[str, tuple[float, float]]] = [
    ("Assistant 1: [[9]]\nAssistant 2: [[5]]", (9, 5)),
    ("7,5 8,5\n\nAssistant 2 ist etwas besser.", (7.5, 8.5)),
    ("| | Assistant 1 | Assistant 2 |\n|---|---|---|\n| Depth | 6 | 9 |\n| **Total** | **7** | **9** |", (7, 9)),
    ("助手1\uff1a7分\n助手2\uff1a9分", (7, 9)),
    ("Scores for Assistant 2 and Assistant 1: 6 and 9.", (9, 6)),
    ("6 (Assistant 2), 9 (Assistant 1)", (9, 6)),
]
"""Forms that may be left unparsed, which is counted; read, they are read right."""


@pytest.mark.parametrize(("form", "review", "expected"), READ)
def test_what_it_says(form: str, review: str, expected: tuple[float, float] | str) -> None:
    verdict = parse_review(form, review, PAIR)
    assert isinstance(verdict, Verdict)
    assert expected == (verdict.winner if form == "letters" else (verdict.score_1, verdict.score_2))


@pytest.mark.parametrize(("form", "review"), SILENT)
def test_what_says_nothing(form: str, review: str) -> None:
    assert not isinstance(parse_review(form, review, PAIR), Verdict)


@pytest.mark.parametrize(("review", "expected"), EITHER)
def test_what_is_never_read_wrong(review: str, expected: tuple[float, float]) -> None:
    verdict = parse_review("scores", review, PAIR)
    assert not isinstance(verdict, Verdict) or (verdict.score_1, verdict.score_2) == expected


@pytest.mark.parametrize("review", ["9 1", "<think>Hm.</think>\n9 1", "Assistant 1: 9, Assistant 2: 1", "9 8."])
def test_a_cut_may_have_shortened_the_last_number(review: str) -> None:
    assert parse_review("scores", review, PAIR, "length") == Unparsed("cut")
    assert isinstance(parse_review("scores", f"{review}\nOne is", PAIR, "length"), Verdict)


def test_a_letter_at_the_end_is_no_verdict_where_an_answer_is_quoted() -> None:
    pair = replace(PAIR, answer_1=Answer("1", "Write [[A]].", "a"))
    assert not isinstance(parse_review("letters", 'Assistant A ends in "[[A]]".', pair), Verdict)
    verdict = parse_review("letters", 'A asks for it. Final verdict: "[[A]]"\n\nTell me if you need more.', pair)
    assert isinstance(verdict, Verdict)
    assert verdict.winner == "1"


def test_the_parsers_by_themselves_read_no_thought() -> None:
    assert parse_scores("<think>\nThe final scores would be 7 and 8.\n</think>\n\n9 7\n\nOne is right.") == Verdict(
        "1", 9, 7
    )
    assert parse_letters("<think>[[A]]?</think>\n[[B]]") == Verdict("2")
    assert parse_letters("<think>\nI lean towards [[A]]. Let me") == Unparsed("thinking_cut")
