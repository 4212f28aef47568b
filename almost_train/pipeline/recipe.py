"""A recipe: one YAML file with a section for each stage, read and checked as far as that needs no stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

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


def load_recipe(
    name: str, *, seed: int | None = None, places: Mapping[str, str] | None = None, values: Sequence[str] = ()
) -> Recipe:
    """A built-in recipe by name, or a YAML file.

    Args:
        name: of the recipe, or its file.
        seed: in place of the recipe's own.
        places: model or file that the recipe names -> the folder or file to take in its place.
        values: settings in place of the recipe's own, as `set_values` reads them; they come last.

    Raises:
        InputError: no such recipe, not YAML, or an unknown section; a place or a value that fits nothing.
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
    content = set_values(put_in_place(content, places or {}, file.stem), values, file.stem)
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


def set_values(content: Mapping[str, Any], values: Sequence[str], name: str) -> dict[str, Any]:
    """A recipe's content with other settings: `comparisons.length_rule=false`, `seed=1`; `dpo=null` leaves one out.

    What stands behind the `=` is YAML. Whether a setting exists is seen when the section is read.

    Raises:
        InputError: not of this form, or a section that no recipe has.
    """
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    for item in values:
        path, equals, text = item.partition("=")
        section, _, key = path.partition(".")
        if not equals or not section:
            raise InputError(f"{item!r} sets nothing; write SECTION.SETTING=VALUE, as comparisons.length_rule=false")
        if section not in HEAD + SECTIONS:
            raise InputError(f"recipe {name}: unknown section {section!r}; {did_you_mean(section, HEAD + SECTIONS)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{item!r}: the value is not YAML ({' '.join(str(error).split())})") from None
        if not key:
            changed[section] = value
        elif isinstance(changed.setdefault(section, {}), dict):
            changed[section][key] = value
        else:
            raise InputError(f"recipe {name}: {section!r} has no settings of its own; write {section}=VALUE")
    return {key: value for key, value in changed.items() if value is not None}


def put_in_place(content: Any, places: Mapping[str, str], name: str) -> Any:
    """A recipe's content with other models or files: each text that is a key of `places` becomes its value.

    Raises:
        InputError: a key that the recipe does not name.
    """
    named: set[str] = set()

    def walk(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: walk(value) for key, value in item.items()}
        if isinstance(item, list):
            return [walk(value) for value in item]
        if isinstance(item, str):
            named.add(item)
            return places.get(item, item)
        return item

    changed = walk(content)
    for key in places:
        if key not in named:
            told = sorted(text for text in named if ("/" in text or "." in text) and not text.split()[1:])
            raise InputError(f"recipe {name} names no {key!r}; {did_you_mean(key, told)}")
    return changed
