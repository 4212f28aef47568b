"""Finished runs as a report reads them: opened, labelled, and grouped into benchmarks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from almost_eval.compare.differences import measure_of, protocol_parts
from almost_eval.errors import InputError
from almost_eval.files import read_json
from almost_eval.judge.names import STYLE_STRENGTH, VOTES_FILE
from almost_eval.run.prompts import SamplePrompts, StoredPrompts
from almost_eval.run.shards import refuse_shard
from almost_eval.run.store import read_results, read_samples, read_spec
from almost_eval.tasks.facts import Unit
from almost_eval.tasks.registry import TASKS, stated_by
from almost_eval.types import JSONObject, SampleRecord

SHOWN_NAMES = 3
"""Names that a label lists, of lm-eval tasks or of metrics."""
NONE = "-"
"""Shown where there is no value."""
JUDGED_COUNTS = ("wins", "ties", "losses", "unparsed")
JUDGED_NUMBERS = ("total_score/", "strength/", STYLE_STRENGTH, "score")
"""Beginnings of the names of a judged run's metrics that are in a unit of their own."""


def unit_of(task: str, metric: str) -> Unit:
    """How a metric reads: as its task states. A judged run has no task, and its metrics go by their names."""
    if metric.startswith(JUDGED_NUMBERS) and task not in TASKS:
        return "number"
    unit = stated_by(task).metric_unit(metric)
    return "count" if unit == "share" and metric in JUDGED_COUNTS else unit


def shown(value: float | None, unit: Unit) -> str:
    """A value as text."""
    if value is None:
        return NONE
    if unit == "share":
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if unit == "count" else f"{value:.4g}"


@dataclass(slots=True, eq=False)
class LoadedRun:
    """A finished run folder, read."""

    folder: Path
    spec: JSONObject
    results: JSONObject
    records: list[SampleRecord]
    prompts: Mapping[str, SamplePrompts]
    """By sample id; empty where the folder has no `prompts.jsonl`."""
    votes: JSONObject | None = None
    """What people's votes say of a judged run, where it was kept."""
    label: str = ""
    """The model's name, made unique among the runs of a report."""
    series: int = 0
    """Place of the model among those of a report; gives its colour."""
    shown_metric: str = ""
    """The headline of its benchmark, where a run that lists the same metrics in another order stands before it."""

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.results["task"])

    @property
    def judged(self) -> bool:
        """Whether a judge compared answers of systems here. `judge check` has no systems."""
        return self.spec.get("requires") == "judge" and bool(self.spec["settings"].get("systems"))

    @property
    def title(self) -> str:
        """Of the task, for people."""
        if self.judged:
            return str(self.spec["settings"].get("questions") or self.task.capitalize())
        return stated_by(self.task).title or self.task

    @property
    def headline(self) -> str:
        """Name of the headline metric."""
        return self.shown_metric or str(self.results["headline"])

    @property
    def metrics(self) -> Mapping[str, JSONObject]:
        """Those of `results.json`."""
        metrics: dict[str, JSONObject] = self.results["metrics"]
        return metrics

    @property
    def withheld(self) -> str | None:
        """Why the headline is withheld, or None."""
        if self.results["validity"]["passed"]:
            return None
        return str(self.results["validity"]["reason"] or "no samples")

    @property
    def model(self) -> tuple[str, str | None]:
        """Name and weight digest of what was measured; of two judged systems, the model and not its baseline."""
        system = (self.spec["settings"].get("systems") or {}).get("model")
        name = system["name"] if system else self.spec.get("model_name") or self.results["model"]
        return str(name), self.spec.get("weight_digest")

    @property
    def baseline_system(self) -> str | None:
        """The system that a judged model was compared with."""
        baseline = (self.spec["settings"].get("systems") or {}).get("baseline")
        return str(baseline["name"]) if baseline else None

    @property
    def key(self) -> tuple[object, ...]:
        """What two runs must share to stand in one column: the same questions, prompted and scored the same way."""
        prompts = self.spec.get("prompt_set") or {}
        return (
            self.task,
            protocol_parts(self.task, str(self.results["protocol"])),
            self.baseline_system,
            self.spec["settings"].get("judging"),
            self.spec["data"]["fingerprint"],
            prompts.get("digest"),
            json.dumps(measure_of(self.spec), sort_keys=True),
        )


@dataclass(slots=True, eq=False)
class Benchmark:
    """The runs of one benchmark, each of another model."""

    label: str
    runs: list[LoadedRun]

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.runs[0].task

    @property
    def headline(self) -> str:
        """Name of the headline metric."""
        return self.runs[0].headline

    @property
    def unit(self) -> Unit:
        """Of the headline."""
        return unit_of(self.task, self.headline)


@dataclass(slots=True, eq=False)
class RunSet:
    """The runs of a report, with their models and benchmarks."""

    runs: list[LoadedRun]
    models: list[str]
    """Labels, in the order of the runs."""
    benchmarks: list[Benchmark]
    unfinished: list[str] = field(default_factory=list)
    """Run folders without results yet, inside a folder of run folders."""

    @property
    def comparable(self) -> bool:
        """Whether any two models have a run of the same benchmark."""
        return any(len(benchmark.runs) > 1 for benchmark in self.benchmarks)


def load_runs(folders: Sequence[Path], *, prompts: bool = True) -> RunSet:
    """Open run folders, and folders of run folders, in the order of the report; with their prompts if wanted.

    Raises:
        InputError: the same folder twice.
        StoreError: a folder that holds no finished run.
    """
    finished, unfinished = [], []
    for folder in folders:
        refuse_shard(folder)
        inside = _inside(folder)
        finished += [f for f in inside if (f / "results.json").exists()] if inside else [folder]
        unfinished += [str(f) for f in inside if not (f / "results.json").exists()]
    twice = [name for name, count in Counter(folder.resolve() for folder in finished).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice; name each run once")
    runs = [_open(folder, prompts=prompts) for folder in finished]
    _label_models(runs)
    return RunSet(runs, list(dict.fromkeys(run.label for run in runs)), _benchmarks(runs), unfinished)


def _inside(folder: Path) -> list[Path]:
    """Run folders inside a folder that is not itself a run folder."""
    if (folder / "spec.json").exists() or (folder / "results.json").exists() or not folder.is_dir():
        return []
    return sorted(spec.parent for spec in folder.glob("*/spec.json") if (spec.parent / "samples.jsonl").exists())


def _open(folder: Path, *, prompts: bool) -> LoadedRun:
    results, spec = read_results(folder), read_spec(folder)
    votes = read_json(folder / VOTES_FILE) if (folder / VOTES_FILE).is_file() else None
    return LoadedRun(folder, spec, results, list(read_samples(folder)), StoredPrompts(folder) if prompts else {}, votes)


def _label_models(runs: Sequence[LoadedRun]) -> None:
    """A label for each model: its name, with whatever tells it from another of that name."""
    for run in runs:
        run.label = run.model[0]
    names = Counter(name for name, _ in {run.model for run in runs})
    for run in runs:
        name, digest = run.model
        if names[name] > 1:
            run.label = f"{name} ({str(digest)[:8] if digest else 'answers'})"
    taken = Counter((run.label, run.key) for run in runs)
    for run in runs:
        if taken[run.label, run.key] > 1:  # one model, measured twice
            run.label = f"{run.label} ({run.folder.name})"
    order = {label: place for place, label in enumerate(dict.fromkeys(run.label for run in runs))}
    for run in runs:
        run.series = order[run.label]


def _benchmarks(runs: Sequence[LoadedRun]) -> list[Benchmark]:
    by_key: dict[tuple[object, ...], list[LoadedRun]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    for members in by_key.values():
        for run in members:
            run.shown_metric = members[0].headline if members[0].headline in run.metrics else ""
    labels = [_label(members[0]) for members in by_key.values()]
    for tell_apart in (_protocol, _data):
        count = Counter(labels)
        labels = [
            f"{label} · {tell_apart(members[0])}" if count[label] > 1 else label
            for label, members in zip(labels, by_key.values(), strict=True)
        ]
    return [Benchmark(label, members) for label, members in zip(labels, by_key.values(), strict=True)]


def _label(run: LoadedRun) -> str:
    if run.judged:
        title = f"{run.title} vs {run.baseline_system}" if run.baseline_system else run.title
        parts = [title, f"judge {_protocol(run)}"]
    else:
        parts = [run.title, _protocol(run)] if stated_by(run.task).label_shows_protocol else [run.title]
    if run.spec["data"]["source"] == "nano":
        parts.append("nano data")
    if limit := run.spec["settings"].get("limit"):
        parts.append(f"limit {limit}")
    return " · ".join(parts)


def _protocol(run: LoadedRun) -> str:
    names = str(run.results["protocol"]).split("+")
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _data(run: LoadedRun) -> str:
    prompts = (run.spec.get("prompt_set") or {}).get("name")
    return f"data {str(run.spec['data']['fingerprint'])[:6]}" + (f", {prompts} prompts" if prompts else "")
