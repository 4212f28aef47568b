"""`--scale tiny`: a recipe with its own stages and code paths, in minutes on a laptop, to see that it runs to its end.

Every model becomes one small one, and every number one that is just large enough for the next stage to have something
to read. What says how a stage works stays: algorithm, LoRA, bf16, ranking, demonstrations, prompt set. What needs a GPU
goes: vLLM and several devices (transformers samples), 4 bits (the base is whole). The policy that comes out is worth
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from almost_eval.errors import InputError
from almost_eval.types import JSONObject
from almost_train.pipeline.recipe import Recipe
from almost_train.rlsf.job import SAMPLER_SETTINGS

SCALES = ("full", "tiny")
MODELS_VARIABLE = "ALMOST_REAL_MODELS"
"""The environment variable with the folder that holds `SMALL_MODEL`."""
SMALL_MODEL = "smollm2-135m-instruct"
PROMPTS = Path(__file__).parents[1] / "recipes" / "tiny-prompts.jsonl"
"""What the evaluation asks at this scale."""

TINY: Mapping[str, JSONObject] = {
    "prompts": {"count": 6, "shots": 4, "round_size": 8, "max_rounds": 3, "min_characters": 1, "max_new_tokens": 32},
    "responses": {"max_new_tokens": 24, "min_characters": 1, "rules": []},
    "comparisons": {"length_rule": False},
    "votes": {"count": 8},
    "as_is_reward": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2, "max_length": 256},
    "reward": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4, "max_length": 256},
    # An answer that is not finished is no demonstration: it gets as many tokens as a small model needs to end some.
    "self_play": {"shots": 1, "candidates": 4, "max_turns": 1, "max_new_tokens": 64, "user_max_new_tokens": 24},
    "sft": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2, "max_length": 256},
    "rlsf": {
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_new_tokens": 8,
        "save_every": 1,
        "guard_window": 0,
    },
    "dpo": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2, "max_length": 256, "max_steps": 2},
    "online_dpo": {
        "epochs": 1,
        "batch_size": 4,
        "micro_batch_size": 2,
        "sampling_batch_size": 4,
        "max_length": 256,
        "max_steps": 2,
        "max_new_tokens": 8,
    },
    "evaluation": {"max_new_tokens": 8, "limit": 2},
}
"""Section -> settings in the place of the recipe's."""
_PPO: JSONObject = {"mini_batch_size": 4, "sampling_batch_size": 4, "ppo_epochs": 1}
_MODELS = ("model", "assistant_model", "user_model", "vanilla", "as_is_reward_model")
_LEFT_OUT = ("quantize", "optim", "attention", *SAMPLER_SETTINGS)
"""Settings that need a GPU or a server, and those of a sampler that is left out."""


def scaled(recipe: Recipe, scale: str, model: Path | str | None) -> Recipe:
    """The recipe itself (`full`), or its small form.

    Args:
        recipe: as it was read.
        scale: a name in `SCALES`.
        model: stands for every model at `tiny`; None is `SMALL_MODEL` in the folder of `MODELS_VARIABLE`.

    Raises:
        InputError: no small model is named or to be had; or one is named at full scale.
    """
    if scale == "full":
        if model is not None:
            raise InputError(
                "--scale-model stands for every model of a recipe at --scale tiny; add that, or leave it out"
            )
        return recipe
    name = str(model) if model is not None else _small_model()
    sections: dict[str, JSONObject] = {}
    for section, own in recipe.sections.items():
        changed = {key: value for key, value in own.items() if key not in _LEFT_OUT} | TINY.get(section, {})
        changed |= {key: name for key in _MODELS if key in own}
        if "lora_rank" in own:
            changed["lora_rank"] = _at_most(own["lora_rank"], 8)
        sections[section] = changed
    if "responses" in sections:
        configurations: Any = recipe.value("responses", "configurations")
        if isinstance(configurations, list):
            sections["responses"]["configurations"] = [
                {**c, "model": name, "shots": _at_most(c.get("shots", 1), 1)} if isinstance(c, dict) else c
                for c in configurations
            ]
    if "rlsf" in sections and sections["rlsf"].get("algorithm", "ppo") == "ppo":
        sections["rlsf"] |= _PPO
    if "prompts" in sections:
        sections["prompts"]["accept_fewer"] = True
    if "prompts" in sections.get("evaluation", {}):
        sections["evaluation"]["prompts"] = str(PROMPTS)
    return replace(recipe, engine={"engine": "hf", "dtype": "float32"}, sections=sections)


def _at_most(value: object, most: int) -> object:
    """The number, or `most` where it is larger; what is no number stays, to be refused as at full scale."""
    return min(value, most) if isinstance(value, int) and not isinstance(value, bool) else value


def _small_model() -> str:
    folder = os.environ.get(MODELS_VARIABLE)
    path = Path(folder) / SMALL_MODEL if folder else None
    if path is None or not path.is_dir():
        where = f"{path} is not there" if path else f"{MODELS_VARIABLE} is not set"
        raise InputError(
            f"--scale tiny needs a small model ({where}); give a folder, a hub id or nano/vanilla-medium with "
            f"--scale-model, or set {MODELS_VARIABLE} to the folder that holds {SMALL_MODEL}"
        )
    return str(path)
