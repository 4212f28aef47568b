"""`almost-train plan`: what a recipe needs, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.cli.command_line import import_transformers, open_console, options, print_json
from almost_train.cli.options import RECIPE_OPTIONS

if TYPE_CHECKING:
    from rich.table import Table

    from almost_train.pipeline.budget import StageBudget, WholeCost
    from almost_train.pipeline.needs import Need

DOES_NOT_FIT = 3
"""The exit code of a plan with a stage that does not fit."""


@click.command()
@click.argument("recipe")
@click.option("--device-memory", help="Memory of a GPU: 24GB, 80GiB.  [what this machine has]")
@click.option("--devices", "count", type=click.IntRange(min=1), help="How many.  [what this machine has]")
@click.option("--gpu", help="Its kind, for memory and rates: a100-80gb, h100-80gb, l40s-48gb, rtx4090-24gb.")
@click.option(
    "--sharding",
    type=click.Choice(["full", "none"]),
    default="full",
    show_default=True,
    help="Several devices: divide weights, gradients and moments (FSDP, ZeRO-3), or hold them on each.",
)
@click.option("--price-per-gpu-hour", type=click.FloatRange(min=0), help="USD; without it, GPU-hours alone.")
@click.option("--measure", is_flag=True, help="Time a pass of each model on this machine; needs its weights.")
@click.option("--data-root", help="Folder laid out like the hub, looked in first. [env: ALMOST_DATA_ROOT]")
@options(RECIPE_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print bytes and seconds instead of the table.")
def plan(
    recipe: str,
    device_memory: str | None,
    count: int | None,
    gpu: str | None,
    sharding: str,
    price_per_gpu_hour: float | None,
    measure: bool,
    data_root: str | None,
    values: tuple[str, ...],
    places: dict[str, str],
    scale: str,
    scale_model: str | None,
    as_json: bool,
) -> int:
    """Memory and time of each stage of a recipe, and what does not fit with what to change. Loads no weights.

    \b
    Example:
      almost-train plan 7b-lora --gpu rtx4090-24gb
      almost-train plan llama-7b --gpu a100-80gb --devices 8 --price-per-gpu-hour 2
    """
    from almost_eval.progress import progress_for
    from almost_eval.suite.hardware import rates_in_words
    from almost_train.pipeline.budget import budgets, whole_cost
    from almost_train.pipeline.hardware import devices
    from almost_train.pipeline.measure import Rates
    from almost_train.pipeline.needs import Estimator
    from almost_train.pipeline.plan import engine_options
    from almost_train.pipeline.preflight import check_elsewhere
    from almost_train.pipeline.recipe import load_recipe
    from almost_train.pipeline.scale import scaled

    loaded = scaled(load_recipe(recipe, places=places, values=values), scale, scale_model)
    import_transformers()
    engine = engine_options(loaded.engine, f"recipe {loaded.name}, engine")
    check_elsewhere(loaded, data_root, engine)
    chosen = devices(device_memory, count, gpu, sharding)
    rates = Rates(engine, progress_for()) if measure else None
    rows = list(budgets(loaded, Estimator(chosen), data_root, rates))
    total = whole_cost(rows, chosen.count)
    by = rates_in_words(gpu, measure, "training", "sampling")
    if as_json:
        content = {
            "recipe": loaded.name,
            "devices": chosen.describe(),
            "rates": by,
            "total": total.to_dict(price_per_gpu_hour),
            "stages": [row.to_dict() for row in rows],
        }
        print_json(content)
    else:
        console = open_console()
        console.print(_table(rows, f"{loaded.name} on {chosen.describe()}"))
        console.print(f"times are at most, and by {by}", soft_wrap=True)
        console.print(_total(total, price_per_gpu_hour), soft_wrap=True, highlight=False)
        for row in rows:
            if not row.fits:
                say = f"{row.need.stage} does not fit: {_size(row.need.total)} of {_size(chosen.room)}; {row.advice}"
                console.print(say, soft_wrap=True, markup=False, highlight=False)
            elif row.need.note:
                console.print(f"{row.need.stage}: {row.need.note}", soft_wrap=True, markup=False, highlight=False)
            if row.need.trained and (note := chosen.heap_note(row.need.activations)):
                console.print(f"{row.need.stage}: {note}", soft_wrap=True, markup=False, highlight=False)
    return 0 if all(row.fits for row in rows) else DOES_NOT_FIT


def _table(rows: list[StageBudget], title: str) -> Table:
    """Sizes in GB of 10**9 bytes, as GPUs are sold."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"{title} (GB)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("stage, model", overflow="fold")
    for name in ("size", "trained", "weights", "grads", "optim", "activ", "KV", "runtime", "sum", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for row in rows:
        need: Need = row.need
        sizes = (need.weights, need.gradients, need.optimiser, need.activations, need.cache, need.runtime, need.total)
        table.add_row(
            f"{need.stage}\n{Path(need.model).name}",
            _count(need.parameters),
            _count(need.trained),
            *(f"{size / 1e9:.2f}" if size else "-" for size in sizes),
            _time(need.seconds),
            "yes" if row.fits else "NO",
        )
    return table


def _total(total: WholeCost, price: float | None) -> str:
    parts = [f"all stages: {total.read:,} tokens in training, {total.written:,} sampled, at most"]
    if total.gpu_hours is not None:
        parts.append(f"{_time(total.seconds)}, {total.gpu_hours:,.1f} GPU-hours")
    usd = total.money(price)
    return "; ".join(parts + ([f"{usd:,.2f} USD"] if usd is not None else []))


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M" if number else "-"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )
