"""Two finished run folders, sample by sample: is B better than A, by how much, and on which samples.

Runs are paired on sample ids, which removes the spread between easy and hard samples from the difference (Miller 2024,
arXiv 2411.00640, section on paired analysis). A higher score is taken as the better one. Samples that only one run
has, or that either could not score, are left out and counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from almost_eval.compare.differences import other_measure, setting_differences, shown
from almost_eval.compare.paired import mcnemar_exact, paired_bootstrap
from almost_eval.errors import DataError, InputError
from almost_eval.files import read_json
from almost_eval.run.shards import refuse_shard
from almost_eval.run.store import NEW_RESULTS, NEW_RUN
from almost_eval.stats import is_binary, majority

if TYPE_CHECKING:
    from rich.console import Console

ALPHA = 0.05
HEADLINE = "score"
"""The name of the one metric compared where the lines name no metric that both runs have."""
PANEL_RATE = "win_rate"
"""The metric of a panel of judges, by majority: no line holds it, as each is one judge's."""
MUST_MATCH = ("task", "protocol")
SHOULD_MATCH = {"data_fingerprint": "the data", "prompt_set": "the prompt sets", "template_digest": "the templates"}
KEYS_OF = {
    "data_fingerprint": {"data.fingerprint"},
    "prompt_set": {"prompt_set", "prompt_set.name", "prompt_set.digest"},
    "template_digest": {"template.digest"},
}
"""The same facts in a spec."""
FLIPS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class McNemar:
    """The pairs that tell two runs apart on a right-or-wrong metric."""

    only_a_right: int
    only_b_right: int
    p_value: float
    """Exact, two-sided; it knows nothing of clusters."""


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """One metric over the samples that both runs scored."""

    name: str
    n: int
    """Pairs."""
    n_clusters: int
    unscored: int
    """Shared samples left out because A or B has no value."""
    mean_a: float | None = None
    mean_b: float | None = None
    difference: float | None = None
    """B - A, in the unit of the metric."""
    ci95: tuple[float, float] | None = None
    """Of the difference; bootstrap over clusters."""
    p_bootstrap: float | None = None
    mcnemar: McNemar | None = None
    """Where every value is 0 or 1."""
    p_value: float | None = None
    """The one the verdict rests on: McNemar's where there is one and no two samples share a cluster."""
    verdict: str = "no sample is scored in both runs"


@dataclass(frozen=True, slots=True)
class Flip:
    """A sample that one run has right (above 0.5) and the other wrong."""

    id: str
    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run B against run A."""

    a: str
    """Folder of run A."""
    b: str
    task: Any
    protocol: Any
    shared: int
    """Sample ids in both runs."""
    only_in_a: int
    only_in_b: int
    unscored: int
    """Shared samples whose headline score is missing in A, in B, or in both."""
    metrics: tuple[MetricComparison, ...]
    flipped: tuple[Flip, ...]
    """By the headline score."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: tuples become lists, metrics an object by name."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**plain, "metrics": {metric.pop("name"): metric for metric in plain["metrics"]}}


@dataclass(frozen=True, slots=True)
class _Line:
    """What a comparison needs of one line of `samples.jsonl`."""

    score: float | None
    metrics: Mapping[str, float | None]
    cluster: str
    gold: Any
    judge: str | None
    """Whose line it is, in a panel of judges."""


@dataclass(frozen=True, slots=True)
class _Run:
    folder: Path
    finished: bool
    spec: Mapping[str, Any]
    results: Mapping[str, Any]
    lines: Mapping[str, _Line]

    def fact(self, key: str) -> Any:
        """The first value on record, or None: results, their provenance, then the spec."""
        places = (self.results, self.results.get("provenance") or {}, self.spec)
        return next((place[key] for place in places if place.get(key) is not None), None)


_Pairs = dict[str, tuple[_Line, _Line]]
"""Sample id -> its lines in A and in B."""


def compare_runs(a: Path, b: Path, *, seed: int = 0, n_resamples: int = 10_000) -> Comparison:
    """Pair two run folders of one task and protocol on their sample ids, and judge each metric they share.

    Of protocols that list metrics or tasks (`mc1+mc2`), the order says nothing, and one that both have is enough.
    """
    for folder in (a, b):
        refuse_shard(Path(folder))
    run_a, run_b = _read_run(Path(a)), _read_run(Path(b))
    # What a protocol lists (`mc1+mc2`), in the order of A; one that lists nothing is its only part.
    parts_a, parts_b = (str(run.fact("protocol")).split("+") for run in (run_a, run_b))
    in_both = [part for part in parts_a if part in parts_b]
    for key in MUST_MATCH:
        in_a, in_b = run_a.fact(key), run_b.fact(key)
        if in_a != in_b and not (key == "protocol" and in_both):
            raise InputError(
                f"the runs differ in {key}: {in_a!r} in {a}, {in_b!r} in {b}; compare two runs of the same {key}"
            )
    if problem := other_measure(run_a.spec, run_b.spec):
        raise InputError(
            f"the runs differ in {problem} (A is {a}, B is {b}), so their metric is not the same; compare two runs of "
            "the same metric"
        )
    # Sorted: a resumed run writes its lines in another order, and the same seed must still give the same interval.
    ids = sorted(run_a.lines.keys() & run_b.lines.keys())
    if not ids:
        raise InputError(
            f"the runs share no sample id: {len(run_a.lines)} samples in {a}, {len(run_b.lines)} in {b}; "
            "compare runs over the same data"
        )
    pairs = {id: (run_a.lines[id], run_b.lines[id]) for id in ids}
    of_a, of_b = ({name for line in run.lines.values() for name in line.metrics} for run in (run_a, run_b))
    names = of_a & of_b
    compared = [(name, pairs) for name in sorted(names) or [HEADLINE]]
    if together := _together(pairs):
        compared.insert(0, (PANEL_RATE, together))
    metrics = [
        # A generator per metric: its interval does not depend on which other metrics the runs happen to have.
        _compare_metric(name, of, n_resamples=n_resamples, rng=np.random.default_rng(seed))
        for name, of in compared
    ]
    # A line's score is the first metric that its run lists; the other run may list another first.
    headline = next((part for part in in_both if part in names), HEADLINE)
    values = {id: (_value(x, headline), _value(y, headline)) for id, (x, y) in (together or pairs).items()}
    scored = [(id, x, y) for id, (x, y) in values.items() if x is not None and y is not None]
    return Comparison(
        a=str(a),
        b=str(b),
        task=run_a.fact("task"),
        protocol="+".join(in_both),
        shared=len(ids),
        only_in_a=len(run_a.lines) - len(ids),
        only_in_b=len(run_b.lines) - len(ids),
        unscored=len(ids) - len(scored),
        metrics=tuple(metrics),
        flipped=tuple(Flip(id, x, y) for id, x, y in scored if (x > 0.5) != (y > 0.5)),
        warnings=tuple(_warnings(run_a, run_b, pairs)),
    )


def render(comparison: Comparison, console: Console) -> None:
    """Print a comparison: warnings, what was left out, the table, the verdicts, the flipped samples."""
    from rich.table import Table
    from rich.text import Text

    def say(line: str, style: str = "") -> None:
        console.print(Text(line, style=style))  # Text, not str: an id such as "[b]1" is no markup

    say(f"A  {comparison.a}\nB  {comparison.b}")
    for warning in comparison.warnings:
        say(f"warning: {warning}", "yellow")
    say(
        f"{comparison.shared} samples in both; left out: {comparison.only_in_a} only in A, "
        f"{comparison.only_in_b} only in B, {comparison.unscored} unscored in either"
    )
    table = Table("metric", title=Text(f"{comparison.task}, {comparison.protocol}"))
    for heading in ("n", "unscored", "A", "B", "B - A", "95 % interval", "p", "only A:B right"):
        table.add_column(heading, justify="right")
    for metric in comparison.metrics:
        table.add_row(
            Text(metric.name),
            str(metric.n),
            str(metric.unscored),
            _number(metric.mean_a, ".4f"),
            _number(metric.mean_b, ".4f"),
            _number(metric.difference, "+.4f"),
            f"{metric.ci95[0]:+.4f} to {metric.ci95[1]:+.4f}" if metric.ci95 else "-",
            _number(metric.p_value, ".2g"),
            f"{metric.mcnemar.only_a_right}:{metric.mcnemar.only_b_right}" if metric.mcnemar else "-",
        )
    console.print(table)
    for metric in comparison.metrics:
        say(f"{metric.name}: {metric.verdict}")
    if not comparison.flipped:
        return
    say(f"{len(comparison.flipped)} samples flipped between right and wrong:")
    for flip in comparison.flipped[:FLIPS_SHOWN]:
        say(f"  {flip.id}  A {flip.a:g}  B {flip.b:g}")
    if len(comparison.flipped) > FLIPS_SHOWN:
        say(f"  and {len(comparison.flipped) - FLIPS_SHOWN} more")


def _compare_metric(name: str, pairs: _Pairs, *, n_resamples: int, rng: np.random.Generator) -> MetricComparison:
    a, b, clusters = [], [], []
    unscored = 0
    for line_a, line_b in pairs.values():
        x, y = _value(line_a, name), _value(line_b, name)
        if x is not None and y is not None:
            a.append(x)
            b.append(y)
            clusters.append(line_a.cluster)
        elif _applies(line_a, name) or _applies(line_b, name):
            unscored += 1
    n, n_clusters = len(a), len(set(clusters))
    if n == 0:
        return MetricComparison(name, 0, 0, unscored)
    boot = paired_bootstrap(a, b, clusters, n_resamples=n_resamples, rng=rng)
    mcnemar = None
    if is_binary(np.array([a, b])):
        only_a, only_b = (sum(x > y for x, y in zip(*both, strict=True)) for both in ((a, b), (b, a)))
        mcnemar = McNemar(only_a, only_b, mcnemar_exact(only_a, only_b))
    p_value = mcnemar.p_value if mcnemar and n_clusters == n else boot.p_value
    in_unit = all(0.0 <= score <= 1.0 for score in (*a, *b))
    return MetricComparison(
        name=name,
        n=n,
        n_clusters=n_clusters,
        unscored=unscored,
        mean_a=float(np.mean(a)),
        mean_b=float(np.mean(b)),
        difference=boot.difference,
        ci95=boot.ci95,
        p_bootstrap=boot.p_value,
        mcnemar=mcnemar,
        p_value=p_value,
        verdict=_verdict(boot.difference, boot.ci95, p_value, in_unit=in_unit),
    )


def _together(pairs: _Pairs) -> _Pairs:
    """The pairs that a panel judged, each by the majority of the judges in both runs; none where there is no panel."""
    cases: dict[str, list[tuple[_Line, _Line]]] = {}
    for id, (x, y) in pairs.items():
        if x.judge is not None:
            cases.setdefault(id.removesuffix(f"/{x.judge}"), []).append((x, y))

    def of_all(lines: Sequence[_Line]) -> _Line:
        score = majority([line.score for line in lines])
        return replace(lines[0], score=score, metrics={PANEL_RATE: score}, judge=None)

    return {id: (of_all([x for x, _ in case]), of_all([y for _, y in case])) for id, case in cases.items()}


def _verdict(difference: float, ci95: tuple[float, float] | None, p_value: float | None, *, in_unit: bool) -> str:
    """In plain words; scores in [0, 1] are told in points (1 point = 0.01)."""
    if p_value is None:
        return "cannot be judged: the samples form a single cluster, so there is no spread to measure"
    if p_value >= ALPHA or difference == 0.0 or ci95 is None:
        return "not distinguishable at 95 %"
    better, sign = ("B", 1) if difference > 0 else ("A", -1)
    scale, digits, unit = (100, 1, " points") if in_unit else (1, 3, "")
    by, low, high = (f"{scale * sign * x + 0.0:.{digits}f}" for x in (difference, *ci95[::sign]))
    return f"{better} is better by {by}{unit} (95 % interval {low} to {high})"


def _warnings(a: _Run, b: _Run, pairs: _Pairs) -> list[str]:
    """What makes the two runs less comparable than they look; only what both have on record can be checked."""
    warnings = [f"{run.folder} has no results.json: the run is not finished" for run in (a, b) if not run.finished]
    warnings += [
        f"{run.folder}/spec.json is not there or empty: nothing says how it was run" for run in (a, b) if not run.spec
    ]
    told: set[str] = set()
    for key, what in SHOULD_MATCH.items():
        in_a, in_b = a.fact(key), b.fact(key)
        if in_a is not None and in_b is not None and in_a != in_b:
            warnings.append(f"{what} differ ({key}): {shown(in_a)} in A, {shown(in_b)} in B")
            told |= KEYS_OF[key]
    warnings += [line for line in setting_differences(a.spec, b.spec) if line.partition(": ")[0] not in told]
    if differing := sum(x.gold != y.gold for x, y in pairs.values()):
        warnings.append(f"{differing} shared samples have another right answer in A than in B")
    if differing := sum(x.cluster != y.cluster for x, y in pairs.values()):
        warnings.append(f"{differing} shared samples are in another cluster in A than in B; A's clusters are used")
    return warnings


def _value(line: _Line, name: str) -> float | None:
    return line.metrics.get(name, line.score if name == HEADLINE else None)


def _applies(line: _Line, name: str) -> bool:
    """Whether a missing value means unscored. A line that names other metrics only is of another category instead."""
    return name == HEADLINE or name in line.metrics or not line.metrics


def _read_run(folder: Path) -> _Run:
    samples = folder / "samples.jsonl"
    if not samples.is_file():
        raise InputError(
            f"{folder} is no run folder: expected samples.jsonl, spec.json and results.json in it; "
            "give the folder that a run wrote (its --output)"
        )
    results, spec = folder / "results.json", folder / "spec.json"
    of_spec = read_json(spec, mend=NEW_RUN) if spec.exists() else {}
    of_results = read_json(results, mend=NEW_RESULTS) if results.exists() else {}
    return _Run(folder, results.exists(), of_spec, of_results, _lines(samples))


def _lines(path: Path) -> dict[str, _Line]:
    """By sample id. The last line may be half-written (a killed run): it is skipped if no newline ends it."""
    lines: dict[str, _Line] = {}
    with path.open("rb") as file:  # bytes: half a line may end inside a character
        for number, raw in enumerate(file, start=1):
            try:
                row = json.loads(raw.decode("utf-8"))
            except ValueError as error:
                if not raw.endswith(b"\n"):  # only the last line can lack it
                    break
                raise DataError(f"{path} line {number} is not JSON ({error}); remove or repair it") from error
            try:
                id, line = _parse(row)
                if id in lines:
                    raise ValueError(f"sample {id!r} was on an earlier line already")
            except ValueError as error:
                raise DataError(f"{path} line {number}: {error}; remove or repair it") from error
            lines[id] = line
    return lines


def _parse(row: Any) -> tuple[str, _Line]:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "score" not in row:
        raise ValueError('not a sample record, an object with a string "id" and a "score"')
    metrics, sample = row.get("metrics") or {}, row.get("sample") or {}
    if not isinstance(metrics, dict) or not isinstance(sample, dict):
        raise ValueError('"metrics" and "sample" must be objects')
    return row["id"], _Line(
        score=_score("score", row["score"]),
        metrics={name: _score(name, value) for name, value in metrics.items()},
        cluster=str(sample.get("cluster") or row["id"]),  # on its own unless told otherwise
        gold=sample.get("gold"),
        judge=(sample.get("metadata") or {}).get("judge"),
    )


def _score(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, neither a finite number nor null")
    return float(value)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
