"""FastChat's prompts of MT-Bench: for a pair the letter of the winner, for one answer a mark, after the reasons.

Departures from FastChat: a question without a reference answer is judged by `pair-v2`, where FastChat stops; and the
prompts of two turns serve for any number of them, the block of a turn repeated and "second" made "third" and so on.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from almost_eval.data.sources import DataSource
from almost_eval.judge.fastchat import fastchat_rows
from almost_eval.judge.prompts import GENERAL, REFERENCE, TURNS, PromptFamily, PromptTemplate, Wording
from almost_eval.types import JSONMapping

_PROMPTS = "fastchat/llm_judge/data/judge_prompts.jsonl"
_PLACES = {"answer_a": "answer_1", "answer_b": "answer_2", "ref_answer_1": "reference"}
"""FastChat's name of a place -> ours, in a prompt of one turn."""
_PLACES_OF_TURNS = {"answer_a": "answer_1", "answer_b": "answer_2", "answer": "answer", "ref_answer": "reference"}
"""The same in a prompt of two turns, without the number of the turn."""
_BLOCK = re.compile(
    r"### User:\n\{question_1\}\n\n### (?P<speaker>[^:\n]+):\n\{(?P<place>\w+)_1\}\n\n"
    r"### User:\n\{question_2\}\n\n### (?P=speaker):\n\{(?P=place)_2\}\n\n"
)
"""Two turns, written out."""


def _official(data: DataSource, *, general: str, reference: str) -> Wording:
    """Four of FastChat's prompts: for every question and for those with a reference answer, of one turn and of two."""
    rows = {row["name"]: row for row in fastchat_rows(_PROMPTS, data)}
    templates = {}
    for category, name in ((GENERAL, general), (REFERENCE, reference)):
        templates[category] = _of_one_turn(rows[name])
        templates[category + TURNS] = _of_several(rows[f"{name}-multi-turn"])
    return Wording(templates)


def _of_one_turn(row: JSONMapping) -> PromptTemplate:
    user = row["prompt_template"]
    for theirs, ours in _PLACES.items():
        user = user.replace(f"{{{theirs}}}", f"{{{ours}}}")
    return PromptTemplate(row["system_prompt"], user)


def _of_several(row: JSONMapping) -> PromptTemplate:
    def block(match: re.Match[str]) -> str:
        place = _PLACES_OF_TURNS[match["place"]]
        return f"{{turns}}### User:\n{{question}}\n\n### {match['speaker']}:\n{{{place}}}\n\n{{/turns}}"

    system = re.sub(r"\bsecond(?= (?:user )?question)", "{nth}", row["system_prompt"])
    return PromptTemplate(system, _BLOCK.sub(block, row["prompt_template"]))


FAMILY = PromptFamily(
    title="the letter of the winner, after the reasons",
    form="letters",
    builtin=Path(__file__).with_suffix(".yaml"),
    official=partial(_official, general="pair-v2", reference="pair-math-v1"),
)
FAMILY_OF_ONE = PromptFamily(
    title="one answer by itself: a mark from 1 to 10, after the reasons",
    form="rating",
    builtin=Path(__file__).with_name("mt_bench_single.yaml"),
    official=partial(_official, general="single-v1", reference="single-math-v1"),
)
