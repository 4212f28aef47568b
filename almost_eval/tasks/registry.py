"""The tasks by name. A new one is its own file and one line here.

The command line imports this file, so the tasks themselves are imported where one is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from almost_eval.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from almost_eval.data.sources import DataSource
    from almost_eval.tasks.base import Prompting, Task
    from almost_eval.tasks.facts import Preset

TASKS: dict[str, str] = {
    "hhh": "almost_eval.tasks.hhh:HHH",
    "truthfulqa": "almost_eval.tasks.truthfulqa:TruthfulQA",
    "mmlu": "almost_eval.tasks.mmlu:MMLU",
    "harness": "almost_eval.tasks.harness:Harness",
}
"""Name -> where its class is."""


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        InputError: an unknown name.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; {did_you_mean(name, TASKS)}")
    module, _, cls = TASKS[name].partition(":")
    task: type[Task] = getattr(importlib.import_module(module), cls)
    return task


def stated_by(name: str) -> type[Task]:
    """What the task of a run folder states of itself; of a task that is not known here, what every task states."""
    from almost_eval.tasks.base import Task

    return task_class(name) if name in TASKS else Task


def task_classes() -> list[type[Task]]:
    """All, in the order of the registry."""
    return [task_class(name) for name in TASKS]


def build_task(
    name: str, protocol: str, settings: Mapping[str, Any], data: DataSource, prompting: Prompting | None = None
) -> Task:
    """The task that a spec describes; see `task_class` and `Task.build`."""
    return task_class(name).build(protocol, settings, data, prompting)


def comparison_presets() -> dict[str, Preset]:
    """Task -> how comparisons between models or engines run it (`tax`, `parity`); without those that have no such."""
    return {cls.name: cls.comparison for cls in task_classes() if cls.comparison is not None}
