"""Every benchmark on one model: run one after the other as planned, each in a run folder of its own.

A task that is refused or fails leaves the others alone, and its reason is a part of the result.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.errors import AlmostError, RunError
from almost_eval.files import write_json
from almost_eval.progress import Progress
from almost_eval.suite.plan import Planned


@dataclass(frozen=True, slots=True)
class Outcome:
    """A task after it ran."""

    name: str
    folder: Path
    results: Mapping[str, Any] | None = None
    """Content of `results.json`."""
    failed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"folder": str(self.folder), "failed": self.failed, "results": self.results}


def execute(
    planned: Sequence[Planned],
    progress: Progress,
    begin: Callable[[Planned], None] = lambda _: None,
    finish: Callable[[Path, Mapping[str, Any]], None] = lambda *_: None,
) -> Iterator[Outcome]:
    """Run the tasks in turn; each outcome comes as it is known. What has run lets go of its model.

    `begin` is called before a task, `finish` with the folder and results of one that is done.
    """
    for one in planned:
        if one.run is None:
            yield Outcome(one.name, one.folder, failed=one.refused)
            continue
        begin(one)
        try:
            results, _ = one.run.execute(one.folder, progress, started=time.perf_counter())
            finish(one.folder, results)
            yield Outcome(one.name, one.folder, results)
        except AlmostError as error:
            yield Outcome(one.name, one.folder, failed=str(error))
        except Exception as error:  # a fault of ours or of a library: the others are still worth their time
            one.folder.mkdir(parents=True, exist_ok=True)
            file = one.folder / "traceback.txt"
            file.write_text(traceback.format_exc(), encoding="utf-8")
            line = next(iter(str(error).splitlines()), "")
            yield Outcome(one.name, one.folder, failed=f"{type(error).__name__}: {line} (see {file})")
        one.run = None


def summary(model: str, folder: Path, outcomes: Sequence[Outcome]) -> tuple[dict[str, Any], int]:
    """Write the page of what is done, `report.html`, and all results, `all.json`.

    Returns:
        The content of `all.json`, and the exit code: 0 all done, 1 a task failed, 3 a headline is withheld.

    Raises:
        RunError: the disk is full, or gone.
    """
    from almost_eval.report.page import write_page

    page, problem = None, None
    finished = [outcome.folder for outcome in outcomes if outcome.results is not None]
    if finished:
        try:
            page = str(write_page(finished, folder / "report.html").file)
        except AlmostError as error:
            problem = str(error)
    code = 0
    if problem or any(outcome.failed for outcome in outcomes):
        code = 1
    elif any(outcome.results and not outcome.results["validity"]["passed"] for outcome in outcomes):
        code = 3
    whole = {
        "model": model,
        "exit_code": code,
        "report": page,
        "report_failed": problem,
        "tasks": {outcome.name: outcome.to_dict() for outcome in outcomes},
    }
    if finished:
        try:
            write_json(folder / "all.json", whole)
        except OSError as error:
            raise RunError(f"cannot write {folder / 'all.json'} ({error.strerror}); the runs beside it stand") from None
    return whole, code
