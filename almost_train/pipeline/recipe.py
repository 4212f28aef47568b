"""A recipe: one YAML file with a section for each stage, read and checked as far as that needs no stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TypeVar

import yaml

from almost_eval.errors import InputError, did_you_mean
from almost_eval.types import JSONObject
from almost_train.common.config import settings_from

T = TypeVar("T")

RECIPES = Path(__file__).parents[1] / "recipes"
HEAD = ("description", "seed", "prompt_set", "engine", "held_out", "threads")
"""Keys of a recipe that are no stage."""
SECTIONS = (
    "prompts",
    "responses",
    "comparisons",
    "votes",
    "as_is_reward",
    "reward",
    "self_play",
    "sft",
    "rlsf",
    "dpo",
    "online_dpo",
    "evaluation",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as it was read; sections are still plain mappings."""

    name: str
    description: str
    seed: int
    prompt_set: str
    engine: JSONObject
    threads: int | None
    """CPU threads of torch, or None for its own choice. Models this side of a million weights are faster on one."""
    held_out: str | None
    """A file of prompts that no stage may train on, or `nano`: all prompts of the nano world's evaluation."""
    sections: Mapping[str, JSONObject]

    def settings(self, section: str, cls: type[T], *drop: str, **fixed: object) -> T:
        """The settings of a section, with the recipe's seed where it names none.

        Args:
            section: its name.
            cls: the settings' dataclass.
            drop: keys of the section that are no settings.
            fixed: values for what the section leaves out.

        Raises:
            InputError: an unknown setting, or a value that it cannot have.
        """
        values = fixed | {key: value for key, value in self.sections[section].items() if key not in drop}
        if "seed" in signature(cls).parameters:
            values = {"seed": self.seed} | values
        return settings_from(cls, values, f"recipe {self.name}, {section}")

    def value(self, section: str, key: str) -> object:
        """A key of a section that is no setting: a model, a file.

        Raises:
            InputError: the section lacks it.
        """
        try:
            return self.sections[section][key]
        except KeyError:
            raise InputError(f"recipe {self.name}, {section}: {key!r} is missing") from None


def load_recipe(name: str, *, seed: int | None = None) -> Recipe:
    """A built-in recipe by name, or a YAML file.

    Raises:
        InputError: no such recipe, not YAML, or an unknown section.
    """
    built_in = {file.stem: file for file in RECIPES.glob("*.yaml")}
    file = built_in.get(name) or Path(name)
    if not file.is_file():
        raise InputError(f"no recipe {name!r}; {did_you_mean(name, built_in)}; a path to a YAML file also works")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no mapping; a recipe has sections {', '.join(SECTIONS)}")
    for key, value in content.items():
        if key not in HEAD + SECTIONS:
            raise InputError(f"recipe {file.stem}: unknown section {key!r}; {did_you_mean(key, HEAD + SECTIONS, 20)}")
        if key in SECTIONS and not isinstance(value, dict):
            raise InputError(f"recipe {file.stem}, {key}: is {value!r}; it must be a mapping of settings")
    threads = content.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"recipe {file.stem}: threads is {threads!r}; it must be a whole number of at least 1")
    return Recipe(
        name=file.stem,
        description=str(content.get("description", "")),
        seed=int(content.get("seed", 0)) if seed is None else seed,
        prompt_set=str(content.get("prompt_set", "builtin")),
        engine=content.get("engine") or {},
        threads=content.get("threads"),
        held_out=content.get("held_out"),
        sections={key: content[key] for key in SECTIONS if key in content},
    )
