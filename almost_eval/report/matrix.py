"""Several runs beside each other: models by benchmarks, each model against the first on the samples both scored.

Every comparison of the table belongs to one family: the p-values of `compare` (paired, clustered) are adjusted after
Holm (1979) over all of them: the chance of even one wrong mark in the table is at most 5 %. A withheld headline is
neither compared nor marked.
"""

from __future__ import annotations

from dataclasses import dataclass

from almost_eval.compare.comparison import ALPHA, HEADLINE, Comparison, MetricComparison, compare_runs
from almost_eval.compare.paired import holm
from almost_eval.errors import InputError, did_you_mean
from almost_eval.report.runs import Benchmark, LoadedRun, RunSet
from almost_eval.types import JSONObject


@dataclass(slots=True, eq=False)
class BaselineDelta:
    """A model against the baseline model on one benchmark."""

    benchmark: Benchmark
    run: LoadedRun
    baseline: LoadedRun
    comparison: Comparison
    metric: MetricComparison
    """Of the headline."""
    p_holm: float | None = None
    """Adjusted over all comparisons of the table; None where there is no p-value."""

    @property
    def mark(self) -> str:
        """`better`, `worse`, `same` (not distinguishable) or `unknown`, at 5 % for the whole table."""
        if self.p_holm is None or self.metric.difference is None:
            return "unknown"
        if self.p_holm >= ALPHA or self.metric.difference == 0:
            return "same"
        return "better" if self.metric.difference > 0 else "worse"


@dataclass(slots=True, eq=False)
class Cell:
    """A model on a benchmark."""

    run: LoadedRun
    metric: JSONObject
    """The headline's entry of `results.json`."""
    delta: BaselineDelta | None
    """None for the baseline model, and where one of the two is withheld."""


@dataclass(slots=True, eq=False)
class Matrix:
    """Models by benchmarks."""

    baseline: str
    models: list[str]
    benchmarks: list[Benchmark]
    cells: dict[tuple[str, int], Cell]
    """(model, place of the benchmark)."""

    def cell(self, model: str, benchmark: int) -> Cell | None:
        """None where the model has no run of it."""
        return self.cells.get((model, benchmark))

    @property
    def deltas(self) -> list[BaselineDelta]:
        """All comparisons, in the order of the table."""
        return [cell.delta for cell in self.cells.values() if cell.delta]


def build_matrix(run_set: RunSet, *, baseline: str | None = None, seed: int = 0) -> Matrix:
    """Compare every model with the baseline model (the first by default) wherever both have a run.

    Raises:
        InputError: `baseline` names no model of the runs; runs of one benchmark that share no sample.
    """
    if baseline is not None and baseline not in run_set.models:
        raise InputError(f"--baseline {baseline}: no such model; {did_you_mean(baseline, run_set.models)}")
    first = baseline or run_set.models[0]
    models = [first, *(model for model in run_set.models if model != first)]
    cells: dict[tuple[str, int], Cell] = {}
    for model in models:
        for place, benchmark in enumerate(run_set.benchmarks):
            of = {run.label: run for run in benchmark.runs}
            if model not in of:
                continue
            run, against = of[model], of.get(first)
            delta = None
            if against is not None and run is not against and not (run.withheld or against.withheld):
                delta = _delta(benchmark, run, against, seed)
            cells[model, place] = Cell(run, run.metrics[run.headline], delta)
    matrix = Matrix(first, models, run_set.benchmarks, cells)
    tested = [(delta, delta.metric.p_value) for delta in matrix.deltas if delta.metric.p_value is not None]
    for (delta, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
        delta.p_holm = adjusted
    return matrix


def _delta(benchmark: Benchmark, run: LoadedRun, against: LoadedRun, seed: int) -> BaselineDelta:
    comparison = compare_runs(against.folder, run.folder, seed=seed)
    by_name = {metric.name: metric for metric in comparison.metrics}
    metric = by_name.get(benchmark.headline) or by_name.get(HEADLINE) or comparison.metrics[0]
    return BaselineDelta(benchmark, run, against, comparison, metric)
