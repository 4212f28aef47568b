"""Reference answers: those of FastChat for MT-Bench, and which of them are known to be wrong.

A judge of FastChat compares answers to math, reasoning and coding questions with a reference answer that GPT-4 wrote
(`reference_answer/gpt-4.jsonl`). Some of these are wrong. `mt_bench_references.jsonl` lists them: question, turn, what
is wrong, an answer that is right, and who has reported it; each was checked anew, by computing or by running the code
(tests/almost_eval/judge/test_references.py). Its `sha256` is over question and reference answer as JSON, so that a
listed reference is known wherever it comes from, and another answer to the same question is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from almost_eval.files import read_rows
from almost_eval.judge.records import Question

PUBLISHED, CORRECTED = "published", "corrected"
"""What `--reference` names besides a file: FastChat's answers as they are, or with the wrong ones mended."""

_LISTED = Path(__file__).with_name("mt_bench_references.jsonl")


class WrongReference(NamedTuple):
    """A published reference answer that is wrong."""

    question_id: str
    turn: int
    """From 1."""
    wrong: str
    """What is wrong with it."""
    corrected: str
    """An answer that is right, in our words."""
    source: str
    """Address of the report."""


@cache
def known_wrong() -> dict[str, WrongReference]:
    """Digest of (question, reference answer) -> what is wrong with the reference."""
    return {
        row["sha256"]: WrongReference(
            str(row["question_id"]), row["turn"], row["wrong"], row["corrected"], row["source"]
        )
        for row in read_rows(_LISTED)
    }


def wrong_reference(question: Question, turn: int) -> WrongReference | None:
    """What is known to be wrong with the reference answer to a turn (from 1); None where nothing is."""
    reference = question.references[turn - 1]
    if not reference:
        return None
    text = json.dumps([question.turns[turn - 1], reference])
    return known_wrong().get(hashlib.sha256(text.encode()).hexdigest())


def corrected(question: Question) -> Question:
    """The question with every reference that is known to be wrong replaced by a right one."""
    wrong = [wrong_reference(question, turn) for turn in range(1, len(question.turns) + 1)]
    mended = [w.corrected if w else r for w, r in zip(wrong, question.references, strict=True)]
    return question.with_references(mended) if any(wrong) else question


def wrong_turns(question: Question, turns: Sequence[int]) -> list[int]:
    """Those of the turns whose reference answer is known to be wrong."""
    return [turn for turn in turns if wrong_reference(question, turn)]
