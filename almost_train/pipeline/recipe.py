"""A recipe: one YAML file with a section for each stage, read and checked as far as that needs no stage."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from almost_eval.errors import AlmostError, InputError, did_you_mean
from almost_eval.types import JSONObject
from almost_train.common.config import MOST_SEED, option, settings_from
from almost_train.common.yaml_file import read_yaml, yaml_value

T = TypeVar("T")

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True, slots=True)
class RecipeHead:
    """The keys of a recipe that hold one value."""

    description: str = option("", "What it makes.")
    seed: int = option(0, "Of every stage that names none.", least=0, most=MOST_SEED)
    prompt_set: str = option("builtin", "official, builtin or nano.")
    held_out: str | None = option(None, "A file of prompts that no stage may train on, or nano.")
    threads: int | None = option(None, "CPU threads of torch.", least=1, most=4096)


HEAD = (*(field.name for field in fields(RecipeHead)), "engine")
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
SAMPLED = ("prompts", "responses", "self_play")
"""Stages that run the recipe's engine; training and evaluation sample with transformers."""


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

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Inside, an error names the recipe and this section."""
        try:
            yield
        except AlmostError as error:
            if str(error).startswith(f"recipe {self.name}"):
                raise
            raise InputError(f"recipe {self.name}, {name}: {error}") from None

    def text(self, section: str, key: str) -> str:
        """A key of a section that is the name of a model or file.

        Raises:
            InputError: the section lacks it, or it is no text.
        """
        value = self.value(section, key)
        if not isinstance(value, str) or not value:
            raise InputError(f"recipe {self.name}, {section}: {key} is {value!r}; it must be a text")
        return value


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
        InputError: no such recipe, not YAML, no stage, or an unknown section; a place or a value that fits nothing.
    """
    built_in = {file.stem: file for file in RECIPES.glob("*.yaml")}
    file = built_in.get(name) or Path(name)
    if not file.is_file():
        raise InputError(f"no recipe {name!r}; {did_you_mean(name, built_in)}; a path to a YAML file also works")
    content = read_yaml(file, "give a recipe")
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no mapping; a recipe has sections {', '.join(SECTIONS)}")
    for key, value in content.items():
        if key in SECTIONS and value is None:
            raise InputError(
                f"recipe {file.stem}, {key}: is empty; write {key}: {{}} for its defaults, or leave it out"
            )
    content = {
        key: one_spelling(value, f"{file.stem}, {key}") if isinstance(value, dict) else value
        for key, value in one_spelling(content, file.stem).items()
    }
    content = set_values(put_in_place(content, places or {}, file.stem), values, file.stem)
    content = with_whole_paths(content, file.stem)
    for key, value in content.items():
        if key not in HEAD + SECTIONS:
            near = did_you_mean(str(key), HEAD + SECTIONS, 20)
            raise InputError(f"recipe {file.stem}: unknown section {key!r}; {near}")
        if key in (*SECTIONS, "engine") and not isinstance(value, dict):
            raise InputError(f"recipe {file.stem}, {key}: is {value!r}; it must be a mapping of settings")
    sections = {key: content[key] for key in SECTIONS if key in content}
    if not sections:
        raise InputError(f"recipe {file.stem} has no stage; name one of {', '.join(SECTIONS)}")
    single = {key: value for key, value in content.items() if key in HEAD and key != "engine"}
    if seed is not None:
        single["seed"] = seed
    head = settings_from(RecipeHead, single, f"recipe {file.stem}")
    return Recipe(
        name=file.stem,
        description=head.description,
        seed=head.seed,
        prompt_set=head.prompt_set,
        engine=content.get("engine") or {},
        threads=head.threads,
        held_out=head.held_out,
        sections=sections,
    )


def one_spelling(content: Mapping[Any, Any], name: str) -> dict[Any, Any]:
    """A mapping of a recipe with `_` for each `-` in its keys: sections and settings may have either.

    Raises:
        InputError: one name stands there in both spellings.
    """
    spelled: dict[Any, Any] = {}
    for key, value in content.items():
        plain = key.replace("-", "_") if isinstance(key, str) else key
        if plain in spelled:
            raise InputError(f"recipe {name}: {plain} stands there twice, with - and with _; keep one")
        spelled[plain] = value
    return spelled


_PATHS = frozenset("model assistant_model user_model vanilla as_is_reward_model held_out prompts comparisons".split())
"""Settings that name a model or a file; of sections of these names, their settings."""


def with_whole_paths(content: Any, name: str) -> Any:
    """A recipe's content with the home folder for a `~` at the beginning of a path, as a shell writes it.

    Raises:
        InputError: a path begins with the name of a variable, which no shell has replaced.
    """
    if isinstance(content, list):
        return [with_whole_paths(item, name) for item in content]
    if not isinstance(content, dict):
        return content
    whole: dict[Any, Any] = {}
    for key, value in content.items():
        if key in _PATHS and isinstance(value, str):
            if value.startswith("$"):
                raise InputError(
                    f"recipe {name}: {key} is {value!r}, and variables are not replaced here; write the path, or give "
                    f"it with --place {value!r}=PATH"
                )
            whole[key] = os.path.expanduser(value)
        else:
            whole[key] = with_whole_paths(value, f"{name}, {key}")
    return whole


def set_values(content: Mapping[str, Any], values: Sequence[str], name: str) -> dict[str, Any]:
    """A recipe's content with other settings: `comparisons.length_rule=false`, `seed=1`; `dpo=null` leaves one out.

    What stands behind the `=` is YAML. Whether a setting exists is seen when the section is read.

    Raises:
        InputError: not of this form, or a section that no recipe has.
    """
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    for item in values:
        path, equals, text = item.partition("=")
        section, _, key = path.strip().replace("-", "_").partition(".")
        if not equals or not section:
            raise InputError(f"{item!r} sets nothing; write SECTION.SETTING=VALUE, as comparisons.length_rule=false")
        if section not in HEAD + SECTIONS:
            raise InputError(f"recipe {name}: unknown section {section!r}; {did_you_mean(section, HEAD + SECTIONS)}")
        value = yaml_value(text, f"{item!r}: the value")
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
