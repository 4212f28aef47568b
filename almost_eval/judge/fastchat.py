"""Files of FastChat, pinned: the questions of Vicuna and MT-Bench, their review prompts, MT-Bench's reference answers.

They are other people's words, so they are read at run time: from the data root, then the cache, then the pinned tag,
and taken only where their sha256 is the one written here.

Some of the reference answers, which GPT-4 wrote (`reference_answer/gpt-4.jsonl`), are wrong.
`mt_bench_references.jsonl` lists them: question, turn, what is wrong, an answer that is right, and who has reported it;
each was checked anew, by computing or by running the code (tests/almost_eval/judge/test_references.py). Its `sha256` is
over question and reference answer as JSON, so that a listed reference is known wherever it comes from, and another
answer to the same question is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from almost_eval.data.sources import DataSource, pinned_text
from almost_eval.files import parse_lines, read_rows
from almost_eval.judge.records import Question
from almost_eval.types import JSONObject

REPOSITORY = "lm-sys/FastChat"
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""Of an answer to a question of MT-Bench, by its category; any other category has 0.7. `temperature_config` of
`fastchat/llm_judge/common.py` at v0.2.36."""
PINNED = {
    "fastchat/eval/table/question.jsonl": (
        "v0.2.1",
        "590c39157bc561eadd7f03cad4be18c2b597f93029780af65f86718f39eafa87",
    ),
    "fastchat/eval/table/prompt.jsonl": (
        "v0.2.1",
        "475f1ff9e2872fe0ffd43db38fd5c3277f46fe6b2d62fcd2f968a0c9e59391a3",
    ),
    "fastchat/eval/table/reviewer.jsonl": (
        "v0.2.1",
        "f9bbe8afca441761cbbe5ed3298101e63e8e2d42a2f1dea0ce2c5c991b8d5893",
    ),
    "fastchat/llm_judge/data/judge_prompts.jsonl": (
        "v0.2.36",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
    "fastchat/llm_judge/data/mt_bench/question.jsonl": (
        "v0.2.36",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    "fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl": (
        "v0.2.36",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
}
"""Path in the repository -> (tag, sha256 of the bytes)."""


def fastchat_text(path: str, data: DataSource, *, instead: str) -> str:
    """A pinned file, a key of `PINNED`; `instead` is what else the user can do, the end of an error's line.

    Raises:
        DataError: it cannot be had, or is another file.
    """
    tag, sha256 = PINNED[path]
    return pinned_text(REPOSITORY, tag, path, sha256, data, instead=instead)


def fastchat_rows(path: str, data: DataSource) -> list[JSONObject]:
    """The rows of a pinned file of prompts; see `fastchat_text`."""
    return [row for _, row in parse_lines(path, fastchat_text(path, data, instead="use --prompt-set builtin"))]


# --- reference answers

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
