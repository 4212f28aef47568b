"""A run as a table in a terminal. Names from outside are `Text`: a model may be named "[red]x"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from almost_eval.errors import printable
from almost_eval.judge.names import CHECK_TASK
from almost_eval.run.validity import counted, readable
from almost_eval.tasks.registry import stated_by
from almost_eval.types import JSONMapping

MANY_ROWS = 24
"""Rows beyond which subjects are folded away; they are all in results.json."""


def print_results(results: JSONMapping, console: Console, *, folder: str | None = None) -> None:
    """The metrics with their intervals, the baselines, what was not scored, and where the run is."""
    if "judging" in results:
        _print_judging(results, console, folder)
        _print_folder(folder, console)
        return
    title = f"{results['task']} · {results['protocol']} · {results['model']}"
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("n", justify="right")
    table.add_column("unscored", justify="right")
    # A metric may be in a unit of its own: a BLEU of 0.2 is not 20 %.
    number = _number if stated_by(results["task"]).unit == "number" else _share
    metrics = results["metrics"]
    shown = _folded(results)
    for name in shown:
        metric = metrics[name]
        value = "withheld" if metric.get("withheld") else number(metric["value"])
        table.add_row(
            Text(name),
            value,
            _interval(metric["ci95"], number),
            str(metric["n"]),
            str(metric["unscored"] or ""),
            style="bold" if name == results["headline"] else None,
        )
    if results["baselines"]:
        table.add_section()
        for name, metric in results["baselines"].items():
            table.add_row(
                Text(name),
                number(metric["value"]),
                _interval(metric["ci95"], number),
                str(metric["n"]),
                "",
                style="dim",
            )
    console.print(table)
    if len(shown) < len(metrics):
        console.print(Text(f"{len(metrics) - len(shown)} more metrics in results.json", style="dim"))
    for line in _notes(results):
        console.print(line)
    _print_folder(folder, console)


def _print_judging(results: JSONMapping, console: Console, folder: str | None) -> None:
    """What a judge said of systems, or what a check says of a judge: with what its folder holds of another judge."""
    if results["task"] == CHECK_TASK:
        from almost_eval.judge.check import stored_certificate
        from almost_eval.report.certificate import print_certificate

        print_certificate(stored_certificate(results, Path(folder) if folder else None), console)
    else:
        from almost_eval.report.judge_console import print_judged

        print_judged(results, console)


def _print_folder(folder: str | None, console: Console) -> None:
    if folder:
        console.print(Text(f"run: {folder}"), soft_wrap=True)


def _notes(results: JSONMapping) -> list[Text]:
    lines = []
    if counts := counted(results):
        lines.append(Text("counted: " + ", ".join(counts)))
    if not results["validity"]["passed"]:
        reason = results["validity"]["reason"] or "no samples"
        lines.append(Text.assemble(("headline withheld:", "red"), f" {reason}"))
    if prompts := _prompts(results):
        lines.append(Text(prompts, style="dim"))
    engine = results["engine"]
    computed, distinct, plain = (engine.get(f"tokens_{which}") for which in ("computed", "in_trie", "plain"))
    if computed and distinct:
        done = (
            f"{computed:,} tokens computed, {computed / distinct:.2f} x the {distinct:,} distinct ones; "
            f"{(plain or 0) / computed:.1f} x fewer than one by one"
        )
        lines.append(Text(done, style="dim"))
    lines += [Text.assemble(("warning:", "yellow"), f" {warning}") for warning in engine["warnings"]]
    return lines


def _prompts(results: JSONMapping) -> str:
    """How prompts were written, where that was chosen: `prompts: template tokenizer, few-shot examples as turns`."""
    provenance = results.get("provenance") or {}
    chosen = dict(provenance.get("prompt_settings") or {})
    if not chosen:
        return ""
    parts = [f"template {provenance['template'] or 'none'}"]
    if (is_multiturn := chosen.pop("fewshot_as_multiturn", None)) is not None:
        parts.append("few-shot examples as turns" if is_multiturn else "few-shot examples in one turn")
    parts += [f"{readable(name)}: {value}" for name, value in chosen.items()]
    return f"prompts: {', '.join(parts)}"


def _folded(results: JSONMapping) -> list[str]:
    """The metrics to show; of many, those that the task calls its main ones, or else those of no group."""
    names = list(results["metrics"])
    if len(names) <= MANY_ROWS:
        return names
    main = stated_by(results["task"]).main_metrics(names)
    if len(main) == len(names):
        main = [name for name in names if "/" not in name] or names[:MANY_ROWS]
    return [name for name in names if name in main or name == results["headline"]]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(bounds: list[float] | None, number: Callable[[float], str]) -> str:
    return f"{number(bounds[0])} to {number(bounds[1])}" if bounds else "-"


def print_preflight(facts: Mapping[str, object], console: Console) -> None:
    """Results of `--dry-run`: the prompt of one sample as the model will read it."""
    console.rule("prompt of the first sample", align="left")
    console.print(Text(printable(str(facts["prompt"]))), soft_wrap=True)  # a line is broken where the prompt breaks it
    console.rule(align="left")
    for key, value in facts.items():
        if key != "prompt":
            console.print(Text(f"{key.replace('_', ' ')}: {value}"), soft_wrap=True)
