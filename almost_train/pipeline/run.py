"""Runs a recipe: every stage from prompts to the aligned policy, each in its own folder under one output folder.

All sections are checked before the first stage begins. A stage that is done, with the same settings and inputs (by
content), is skipped. One whose settings or inputs have changed is made anew, and what it had made is moved to `old/`,
never deleted; with more steps RLSF goes on from what it had. The order is the paper's (arXiv 2305.13735, section 2):
prompts, responses, comparisons, reward model, self-play, SFT, RLSF; then an evaluation.

Under `accelerate launch` all processes run a recipe: they train together, and what is not training the main one does
alone, as if it were the only one, while the others wait for it as long as it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from almost_eval.errors import InputError, did_you_mean
from almost_eval.models.loading import release_memory
from almost_eval.progress import Progress
from almost_eval.types import JSONObject
from almost_train.common.processes import alone, from_main, join_processes, main_alone, world_size
from almost_train.common.stage import StageChanged
from almost_train.pipeline.plan import Step, plan
from almost_train.pipeline.recipe import Recipe

ALONE = ("prompts", "responses", "votes", "comparisons", "self_play", "evaluation")
"""Stages that the main process does alone: they sample and score."""


@dataclass(slots=True)
class StageReport:
    """What became of one stage: a row of the stage table."""

    name: str
    state: str
    """`made`, `kept` (it was done), `gone on` (with more steps) or `made anew` (with what had changed)."""
    seconds: float
    """Of this run."""
    result: JSONObject
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
        if world_size() > 1:
            join_processes(self._device())
        steps = self._steps(until)
        with _threads(self.recipe.threads):
            for name, step in steps.items():
                self.reports.append(self._run(name, step))
        return self.reports

    def states(self, until: str | None = None) -> dict[str, str]:
        """Stage -> `done`, `begun` or `to do`, in order, up to and with `until`; the recipe has been checked then."""
        states = {}
        for name in self._steps(until):
            begun = "begun" if (self.folder / name / "stage.json").exists() else "to do"
            states[name] = "done" if (self.folder / name / "result.json").exists() else begun
        return states

    def _steps(self, until: str | None) -> dict[str, Step]:
        for place in (self.folder, *self.folder.parents):
            if place.exists() and not place.is_dir():
                raise InputError(f"{place} is a file; --output names the folder of a recipe's stages")
        steps = plan(self.recipe, self.folder, self.data_root, self.progress)
        if until is None:
            return steps
        if until not in steps:
            raise InputError(f"recipe {self.recipe.name} has no stage {until!r}; {did_you_mean(until, steps)}")
        names = list(steps)
        return {name: steps[name] for name in names[: names.index(until) + 1]}

    def _device(self) -> str:
        """Where the recipe trains: one connection between the processes serves all its stages.

        Raises:
            InputError: its stages name several devices.
        """
        trained = {name: section for name, section in self.recipe.sections.items() if name not in ALONE}
        devices = {str(section.get("device", "auto")): name for name, section in trained.items()}
        if len(devices) > 1:
            named = ", ".join(f"{name}: {device}" for device, name in devices.items())
            raise InputError(
                f"recipe {self.recipe.name}: its stages train on several devices ({named}), which {world_size()} "
                "processes cannot; name the same in all of them"
            )
        return next(iter(devices), "auto")

    def _run(self, name: str, step: Callable[[], JSONObject]) -> StageReport:
        self.progress.note(f"{name} ...")
        result_file = self.folder / name / "result.json"
        before = from_main(result_file.read_bytes() if result_file.exists() else None)
        began = time.monotonic()
        try:
            result, note = self._done(name, step), ""
        except StageChanged as change:
            main_alone(lambda: self._set_aside(name))
            note, before = change.change, None
            result = self._done(name, step)
        if before is None:
            state = "made anew" if note else "made"
        else:
            state = "kept" if from_main(result_file.read_bytes()) == before else "gone on"
        release_memory()  # the next stage needs it
        return StageReport(name, state, time.monotonic() - began, result, note)

    def _done(self, name: str, step: Callable[[], JSONObject]) -> JSONObject:
        """The stage's result, in every process."""
        if name not in ALONE or world_size() == 1:
            return step()

        def work() -> JSONObject:
            with alone():
                return step()

        return main_alone(work)

    def _set_aside(self, name: str) -> None:
        old = self.folder / "old"
        old.mkdir(exist_ok=True)
        number = 1 + sum(1 for _ in old.glob(f"{name}-*"))
        (self.folder / name).rename(old / f"{name}-{number}")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Runs the block with torch on so many CPU threads; None is torch's own choice."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(count or own)
    try:
        yield
    finally:
        torch.set_num_threads(own)
