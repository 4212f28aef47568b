"""FastChat's pair prompts of MT-Bench: the letter of the winner, after the reasons.

Departure from FastChat: a question without a reference answer is judged by `pair-v2`, where FastChat stops.
"""

from __future__ import annotations

from pathlib import Path

from almost_eval.data.sources import DataSource
from almost_eval.judge.fastchat import fastchat_rows
from almost_eval.judge.prompts import REFERENCE, PromptFamily, PromptTemplate, Wording

_PROMPTS = "fastchat/llm_judge/data/judge_prompts.jsonl"
_PLACES = {"answer_a": "answer_1", "answer_b": "answer_2", "ref_answer_1": "reference"}
"""FastChat's name of a place -> ours."""


def official(data: DataSource) -> Wording:
    """Two of FastChat's prompts: for every question, and for those with a reference answer."""
    rows = {row["name"]: row for row in fastchat_rows(_PROMPTS, data)}
    templates = {}
    for category, name in (("general", "pair-v2"), (REFERENCE, "pair-math-v1")):
        user = rows[name]["prompt_template"]
        for theirs, ours in _PLACES.items():
            user = user.replace(f"{{{theirs}}}", f"{{{ours}}}")
        templates[category] = PromptTemplate(rows[name]["system_prompt"], user)
    return Wording(templates)


FAMILY = PromptFamily(
    title="the letter of the winner, after the reasons",
    form="letters",
    builtin=Path(__file__).with_suffix(".yaml"),
    official=official,
)
