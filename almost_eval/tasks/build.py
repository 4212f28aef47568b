"""From names to a task: for the command line, which chooses, and for `verify`, which reads a spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from almost_eval.data.sources import DataSource
from almost_eval.errors import InputError, did_you_mean
from almost_eval.tasks.base import Prompting, Task

TASKS = ("hhh", "truthfulqa", "mmlu", "harness")


def build_task(
    name: str, protocol: str, settings: Mapping[str, Any], data: DataSource, prompting: Prompting | None = None
) -> Task:
    """The task that a spec describes; `settings` is what `Task.settings` gave.

    Raises:
        InputError: an unknown task, or settings it does not take.
    """
    limit = settings.get("limit")
    if name == "hhh":
        from almost_eval.tasks.hhh import HHH

        return HHH(protocol, data, prompting, normalise=bool(settings.get("normalise")), limit=limit)
    if name == "truthfulqa":
        from almost_eval.tasks.truthfulqa import TruthfulQA

        return TruthfulQA(settings["metrics"], data, prompting, limit=limit)
    if name == "mmlu":
        from almost_eval.tasks.mmlu import MMLU

        return MMLU(settings["subjects"], settings["shots"], data, prompting, limit=limit)
    if name == "harness":
        from almost_eval.tasks.harness import Harness

        return Harness(settings["tasks"], data, prompting, shots=settings["shots"], limit=limit)
    raise InputError(f"unknown task {name!r}; {did_you_mean(name, TASKS)}")
