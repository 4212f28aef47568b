"""`almost-train run`: a whole recipe."""

from __future__ import annotations

from pathlib import Path

import click

from almost_eval.cli.command_line import import_transformers, open_console, options, print_json
from almost_eval.cli.options import LOG_TO
from almost_eval.run.trackers import logging_to
from almost_train.cli.options import RECIPE_OPTIONS, UserPath


@click.command()
@click.argument("recipe")
@click.option("--output", type=UserPath(), help="Folder of the pipeline.  [runs/<recipe>]")
@click.option("--seed", type=click.IntRange(min=0), help="In place of the recipe's.")
@click.option("--until", help="Stop after this stage.")
@click.option("--data-root", help="Folder laid out like the hub, looked in first. [env: ALMOST_DATA_ROOT]")
@click.option("--dry-run", is_flag=True, help="Check the recipe and list its stages; run nothing.")
@options(RECIPE_OPTIONS)
@LOG_TO
@click.option("--json", "as_json", is_flag=True, help="Print the results of all stages instead of the tables.")
def run(
    recipe: str,
    output: Path | None,
    seed: int | None,
    until: str | None,
    data_root: str | None,
    dry_run: bool,
    values: tuple[str, ...],
    places: dict[str, str],
    scale: str,
    scale_model: str | None,
    log_to: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run a recipe, whole: nano, gemma-270m, smollm, 7b-lora, llama-7b or a YAML file. Goes on where it was killed.

    \b
    Example:
      almost-train run nano --output runs/nano
    """
    from almost_eval.progress import Progress, progress_for
    from almost_train.common.processes import is_main
    from almost_train.pipeline.recipe import load_recipe
    from almost_train.pipeline.run import Pipeline
    from almost_train.pipeline.scale import scaled

    loaded = scaled(load_recipe(recipe, seed=seed, places=places, values=values), scale, scale_model)
    import_transformers()
    folder = output or Path("runs") / (loaded.name if scale == "full" else f"{loaded.name}-{scale}")
    pipeline = Pipeline(loaded, folder, data_root, progress_for() if is_main() else Progress())
    console = open_console()
    if dry_run:
        for name, state in pipeline.states(until).items() if is_main() else ():
            console.print(f"{name:14} {state}")
        return 0
    with logging_to(log_to):
        reports = pipeline.run(until)
    if not is_main():  # under `accelerate launch` the results are printed once
        return 0
    if as_json:
        print_json({report.name: report.result for report in reports})
        return 0
    from almost_train.pipeline.summary import draw, policy_table, stage_table

    console.print(stage_table(reports))
    if reports[-1].name == "evaluation":
        console.print(policy_table(reports[-1].result["metrics"]))
    if picture := draw(folder, reports):
        console.print(f"picture: {picture}", soft_wrap=True)
    return 0
