"""Runs a recipe: every stage from prompts to the aligned policy, each in its own folder under one output folder.

A recipe is one YAML file with a section for each stage. All sections are checked before the first stage begins. A
stage that is done, with the same settings and inputs (by content), is skipped; one whose settings or inputs have
changed is made anew, and what it had made is moved to `old/`, never deleted. The order is the paper's (arXiv
2305.13735, section 2): prompts, responses, comparisons, reward model, self-play, SFT, RLSF; then an evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from almost_eval.errors import InputError, did_you_mean
from almost_eval.progress import Progress
from almost_train.common.stage import StageChanged

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
    "evaluation",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as it was read; sections are still plain mappings."""

    name: str
    description: str
    seed: int
    prompt_set: str
    engine: Mapping[str, Any]
    threads: int | None
    """CPU threads of torch, or None for its own choice. Models this side of a million weights are faster on one."""
    held_out: str | None
    """A file of prompts that no stage may train on, or `nano`: all that the nano world's evaluation may ask."""
    sections: Mapping[str, Mapping[str, Any]]

    def settings(self, section: str, cls: Any, *drop: str, **fixed: Any) -> Any:
        """The settings of a section, the recipe's seed where it names none.

        Args:
            section: its name.
            cls: the settings' dataclass.
            drop: keys of the section that are no settings.
            fixed: values that the section need not give.
        """
        from almost_train.common.config import settings_from

        given = {key: value for key, value in self.sections[section].items() if key not in drop}
        if "seed" in cls.__dataclass_fields__:
            given = {"seed": self.seed} | given
        given = fixed | given
        return settings_from(cls, given, f"recipe {self.name}, {section}")

    def value(self, section: str, key: str) -> Any:
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
    import yaml

    built_in = {file.stem: file for file in RECIPES.glob("*.yaml")}
    file = built_in.get(name) or Path(name)
    if not file.is_file():
        raise InputError(f"no recipe {name!r}; {did_you_mean(name, built_in)}; a path to a YAML file also works")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise InputError(f"{file} holds no mapping; a recipe has sections {', '.join(SECTIONS)}")
    for key, value in given.items():
        if key not in HEAD + SECTIONS:
            raise InputError(f"recipe {file.stem}: unknown section {key!r}; {did_you_mean(key, HEAD + SECTIONS, 20)}")
        if key in SECTIONS and not isinstance(value, dict):
            raise InputError(f"recipe {file.stem}, {key}: is {value!r}; it must be a mapping of settings")
    threads = given.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"recipe {file.stem}: threads is {threads!r}; it must be a whole number of at least 1")
    return Recipe(
        name=file.stem,
        description=str(given.get("description", "")),
        seed=int(given.get("seed", 0)) if seed is None else seed,
        prompt_set=str(given.get("prompt_set", "builtin")),
        engine=given.get("engine") or {},
        threads=given.get("threads"),
        held_out=given.get("held_out"),
        sections={key: given[key] for key in SECTIONS if key in given},
    )


@dataclass(slots=True)
class StageReport:
    """One row of the stage table."""

    name: str
    state: str
    """`made`, `kept` (it was done) or `made anew` (with what had changed)."""
    seconds: float
    """Of this run."""
    result: dict[str, Any]
    note: str = ""


@dataclass(slots=True)
class Pipeline:
    """A recipe in a folder."""

    recipe: Recipe
    folder: Path
    data_root: str | None = None
    """A folder laid out like the hub, for official prompt sets."""
    progress: Progress = field(default_factory=Progress)
    reports: list[StageReport] = field(default_factory=list)

    def run(self, until: str | None = None) -> list[StageReport]:
        """Run every stage of the recipe in order, up to and with `until`.

        Raises:
            InputError: a recipe that cannot work; before any stage begins.
            RunError: a stage failed; what was done is kept.
        """
        from almost_train.pipeline.plan import plan

        steps = plan(self.recipe, self.folder, self.data_root, self.progress)
        if until is not None and until not in steps:
            raise InputError(f"recipe {self.recipe.name} has no stage {until!r}; {did_you_mean(until, steps)}")
        with _threads(self.recipe.threads):
            for name, step in steps.items():
                self.reports.append(self._run(name, step))
                if name == until:
                    break
        return self.reports

    def states(self) -> dict[str, str]:
        """Stage -> `done`, `begun` or `to do`, in order; the recipe has been checked then."""
        from almost_train.pipeline.plan import plan

        found = {}
        for name in plan(self.recipe, self.folder, self.data_root, self.progress):
            begun = "begun" if (self.folder / name / "stage.json").exists() else "to do"
            found[name] = "done" if (self.folder / name / "result.json").exists() else begun
        return found

    def _run(self, name: str, step: Callable[[], dict[str, Any]]) -> StageReport:
        self.progress.note(f"{name} ...")
        was_done = (self.folder / name / "result.json").exists()
        began = time.monotonic()
        try:
            result, note = step(), ""
        except StageChanged as change:
            self._set_aside(name)
            note, was_done = change.change, False
            result = step()
        state = "kept" if was_done else ("made anew" if note else "made")
        return StageReport(name, state, time.monotonic() - began, result, note)

    def _set_aside(self, name: str) -> None:
        old = self.folder / "old"
        old.mkdir(exist_ok=True)
        number = 1 + sum(1 for _ in old.glob(f"{name}-*"))
        (self.folder / name).rename(old / f"{name}-{number}")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch on so many CPU threads inside."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(count or own)
    try:
        yield
    finally:
        torch.set_num_threads(own)
