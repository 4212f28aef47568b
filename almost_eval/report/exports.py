"""The same numbers as tables for other documents: Markdown, CSV, LaTeX, and the `model-index` block of a model card.

Only what was measured is exported; published figures are the page's alone.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from almost_eval.errors import InputError
from almost_eval.report.matrix import Cell, Matrix
from almost_eval.report.runs import NONE, LoadedRun, RunSet, readable, shown, unit_of
from almost_eval.report.views import MARKS, MINUS

COLUMNS = (
    "benchmark",
    "model",
    "kind",
    "metric",
    "value",
    "stderr",
    "ci_low",
    "ci_high",
    "n",
    "unscored",
    "withheld",
    "baseline_model",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "folder",
)
"""Of the CSV; shares are shares of 1."""

DATASETS = {
    "hhh": ("HuggingFaceH4/hhh_alignment", "Static HHH", "test"),
    "truthfulqa": ("truthfulqa/truthful_qa", "TruthfulQA (multiple choice)", "validation"),
    "mmlu": ("cais/mmlu", "MMLU", "test"),
    "vicuna": ("vicuna", "Vicuna questions", None),
}
"""Task -> data set (its id on the hub where it has one), name and split, for a model card."""


def to_csv(found: RunSet, matrix: Matrix | None) -> str:
    """One line for every metric of every run, and for every trivial baseline; RFC 4180."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    cells = {cell.run: cell for cell in matrix.cells.values()} if matrix else {}
    for benchmark in found.benchmarks:
        for run in benchmark.runs:
            common = {"benchmark": benchmark.label, "model": run.label, "folder": str(run.folder)}
            for name, metric in run.metrics.items():
                delta = _delta_columns(cells.get(run)) if name == run.headline else {}
                writer.writerow(common | {"kind": "metric", "metric": name} | _columns(metric) | delta)
            for name, metric in run.results["baselines"].items():
                writer.writerow(common | {"kind": "trivial baseline", "metric": name} | _columns(metric))
    return out.getvalue()


def _columns(metric: Mapping[str, Any]) -> dict[str, Any]:
    low, high = metric["ci95"] or ("", "")
    found = {"value": metric["value"], "stderr": metric["stderr"], "ci_low": low, "ci_high": high, "n": metric["n"]}
    found |= {"unscored": metric["unscored"], "withheld": metric.get("withheld", "")}
    return {key: "" if value is None else value for key, value in found.items()}


def _delta_columns(cell: Cell | None) -> dict[str, Any]:
    if cell is None or cell.delta is None:
        return {}
    metric = cell.delta.metric
    low, high = metric.ci95 or ("", "")
    found = {
        "baseline_model": cell.delta.baseline.label,
        "difference": metric.difference,
        "difference_low": low,
        "difference_high": high,
        "p": metric.p_value,
        "p_holm": cell.delta.p_holm,
    }
    return {key: "" if value is None else value for key, value in found.items()}


def to_markdown(found: RunSet, matrix: Matrix | None) -> str:
    """One table: benchmarks with their intervals, or models by benchmarks with marks."""
    header, rows, notes = _table(found, matrix, interval=lambda low, high: f"[{low}, {high}]")
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    first, rule, *rest = [[_markdown(cell) if line is not lines[1] else cell for cell in line] for line in lines]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (first, rule, *rest))
    return table + "\n\n" + "\n".join(_markdown(note) for note in notes) + "\n"


def _markdown(text: str) -> str:
    """A cell: no markup, no new column, no new line."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


def to_latex(found: RunSet, matrix: Matrix | None) -> str:
    """A `tabular` for booktabs."""
    header, rows, notes = _table(found, matrix, interval=lambda low, high: f"[{low}, {high}]")
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


def _table(
    found: RunSet, matrix: Matrix | None, interval: Callable[[str, str], str]
) -> tuple[list[str], list[list[str]], list[str]]:
    """(header, rows, notes) of a table for people."""
    if matrix is None:
        header = ["benchmark", "metric", "score", "95 % interval", "n", "unscored"]
        wanted = [(b.label, run, name) for b in found.benchmarks for run in b.runs for name in _main(run)]
        rows = [_run_row(*row, interval) for row in wanted]
        return header, rows, [f"Model: {found.models[0]}. Shares in percent.", *_withheld(found)]
    header = ["model", *(benchmark.label for benchmark in matrix.benchmarks)]
    rows = []
    for model in matrix.models:
        cells = [matrix.cell(model, place) for place in range(len(matrix.benchmarks))]
        rows.append([model, *(_cell(cell, interval) if cell else NONE for cell in cells)])
    deltas = matrix.deltas
    notes = ["Shares in percent, with 95 % intervals."]
    if deltas:
        family = sum(delta.p_holm is not None for delta in deltas)
        notes.append(
            f"Against {matrix.baseline}, paired: {MARKS['better'][0]} better, {MARKS['worse'][0]} worse, "
            f"{MARKS['same'][0]} not distinguishable at 5 % over all {family} comparisons (Holm)."
        )
    return header, rows, notes + _withheld(found)


def _main(run: LoadedRun) -> list[str]:
    """The metrics of a table: all but those of single subjects."""
    from almost_eval.tasks.mmlu import CATEGORIES

    if run.task != "mmlu":
        return list(run.metrics)
    return [name for name in run.metrics if "/" not in name or name.split("/")[-1] in CATEGORIES]


def _run_row(label: str, run: LoadedRun, name: str, interval: Callable[[str, str], str]) -> list[str]:
    metric, unit = run.metrics[name], unit_of(run.task, name)
    value = "withheld" if metric.get("withheld") else shown(metric["value"], unit)
    bounds = interval(*(shown(bound, unit) for bound in metric["ci95"])) if metric["ci95"] else NONE
    return [label, readable(name), value, bounds, str(metric["n"]), str(metric["unscored"])]


def _cell(cell: Cell, interval: Callable[[str, str], str]) -> str:
    if cell.run.withheld:
        return "withheld"
    unit = unit_of(cell.run.task, cell.run.headline)
    parts = [shown(cell.metric["value"], unit)]
    if cell.metric["ci95"]:
        parts.append(interval(*(shown(bound, unit) for bound in cell.metric["ci95"])))
    return " ".join(parts + ([MARKS[cell.delta.mark][0]] if cell.delta else []))


def _withheld(found: RunSet) -> list[str]:
    return [f"Withheld: {run.label}, {run.task}: {run.withheld}." for run in found.runs if run.withheld]


def to_model_index(found: RunSet) -> str:
    """The YAML block between `---` lines that Hugging Face model cards carry; shares are shares of 1.

    Raises:
        InputError: runs of several models, as a card is about one; nothing that could be exported.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index
    from huggingface_hub.utils import yaml_dump

    if len(found.models) > 1:
        raise InputError(
            f"--model-index: a model card is about one model, and these are runs of {', '.join(found.models)}; give "
            "the runs of one"
        )
    results = [result for run in found.runs for result in _eval_results(run)]
    if not results:
        raise InputError("--model-index: no headline stands, so there is nothing to say; see the validity checks")
    index = eval_results_to_model_index(found.models[0], results)
    return f"---\n{yaml_dump({'model-index': index})}---\n"


def _eval_results(run: LoadedRun) -> list[Any]:
    from huggingface_hub import EvalResult

    kind = "text-classification" if run.spec["requires"] == "reward" else "text-generation"
    data, title, split = DATASETS.get(run.task, (run.task, str(run.results["protocol"]), None))
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
