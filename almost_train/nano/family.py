"""Turns what `almost-train run nano` made into the shipped models: fp16 on disk, each with a card.

almost-train run nano --output runs/nano
almost-train nano collect --pipeline runs/nano --output DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.errors import InputError
from almost_eval.files import read_json, whole_folder
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.types import JSONObject


@dataclass(frozen=True, slots=True)
class Member:
    """One shipped model."""

    made: str
    """Where a pipeline's folder holds it."""
    reward: bool
    what: str
    """One sentence for the card."""


MEMBERS = {
    "reward": Member(
        "reward/model",
        True,
        "The reward model of the nano recipe: vanilla-medium, trained on synthetic comparisons alone; one label, raw "
        "logits, higher is better.",
    ),
    "sft": Member(
        "sft/model", False, "vanilla-medium, fine-tuned on the demonstrations of reward-model-guided self-play."
    ),
    "almost": Member(
        "rlsf/policy",
        False,
        "The aligned policy of the nano recipe: the sft model after reinforcement learning from synthetic feedback.",
    ),
}


def collect(pipeline: Path, output: Path) -> list[Path]:
    """Write `output/reward`, `output/sft` and `output/almost` from the folder of a finished `almost-train run nano`.

    Raises:
        InputError: a pipeline that is not finished, or a folder that is taken.
    """
    missing = [member.made for member in MEMBERS.values() if not (pipeline / member.made / "config.json").is_file()]
    if missing:
        raise InputError(f"{pipeline} has no {missing[0]}; give the folder of a finished `almost-train run nano`")
    figures = read_json(pipeline / "evaluation" / "result.json", "metrics")["metrics"]
    return [_collect(pipeline, output / name, name, member, figures) for name, member in MEMBERS.items()]


def _collect(pipeline: Path, target: Path, name: str, member: Member, figures: JSONObject) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from almost_train.nano.pretrain import save

    source = pipeline / member.made
    kinds = ("SequenceClassification",) if member.reward else ("CausalLM",)
    find_checkpoint(str(source), architectures=kinds)
    auto: Any = AutoModelForSequenceClassification if member.reward else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(source)
    with whole_folder(target) as folder:
        save(auto.from_pretrained(source, dtype=torch.float32), tokenizer, folder)
        (folder / "README.md").write_text(_card(name, member, figures), encoding="utf-8")
    return target


def _card(name: str, member: Member, figures: JSONObject) -> str:
    task = "text-classification" if member.reward else "text-generation"
    rows = "".join(
        f"| {policy} | {by_name['oracle']['value']:.2f} | {by_name['reward']['value']:.2f} |\n"
        for policy, by_name in figures.items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: {task}
---

# {name}

{member.what} The nano world of the ALMoST Toolkit is a scale model of the method (arXiv 2305.13735): the model knows
nothing else. Weights in fp16, to be computed in float32; the chat template is in the tokenizer.

Made by `almost-train run nano --output runs/nano`, then `almost-train nano collect --pipeline runs/nano --output DIR`.

Policies of that run on held-out queries, by the world's oracle (0 to 1) and by the reward model (raw logit):

| policy | oracle | reward |
| --- | --- | --- |
{rows}"""
