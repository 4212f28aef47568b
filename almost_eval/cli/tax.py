"""`almost-eval tax`: what a policy gained and lost in training, and whether its reward is still worth anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import SEED, comma_list, import_transformers, open_console, options, print_json
from almost_eval.cli.options import DATA_OPTIONS, ENGINE_OPTIONS, run_request

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from almost_eval.compare.tax.tax import Paired, Tax


@click.command()
@click.option("--before", help="The policy that training began with: checkpoint directory, hub id or built-in name.")
@click.option("--after", multiple=True, metavar="CKPT", help="A later policy; once for each, in order.")
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Instead of --after: a folder that almost-train rlsf (or run) wrote, its checkpoints and its log.",
)
@click.option("--reward-model", help="Its checkpoint.  [nano/reward on nano data; the recipe's with --run]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="JSON Lines with id and prompt, which training has not seen.  [nano's own; the recipe's with --run]",
)
@click.option("--n-prompts", default=200, show_default=True, type=click.IntRange(min=2), help="Of those, at most.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Of an answer.")
@click.option(
    "--tasks", default="hhh,truthfulqa,mmlu", show_default=True, callback=comma_list, help="Benchmarks, by commas."
)
@click.option("--shots", default=5, show_default=True, type=click.IntRange(0, 5), help="mmlu: examples.")
@click.option(
    "--words/--letters",
    default=None,
    help="mmlu: score the words of the choices, or their letters.  [letters; words on nano data]",
)
@options(DATA_OPTIONS, ENGINE_OPTIONS)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of the answers, the prompts and the bootstrap.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the runs and of tax.json.")
@click.option("--json", "as_json", is_flag=True, help="Print tax.json instead of the tables.")
def tax(
    before: str | None,
    after: tuple[str, ...],
    run: Path | None,
    reward_model: str | None,
    prompts: Path | None,
    n_prompts: int,
    max_new_tokens: int,
    tasks: list[str],
    shots: int,
    words: bool | None,
    output: Path,
    as_json: bool,
    **values: Any,
) -> int:
    """Alignment tax: benchmarks, reward, KL and length before and after training; one plot, one sentence.

    \b
    Example:
      almost-eval tax --before nano/sft --after nano/almost --output runs/tax
      almost-eval tax --run runs/nano --data nano --output runs/tax
    """
    from almost_eval.compare.tax.measure import make_plan, measure
    from almost_eval.progress import progress_for
    from almost_eval.report.tax_page import write_page

    import_transformers()
    plan = make_plan(
        before,
        after,
        run,
        output,
        run_request(values, ""),
        tasks=tasks,
        shots=shots,
        words=words,
        reward_model=reward_model,
        prompts=prompts,
        n_prompts=n_prompts,
        max_new_tokens=max_new_tokens,
    )
    measured = measure(plan, progress_for())
    files = write_page(measured, output)
    if as_json:
        print_json(measured.to_dict())
    else:
        render(measured, open_console(), [output / "tax.json", *files])
    return 0 if measured.valid else 3


def render(tax: Tax, console: Console, files: list[Path]) -> None:
    """The tables, the sentence, and where the files are."""
    from rich.text import Text

    from almost_eval.compare.tax.tax import LOG_IS

    console.print(_means(tax))
    console.print(_differences(tax))
    for warning in tax.facts.get("warnings", ()):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print(Text(f"steps: {tax.steps_are}; KL: {tax.kl_source}", style="dim"), soft_wrap=True)
    if tax.log:
        console.print(Text(f"grey in the plot: {LOG_IS}", style="dim"), soft_wrap=True)
    console.print(Text(tax.sentence, style="bold"), soft_wrap=True)
    for file in files:
        console.print(Text(str(file)), soft_wrap=True)


def _means(tax: Tax) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from almost_eval.compare.tax.tax import shown

    title = "Alignment tax, means with 95 % half-widths"
    # No rules between the columns: with them, ten columns do not fit a terminal.
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("checkpoint", overflow="fold")  # wraps long names; no number is cut
    table.add_column("step", justify="right", no_wrap=True)
    for heading in tax.columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for policy in tax.policies:
        table.add_row(Text(policy.label), f"{policy.step:g}", *(shown(policy, name) for name in tax.columns))
    return table


def _differences(tax: Tax) -> Table:
    from rich.text import Text

    from almost_eval.compare.tax.tax import MEASURES, benchmarks
    from almost_eval.report.tables import titled

    before = tax.policies[0].label
    figures = ("n", "difference", "95 % interval", "p", "p, Holm")
    table = titled(f"Paired with {before}", ["checkpoint", "measure"], figures)
    table.add_column("")
    for pair in tax.comparisons:
        if pair.against == before:
            title = (benchmarks() | MEASURES)[pair.measure]
            table.add_row(Text(pair.checkpoint), title, str(pair.n), *_figures(pair), _verdict(pair))
    return table


def _figures(pair: Paired) -> tuple[str, str, str, str]:
    from almost_eval.compare.tax.tax import is_share
    from almost_eval.report.tables import span_of, text_of

    scale, form = (100, "+.1f") if is_share(pair.measure) else (1, "+.2f")
    difference = None if pair.difference is None else scale * pair.difference
    p_values = text_of(pair.p_value, ".2g"), text_of(pair.p_holm, ".2g")
    return text_of(difference, form), span_of(pair.ci95, form, scale), *p_values


def _verdict(pair: Paired) -> Text:
    from rich.text import Text

    words = {"better": ("better", "green"), "worse": ("worse", "red"), "same": ("not distinguishable", "dim")}
    return Text(*words[pair.mark]) if pair.mark in words else Text(pair.note or "", style="dim")
