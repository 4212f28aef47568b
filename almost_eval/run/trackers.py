"""Figures for the trackers people use (`--log-to`): TensorBoard, Weights & Biases, or one JSON Lines file.

A tracker shows what a run has written down itself, after it was written: the rows of a training stage's `log.jsonl`, or
the metrics of a finished evaluation's `results.json`. So a run that goes on logs no step twice, whatever the tracker:
the jsonl file is written anew from the rows that stand, TensorBoard is told the step from which older points are void,
and W&B takes a run up under the id kept in the folder, from the last step of an orderly end; of steps that a killed
process had sent it keeps the first, and they are equal.

Keys are the packages' own business (`WANDB_API_KEY`): none is read or written here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from almost_eval.errors import InputError, MissingDependencyError, RunError, did_you_mean
from almost_eval.files import LineWriter, read_json, write_json, write_rows
from almost_eval.types import JSONMapping, JSONObject

JSONL = "metrics.jsonl"
"""File of the jsonl tracker in a run's folder: one line a step, `step` and numbers by name."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "jsonl": None}
"""Tracker -> the optional package it needs."""

_WANTED: ContextVar[tuple[str, ...]] = ContextVar("log_to", default=())


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a step; steps come in order."""
        ...

    def close(self) -> None:
        """Everything is handed over."""
        ...


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers named, each once, their packages installed; nothing is imported.

    Raises:
        InputError: an unknown tracker.
        MissingDependencyError: a package that is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise InputError(f"--log-to: unknown tracker {name!r}; {did_you_mean(name, PACKAGES)}")
        package = PACKAGES[name]
        if package and find_spec(package) is None:
            raise MissingDependencyError(
                f"--log-to {name} needs the package {package!r}; install it with: pip install {package}"
            )
    return tuple(dict.fromkeys(names))


@contextmanager
def logging_to(names: Sequence[str]) -> Iterator[None]:
    """Inside, `Trackers` of any folder open these trackers: a pipeline's stages need not hand the names down."""
    token = _WANTED.set(check_trackers(names))
    try:
        yield
    finally:
        _WANTED.reset(token)


class Trackers:
    """The trackers of a run. A context manager.

    Args:
        folder: of the run; the trackers write into it.
        rows: steps that were done before, each with `step`: what a tracker has of later ones is void. A tracker that is
            new to the folder gets them all.
        names: which; those of `logging_to` by default.
        active: False on every process but the first, which alone logs.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[JSONObject] = (),
        *,
        names: Sequence[str] | None = None,
        active: bool = True,
    ) -> None:
        self._folder = folder
        self._rows = rows
        self._names = check_trackers(_WANTED.get() if names is None else names) if active else ()
        self._open: list[Tracker] = []

    def __enter__(self) -> Trackers:
        with ExitStack() as stack:  # one that cannot be opened closes those before it
            for name in self._names:
                tracker = _OPENERS[name](self._folder, self._rows)
                stack.callback(tracker.close)
                self._open.append(tracker)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def log(self, row: JSONObject) -> None:
        """Add a step: `row["step"]`, and whatever of the row is a finite number."""
        step, numbers = _split(row)
        for tracker in self._open:
            tracker.log(step, numbers)


def log_results(folder: Path, results: JSONMapping, names: Sequence[str]) -> None:
    """Log the metrics of a finished evaluation as step 0: `<task>/<protocol>/<metric>`, and its standard error."""
    row: JSONObject = {"step": 0}
    for name, metric in results["metrics"].items():
        at = f"{results['task']}/{results['protocol']}/{name}"
        row |= {at: metric["value"], f"{at} (stderr)": metric["stderr"]}
    with Trackers(folder, names=names) as trackers:
        trackers.log(row)


def _split(row: JSONObject) -> tuple[int, dict[str, float]]:
    numbers = {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
    return int(row["step"]), numbers


# --- the trackers ---


class _JSONLines:
    """`metrics.jsonl`: always what the run's own rows say, and nothing else."""

    def __init__(self, folder: Path, rows: Sequence[JSONObject]) -> None:
        file = folder / JSONL
        self._lines = LineWriter(file, advice="what was done is kept")
        try:
            write_rows(file, ({"step": step, **numbers} for step, numbers in map(_split, rows)))
        except RunError as error:
            raise RunError(f"--log-to jsonl: {error}") from None
        self._lines.__enter__()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a line, and hand it to the kernel."""
        self._lines.append({"step": step, **numbers})

    def close(self) -> None:
        """Close the file."""
        self._lines.__exit__(None, None, None)


class _TensorBoard:
    """Event files in `tensorboard/`, which `tensorboard --logdir` finds below any folder."""

    def __init__(self, folder: Path, rows: Sequence[JSONObject]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined, unused-ignore]

        events = folder / "tensorboard"
        known = events.is_dir() and any(events.iterdir())
        void = rows[-1]["step"] + 1 if rows else 0
        try:
            self._writer = SummaryWriter(log_dir=str(events), purge_step=void if known else None)
        except OSError as error:
            raise RunError(f"--log-to tensorboard: cannot write to {events} ({error.strerror})") from None
        for row in () if known else rows:
            self.log(*_split(row))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a point to the curve of each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is queued."""
        self._writer.close()


class _WandB:
    """A W&B run. Project, mode and key come from the environment, as W&B documents them (`WANDB_PROJECT`, ...)."""

    def __init__(self, folder: Path, rows: Sequence[JSONObject]) -> None:
        import wandb

        self._file = folder / ".wandb.json"
        known = self._file.is_file()
        kept: JSONObject = {"id": os.urandom(6).hex(), "logged": -1}
        if known:
            kept = read_json(self._file, *kept)
        self._id, self._logged = kept["id"], kept["logged"]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "almost",
                name=folder.resolve().name,
                dir=str(folder),
                id=self._id,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),  # stdout is for results
            )
        except Exception as error:  # no key, no network, a bad project: its errors share no base that can be relied on
            why = " ".join(str(error).split())[:200]
            raise RunError(f"--log-to wandb: no run could be opened ({why}); or set WANDB_MODE=offline") from None
        write_json(self._file, kept)
        for row in () if known else rows:
            self.log(*_split(row))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a step, unless it has it."""
        if step > self._logged:
            self._run.log(dict(numbers), step=step)
            self._logged = step

    def close(self) -> None:
        """Send what is queued, and note how far that is."""
        self._run.finish()
        write_json(self._file, {"id": self._id, "logged": self._logged})


_OPENERS: JSONObject = {"tensorboard": _TensorBoard, "wandb": _WandB, "jsonl": _JSONLines}
