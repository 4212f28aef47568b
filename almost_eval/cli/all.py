"""`almost-eval all`: every benchmark on one model, and one page. Imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import comma_list, import_transformers, open_console, options, options_of, print_json
from almost_eval.cli.judge_options import JUDGE_OPTIONS, JUDGES_OWN, REASK
from almost_eval.cli.options import DATA_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS, Values, run_request
from almost_eval.progress import PipeProgress

if TYPE_CHECKING:
    from almost_eval.judge.build import JudgeOptions
    from almost_eval.suite.plan import Planned, SuiteRequest
    from almost_eval.suite.run import Outcome

JUDGE_OF_ALL = [
    *(option for option in JUDGE_OPTIONS if options_of([option])[0].name not in (*JUDGES_OWN, "prompt_set")),
    REASK,
]
"""Those of `vicuna` that no other group has an option of the same name for."""
SUITE_OPTIONS = [
    click.option("--reward-model", help="Checkpoint of a reward model, for Static HHH."),
    click.option("--baseline", help="Checkpoint or answer file that the judge compares the model with."),
    click.option(
        "--tasks", callback=comma_list, help="Some only: hhh, hhh-choice, truthfulqa, mmlu, vicuna, ...  [all]"
    ),
]
"""What `all` is about; `plan` asks the same."""


@click.command("all")
@options(SUITE_OPTIONS, MODEL_OPTIONS, JUDGE_OF_ALL, DATA_OPTIONS, RUN_OPTIONS)
def all_tasks(**values: Any) -> int:
    """All benchmarks of one model, and one page that shows them.

    \b
    Static HHH (choice, likelihood; reward with --reward-model), TruthfulQA, MMLU with 5 examples,
    and Vicuna with --judge and --baseline. Built-in models bring all of these along. The weights
    are read once; each task has its run folder in --output, and goes on where it was stopped.
    Exit code 1: a task failed, the others are done. 3: done, but a headline is withheld.

    \b
    Example:
      almost-eval all                                      built-in models, data and judge
      almost-eval all --model ./ckpt --reward-model ./rm --data-root ./hub --output runs/ckpt
      almost-eval all --model ./ckpt --judge gpt-6.1-terra --baseline answers.jsonl --max-cost 20 --dry-run
    """
    from almost_eval.run.trackers import log_results
    from almost_eval.suite.plan import plan
    from almost_eval.suite.run import execute, summary

    import_transformers()
    names, request = suite_request(values)
    planned, folder = plan(names, request)
    model = str(request.base.model)
    if values["dry_run"]:
        return _show_plan(planned, model, as_json=values["as_json"])
    if not values["as_json"]:
        print_plan(planned, model, _stderr())
    outcomes = []
    with display(planned) as progress:
        for outcome in execute(
            planned, progress, progress.begin, lambda run, results: log_results(run, results, values["log_to"])
        ):
            outcomes.append(outcome)
            progress.end(outcome.name)
    whole, code = summary(model, folder, outcomes)
    if values["as_json"]:
        print_json(whole)
    else:
        print_outcomes(outcomes, whole, open_console())
    return code


def suite_request(values: Values) -> tuple[list[str], SuiteRequest]:
    """The tasks that the flags name, and what is asked of them, with defaults.

    Raises:
        InputError: flags that do not go together.
    """
    from almost_eval.suite.plan import SuiteRequest, choose, refuse_unused, with_defaults

    named = SuiteRequest(
        base=run_request(values, ""),
        tasks=values["tasks"],
        reward_model=values["reward_model"],
        judge=_judge(values),
        baseline=values["baseline"],
    )
    request = with_defaults(named)
    names = choose(request)
    refuse_unused(names, named)
    return names, request


def _judge(values: Values) -> JudgeOptions:
    """The flags about the judge; the engine's requests at a time and its patience are not the judge's."""
    from almost_eval.judge.build import JudgeOptions

    names = {field.name for field in fields(JudgeOptions)} - {*JUDGES_OWN}
    return JudgeOptions(**{name: value for name, value in values.items() if name in names})


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else 110, emoji=False, highlight=False)


def _show_plan(planned: Sequence[Planned], model: str, *, as_json: bool) -> int:
    if as_json:
        tasks = {one.name: one.to_dict() for one in planned}
        totals = {key: sum(getattr(one, key) for one in planned) for key in ("read", "write")}
        print_json({"model": model, "tasks": tasks, **totals})
    else:
        print_plan(planned, model, open_console())
    return 1 if any(one.refused for one in planned) else 0


def print_plan(planned: Sequence[Planned], model: str, console: Any) -> None:
    """What each task takes, and which cannot run."""
    from rich.text import Text

    from almost_eval.report.tables import titled

    headings = ("samples", "there already", "tokens to read", "to write, at most")
    table = titled(f"plan · {model}", ["task"], headings)
    for one in planned:
        cells = [f"{n:,}" if n else "" for n in (one.samples, one.done, one.read, one.write)]
        table.add_row(Text(one.name), *(["cannot run", "", "", ""] if one.refused else cells))
    table.add_section()
    table.add_row("total", "", "", *(f"{sum(getattr(one, key) for one in planned):,}" for key in ("read", "write")))
    console.print(table)
    for one in planned:
        for key, value in one.notes.items() if one.notes.get("requests") else ():  # a judge behind an endpoint
            console.print(Text(f"{one.name}: {key.replace('_', ' ')}: {value}", style="dim"), soft_wrap=True)
        if one.refused:
            console.print(Text.assemble((f"{one.name} cannot run:", "red"), f" {one.refused}"), soft_wrap=True)


def print_outcomes(outcomes: Sequence[Outcome], whole: Mapping[str, Any], console: Any) -> None:
    """The headlines in one table, what failed and why, and where the page is."""
    from rich.text import Text

    from almost_eval.report.tables import titled

    table = titled(str(whole["model"]), ())
    for heading in ("task", "metric", "score", "95 % interval", "n", "valid", "seconds"):
        table.add_column(heading, justify="left" if heading in ("task", "metric", "valid") else "right")
    for outcome in outcomes:
        for row in _rows(outcome):
            table.add_row(*map(Text, row))
    console.print(table)
    for outcome in outcomes:
        if outcome.failed:
            console.print(Text.assemble((f"{outcome.name} failed:", "red"), f" {outcome.failed}"), soft_wrap=True)
            continue
        assert outcome.results is not None
        if not outcome.results["validity"]["passed"]:
            why = outcome.results["validity"]["reason"] or "no samples"
            console.print(Text.assemble((f"{outcome.name}, headline withheld:", "red"), f" {why}"), soft_wrap=True)
        for warning in outcome.results["engine"]["warnings"]:
            console.print(Text.assemble((f"{outcome.name}, warning:", "yellow"), f" {warning}"), soft_wrap=True)
    if whole["report_failed"]:
        console.print(Text.assemble(("no page:", "red"), f" {whole['report_failed']}"), soft_wrap=True)
    if whole["report"]:
        console.print(Text(f"page: {whole['report']}"), soft_wrap=True)


def _rows(outcome: Outcome) -> Iterator[list[str]]:
    """The headline; where the metrics are measures of their own, each of them."""
    from almost_eval.report.runs import shown, unit_of
    from almost_eval.tasks.registry import stated_by

    results = outcome.results
    if results is None:
        yield [outcome.name, "", "failed", "", "", "", ""]
        return
    headline, task = results["headline"], results["task"]
    names = [headline] if stated_by(task).headline_alone else list(results["metrics"])
    for name in names:
        metric, unit = results["metrics"][name], unit_of(task, name)
        value = "withheld" if metric.get("withheld") else shown(metric["value"], unit)
        bounds = " to ".join(shown(bound, unit) for bound in metric["ci95"] or ())
        first = name == names[0]
        valid = ("yes" if results["validity"]["passed"] else "no") if name == headline else ""
        seconds = f"{results['timing']['seconds']:.1f}" if first else ""
        yield [outcome.name if first else "", name, value, bounds or "-", str(metric["n"]), valid, seconds]


# --- one display for all ---


class Silent(PipeProgress):
    """Reports nothing but notices, as lines on stderr."""

    def __init__(self) -> None:
        super().__init__(sys.stderr, seconds=0)

    def begin(self, one: Planned) -> None:
        """A task begins."""

    def end(self, name: str) -> None:
        """A task is over."""


class Display(Silent):
    """Two bars on stderr: tokens of the whole plan with the time that remains, and below it the task at work."""

    def __init__(self, planned: Sequence[Planned], bars: Any) -> None:
        super().__init__()
        self._bars = bars
        self._sizes = {one.name: one.read + one.write for one in planned if not one.refused}
        self._over = 0  # tokens of the tasks that are over
        self._at: Planned | None = None
        self._whole = bars.add_task("all tasks", total=sum(self._sizes.values()) or 1, unit="tokens")

    def note(self, message: str) -> None:
        """Say what begins."""
        self._bars.console.print(message, style="dim", highlight=False, markup=False)

    def notice(self, message: str) -> None:
        """One line above the bars."""
        self._bars.console.print(message, style="yellow", highlight=False, markup=False)

    def begin(self, one: Planned) -> None:
        """A task begins."""
        self._at = one

    def end(self, name: str) -> None:
        """A task is over, done or failed."""
        self._over += self._sizes.get(name, 0)
        self._bars.update(self._whole, completed=self._over)
        self._at = None

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """A bar of its own below, until it is done; the tokens of the plan go along with it."""
        bar = self._bars.add_task(description, total=total, completed=done, unit="samples")
        # A judged task has several steps, of which one cannot say what each takes: it moves the whole at its end.
        size = self._sizes.get(self._at.name, 0) if self._at and not self._at.write else 0
        missing = max(1, total - done)

        def advance(count: int = 1) -> None:
            self._bars.advance(bar, count)
            self._bars.advance(self._whole, size * count / missing)

        try:
            yield advance
        finally:
            self._bars.remove_task(bar)


@contextmanager
def display(planned: Sequence[Planned]) -> Iterator[Silent]:
    """The display where stderr is a terminal, else silence."""
    if not sys.stderr.isatty():
        yield Silent()
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} / {task.total:,.0f} {task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=_stderr(), transient=True) as bars:
        yield Display(planned, bars)
