"""FastChat's review prompts of the Vicuna questions: two scores from 1 to 10, a prompt for each kind of question."""

from __future__ import annotations

from pathlib import Path

from almost_eval.data.sources import DataSource
from almost_eval.judge.fastchat import fastchat_rows
from almost_eval.judge.prompts import PromptFamily, PromptTemplate, Wording

_TABLE = "fastchat/eval/table"


def official(data: DataSource) -> Wording:
    """A reviewer for each category names its prompt; the first reviewer takes every other category."""
    prompts = {row["prompt_id"]: row for row in fastchat_rows(f"{_TABLE}/prompt.jsonl", data)}
    reviewers = fastchat_rows(f"{_TABLE}/reviewer.jsonl", data)
    templates = {}
    for reviewer in reviewers:
        row = prompts[reviewer["prompt_id"]]
        user = row["prompt_template"].replace("{prompt}", row["defaults"]["prompt"])
        templates[reviewer["category"]] = PromptTemplate(row["system_prompt"], user)
    settings = reviewers[0]["metadata"]
    return Wording(templates, settings["temperature"], settings["max_tokens"])


FAMILY = PromptFamily(
    title="two scores from 1 to 10; a prompt for each category of question",
    form="scores",
    builtin=Path(__file__).with_suffix(".yaml"),
    official=official,
)
