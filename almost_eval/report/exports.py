"""The same numbers as tables for other documents: Markdown, CSV, LaTeX, and the `model-index` block of a model card.

Only what was measured is exported. Published figures stand in the page only.
"""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING

from almost_eval.errors import InputError
from almost_eval.report.matrix import Cell, Matrix
from almost_eval.report.runs import NONE, LoadedRun, RunSet, shown, unit_of
from almost_eval.report.views import MARKS, MINUS
from almost_eval.run.validity import readable
from almost_eval.tasks.facts import HubDataset, Unit
from almost_eval.tasks.registry import stated_by
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

COLUMNS = (
    *("benchmark", "model", "kind", "metric", "value", "stderr", "ci_low", "ci_high", "n", "unscored", "withheld"),
    *("baseline_model", "difference", "difference_low", "difference_high", "p", "p_holm", "folder"),
)
"""Of the CSV; shares are shares of 1."""


def to_csv(run_set: RunSet, matrix: Matrix | None) -> str:
    """One line for every metric of every run, and for every trivial baseline; RFC 4180."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    cells = {cell.run: cell for cell in matrix.cells.values()} if matrix else {}
    for benchmark in run_set.benchmarks:
        for run in benchmark.runs:
            common = {"benchmark": benchmark.label, "model": run.label, "folder": str(run.folder)}
            for name, metric in run.metrics.items():
                delta = _delta_columns(cells.get(run)) if name == run.headline else {}
                writer.writerow(common | {"kind": "metric", "metric": name} | _columns(metric) | delta)
            for name, metric in run.results["baselines"].items():
                writer.writerow(common | {"kind": "trivial baseline", "metric": name} | _columns(metric))
    return out.getvalue()


def _columns(metric: JSONObject) -> JSONObject:
    """A metric's; csv writes None as an empty field."""
    low, high = metric["ci95"] or (None, None)
    columns = {key: metric.get(key) for key in ("value", "stderr", "n", "unscored", "withheld")}
    return columns | {"ci_low": low, "ci_high": high}


def _delta_columns(cell: Cell | None) -> JSONObject:
    if cell is None or cell.delta is None:
        return {}
    metric = cell.delta.metric
    low, high = metric.ci95 or (None, None)
    return {
        "baseline_model": cell.delta.baseline.label,
        "difference": metric.difference,
        "difference_low": low,
        "difference_high": high,
        "p": metric.p_value,
        "p_holm": cell.delta.p_holm,
    }


def to_markdown(run_set: RunSet, matrix: Matrix | None) -> str:
    """One table: benchmarks with their intervals, or models by benchmarks with marks."""
    header, rows, notes = _table(run_set, matrix)
    rule = ["---", *["---:"] * (len(header) - 1)]
    first, *rest = [[_markdown(cell) for cell in line] for line in (header, *rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (first, rule, *rest))
    return table + "\n\n" + "\n".join(_markdown(note) for note in notes) + "\n"


def _markdown(text: str) -> str:
    """A cell: no markup, no new column, no new line."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


def to_latex(run_set: RunSet, matrix: Matrix | None) -> str:
    """A `tabular` for booktabs."""
    header, rows, notes = _table(run_set, matrix)
    body = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
    lines = [
        "% needs \\usepackage{booktabs,amssymb}",
        r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}",
        r"\toprule",
        " & ".join(map(_latex, header)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *("% " + " ".join(note.split()) for note in notes),
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MINUS: "$-$",
    "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$",
    "≈": r"$\approx$",
    "·": r"$\cdot$",
    "[": "{[}",  # after \\ a bracket would be a length
    **{sign: "\\" + sign for sign in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _table(run_set: RunSet, matrix: Matrix | None) -> tuple[list[str], list[list[str]], list[str]]:
    """(header, rows, notes) of a table for people."""
    if matrix is None:
        several = len(run_set.models) > 1  # which have no benchmark in common
        header = ["benchmark", *(["model"] if several else []), "metric", "score", "95 % interval", "n", "unscored"]
        rows = [
            [benchmark.label, *([run.label] if several else []), *_run_row(run, name)]
            for benchmark in run_set.benchmarks
            for run in benchmark.runs
            for name in _main(run)
        ]
        of = "" if several else f"Model: {run_set.models[0]}. "
        return header, rows, [f"{of}Shares in percent.", *_withheld(run_set)]
    header = ["model", *(benchmark.label for benchmark in matrix.benchmarks)]
    rows = []
    for model in matrix.models:
        cells = [matrix.cell(model, place) for place in range(len(matrix.benchmarks))]
        rows.append([model, *(_cell(cell) if cell else NONE for cell in cells)])
    deltas = matrix.deltas
    notes = ["Shares in percent, with 95 % intervals."]
    if deltas:
        family = sum(delta.p_holm is not None for delta in deltas)
        notes.append(
            f"Against {matrix.baseline}, paired: {MARKS['better'][0]} better, {MARKS['worse'][0]} worse, "
            f"{MARKS['same'][0]} not distinguishable at 5 % over all {family} comparisons (Holm)."
        )
    return header, rows, notes + _withheld(run_set)


def _main(run: LoadedRun) -> list[str]:
    """The metrics of a table, as the task names them."""
    return stated_by(run.task).main_metrics(list(run.metrics))


def _interval(metric: JSONObject, unit: Unit) -> str:
    if not metric["ci95"]:
        return NONE
    low, high = (shown(bound, unit) for bound in metric["ci95"])
    return f"[{low}, {high}]"


def _run_row(run: LoadedRun, name: str) -> list[str]:
    metric, unit = run.metrics[name], unit_of(run.task, name)
    value = "withheld" if metric.get("withheld") else shown(metric["value"], unit)
    return [readable(name), value, _interval(metric, unit), str(metric["n"]), str(metric["unscored"])]


def _cell(cell: Cell) -> str:
    if cell.run.withheld:
        return "withheld"
    unit = unit_of(cell.run.task, cell.run.headline)
    parts = [shown(cell.metric["value"], unit)]
    if cell.metric["ci95"]:
        parts.append(_interval(cell.metric, unit))
    return " ".join(parts + ([MARKS[cell.delta.mark][0]] if cell.delta else []))


def _withheld(run_set: RunSet) -> list[str]:
    return [f"Withheld: {run.label}, {run.task}: {run.withheld}." for run in run_set.runs if run.withheld]


def to_model_index(run_set: RunSet) -> str:
    """The YAML block between `---` lines that Hugging Face model cards carry; shares are shares of 1.

    Raises:
        InputError: runs of several models, as a card is about one; nothing that could be exported.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index
    from huggingface_hub.utils import yaml_dump

    if len(run_set.models) > 1:
        raise InputError(
            f"--model-index: a model card is about one model, and these are runs of {', '.join(run_set.models)}; give "
            "the runs of one"
        )
    results = [result for run in run_set.runs for result in _eval_results(run)]
    if not results:
        raise InputError("--model-index: no headline stands, so there is nothing to say; see the validity checks")
    index = eval_results_to_model_index(run_set.models[0], results)
    return f"---\n{yaml_dump({'model-index': index})}---\n"


def _dataset(run: LoadedRun) -> tuple[str, str, str | None]:
    """Id, title and split of the data set, for a model card."""
    match stated_by(run.task).dataset:
        case HubDataset(id, title, split):
            return id, title, split
        case None if run.judged:
            return run.task, f"{run.title} questions", None
        case _:
            return run.task, str(run.results["protocol"]), None


def _eval_results(run: LoadedRun) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    kind = "text-classification" if run.spec["requires"] == "reward" else "text-generation"
    data, title, split = _dataset(run)
    if run.spec["data"]["source"] == "nano":  # no data set of the hub
        data, title = f"nano-{run.task}", f"{title}, built-in nano data"
    arguments = {"protocol": str(run.results["protocol"])}
    if "shots" in run.spec["settings"]:
        arguments["num_few_shot"] = run.spec["settings"]["shots"]
    return [
        EvalResult(
            task_type=kind,
            task_name=f"{title} ({run.results['protocol']})",
            dataset_type=data,
            dataset_name=title,
            dataset_split=split,
            dataset_args=arguments,
            metric_type="accuracy" if name.startswith("accuracy") else name,
            metric_name=readable(name),
            metric_value=round(float(run.metrics[name]["value"]), 6),
        )
        for name in _main(run)
        # Withheld, or nothing was scored; and counts are no metrics of a model.
        if run.metrics[name]["value"] is not None and unit_of(run.task, name) != "count"
    ]
