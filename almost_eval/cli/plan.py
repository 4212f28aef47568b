"""`almost-eval plan`: tokens, seconds and money of all benchmarks of a model, before anything runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.all import JUDGE_OF_ALL, SUITE_OPTIONS, print_plan, suite_request
from almost_eval.cli.command_line import FiniteRange, comma_list, import_transformers, open_console, options
from almost_eval.cli.options import DATA_OPTIONS, MODEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from almost_eval.suite.cost import Cost, Work
    from almost_eval.suite.plan import Planned


@click.command()
@options(SUITE_OPTIONS)
@click.option("--gpu", help="By whose datasheet: a100-80gb, h100-80gb, l40s-48gb, rtx4090-24gb.")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
@click.option("--sizes", callback=comma_list, help="7b, 13b, 70b, by commas, in place of the model's own size.")
@click.option("--measure", is_flag=True, help="Time a part of each task on this machine; loads the weights.")
@click.option("--answer-tokens", type=click.IntRange(min=1), help="Of an answer, on average.  [at most: its budget]")
@click.option("--price-per-gpu-hour", type=FiniteRange(min=0), help="USD; without it, GPU-hours alone.")
@options(MODEL_OPTIONS, JUDGE_OF_ALL, DATA_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print tokens and seconds instead of the tables.")
def plan(
    gpu: str | None,
    devices: int,
    sizes: list[str],
    measure: bool,
    answer_tokens: int | None,
    price_per_gpu_hour: float | None,
    **values: Any,
) -> int:
    """Tokens, seconds and money of all benchmarks of a model, before anything runs.

    \b
    Tokens to read are exact: the tasks' own prompts in the model's tokenizer, shared prefixes once.
    Seconds are by a GPU's datasheet (--gpu), or by what this machine does (--measure). A model of
    another size (--sizes) reads the same tokens. What a judge behind an endpoint costs is said too.

    \b
    Example:
      almost-eval plan --model ./ckpt --data-root ./hub --measure
      almost-eval plan --model ./ckpt --data-root ./hub --gpu a100-80gb --devices 8 --sizes 7b,13b,70b
    """
    from almost_eval.errors import InputError
    from almost_eval.suite.cost import cost_on_gpus, work_of
    from almost_eval.suite.hardware import gpu_named, rates_in_words, size_named
    from almost_eval.suite.plan import plan as plan_suite

    if gpu and measure:
        raise InputError("--gpu is another machine and --measure this one: leave out one of them")
    if not gpu and (sizes or price_per_gpu_hour is not None):
        raise InputError(
            f"--{'sizes' if sizes else 'price-per-gpu-hour'}: say whose rates count with --gpu, such as a100-80gb"
        )
    named_gpu = gpu_named(gpu) if gpu else None
    named_sizes = [size_named(name) for name in sizes]
    import_transformers()
    names, request = suite_request(values)
    planned, _ = plan_suite(names, request)
    model = str(request.base.model)
    work = work_of(planned, answer_tokens)
    costs: list[Cost] = []
    if named_gpu:
        for size in named_sizes or [_own_size(planned, model)]:
            costs.append(cost_on_gpus(work, size, named_gpu, devices))
    measured = _measured(planned, answer_tokens) if measure else {}
    rates = rates_in_words(gpu, measure, "reading", "writing") + ("; loading is not counted" if gpu else "")
    if values["as_json"]:
        content = {
            "model": model,
            "tasks": {one.name: one.to_dict() for one in planned},
            "rates": rates,
            "sizes": {cost.size: cost.to_dict(price_per_gpu_hour) for cost in costs},
            "measured": measured,
        }
        click.echo(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        console = open_console()
        print_plan(planned, model, console)
        _print_costs(costs, measured, work, price_per_gpu_hour, console)
        say = "at most" if not answer_tokens and any(one.write for one in planned) else "expected"
        console.print(f"times are {say}, and by {rates}", soft_wrap=True)
    return 1 if any(one.refused for one in planned) else 0


def _own_size(planned: Sequence[Planned], model: str) -> Any:
    from almost_eval.errors import InputError
    from almost_eval.suite.hardware import size_of

    for one in planned:
        run: Any = one.run
        for holder in (
            getattr(run, "model", None),
            *(s.engine for s in getattr(run, "systems", ()) if hasattr(s, "engine")),
        ):
            if checkpoint := getattr(holder, "checkpoint", None):
                return size_of(checkpoint)
    raise InputError(f"the size of {model} is not known here: name one with --sizes")


def _measured(planned: Sequence[Planned], answer_tokens: int | None) -> dict[str, float | None]:
    from almost_eval.progress import progress_for
    from almost_eval.suite.pilot import Pilot

    pilot = Pilot(progress_for())
    seconds = {one.name: pilot.seconds(one, answer_tokens) for one in planned if not one.refused}
    return {**seconds, "loading": pilot.loading}


def _print_costs(
    costs: Sequence[Cost],
    measured: Mapping[str, float | None],
    work: Sequence[Work],
    price: float | None,
    console: Any,
) -> None:
    """A column for each size, or for this machine."""
    from rich.table import Table
    from rich.text import Text

    if not costs and not measured:
        return
    table = Table(title="time", title_justify="left", title_style="bold")
    table.add_column("task")
    if measured:
        table.add_column("this machine", justify="right")
        for name, seconds in measured.items():
            table.add_row(Text(name), _time(seconds))
        table.add_section()
        table.add_row("total", _time(sum(seconds or 0.0 for seconds in measured.values())))
    else:
        for cost in costs:
            divided = f", {cost.split} a copy" if cost.split > 1 else ""
            table.add_column(Text(f"{cost.size}\n{cost.devices} GPUs{divided}"), justify="right")
        for one in work:
            table.add_row(Text(one.name), *(_time(cost.seconds[one.name]) for cost in costs))
        table.add_section()
        table.add_row("total", *(_time(cost.total_seconds) for cost in costs))
        table.add_row("GPU-hours", *(f"{cost.gpu_hours:,.2f}" for cost in costs))
        if price is not None:
            table.add_row("USD", *(f"{cost.money(price):,.2f}" for cost in costs))
    console.print(table)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
