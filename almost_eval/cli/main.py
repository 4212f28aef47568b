"""`almost-eval`: the command line. Imports what a command needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.all import all_tasks
from almost_eval.cli.arena import arena
from almost_eval.cli.command_line import Commands, comma_list, open_console, options, run_command_line
from almost_eval.cli.config_file import add_config
from almost_eval.cli.judge import judge, vicuna
from almost_eval.cli.list import completion, list_all
from almost_eval.cli.parity import parity
from almost_eval.cli.report import report
from almost_eval.cli.run_options import DATA_OPTIONS, DATA_ROOT, MODEL_OPTIONS, RUN_OPTIONS, prepare_run
from almost_eval.cli.tax import tax
from almost_eval.errors import InputError, did_you_mean

STARTED = time.perf_counter()
Command = Callable[..., Any]
PROBLEMS_SHOWN = 20


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="almost-eval")
@click.pass_context
def cli(context: click.Context) -> None:
    """Evaluate language models: numbers that can be trusted, fast.

    \b
    Example:
      almost-eval all                                      built-in models and data, nothing to download
      almost-eval hhh --model ./my-checkpoint --data-root ./hub
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(all_tasks)


@cli.command()
@click.option("--protocol", default="choice", show_default=True, help="choice, reward or likelihood.")
@click.option("--normalise", is_flag=True, help="likelihood: mean over tokens instead of the sum.")
@options(MODEL_OPTIONS, DATA_OPTIONS, RUN_OPTIONS)
def hhh(protocol: str, normalise: bool, **given: Any) -> int:
    """Static HHH: which of two answers is more helpful, honest and harmless.

    \b
    Example:
      almost-eval hhh --model ./my-checkpoint --data-root ./hub
      almost-eval hhh --model ./my-reward-model --protocol reward
      almost-eval hhh --engine openai --base-url http://127.0.0.1:8000/v1 --model my-model
    """
    from almost_eval.tasks.hhh import HHH, PROTOCOLS

    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}; {did_you_mean(protocol, PROTOCOLS)}")
    if normalise and protocol != "likelihood":
        raise InputError(f"--normalise belongs to --protocol likelihood, not {protocol}")

    def build(data: Any, prompting: Any) -> HHH:
        return HHH(protocol, data, prompting, normalise=normalise, limit=given["limit"])

    return _evaluate(build, given, reward=protocol == "reward")


@cli.command()
@click.option("--metrics", default="mc1,mc2", show_default=True, callback=comma_list, help="mc1, mc2, mc1_true_prompt.")
@options(MODEL_OPTIONS, DATA_OPTIONS, RUN_OPTIONS)
def truthfulqa(metrics: list[str], **given: Any) -> int:
    """TruthfulQA, multiple choice: mc1 and mc2 as lm-eval defines them, and the official true-or-false form.

    \b
    Example:
      almost-eval truthfulqa --model ./my-checkpoint --metrics mc1,mc2,mc1_true_prompt
    """
    from almost_eval.tasks.truthfulqa import TruthfulQA

    TruthfulQA.check_metrics(metrics)
    own = "mc1_true_prompt" not in metrics

    def build(data: Any, prompting: Any) -> TruthfulQA:
        return TruthfulQA(metrics, data, prompting, limit=given["limit"])

    return _evaluate(build, given, own_prompts=own)


@cli.command()
@click.option("--shots", default=5, show_default=True, type=click.IntRange(0, 5), help="Examples before a question.")
@click.option("--subjects", callback=comma_list, help="Subjects, or stem, humanities, social_sciences, other.  [all]")
@options(MODEL_OPTIONS, DATA_OPTIONS, RUN_OPTIONS)
def mmlu(shots: int, subjects: list[str], **given: Any) -> int:
    """MMLU: 57 subjects of four-way questions, with lm-eval's own task definitions.

    \b
    Example:
      almost-eval mmlu --model ./my-checkpoint --subjects stem,anatomy --shots 5
    """
    from almost_eval.tasks.mmlu import MMLU

    def build(data: Any, prompting: Any) -> MMLU:
        return MMLU(subjects, shots, data, prompting, limit=given["limit"])

    return _evaluate(build, given, own_prompts=True)


@cli.command()
@click.option("--tasks", required=True, callback=comma_list, help="lm-eval's names: tasks, groups or tags, by commas.")
@click.option("--shots", type=click.IntRange(min=0), help="Examples before a document.  [each task's own]")
@options(MODEL_OPTIONS, DATA_OPTIONS, RUN_OPTIONS)
def harness(tasks: list[str], shots: int | None, **given: Any) -> int:
    """Any task of lm-eval on this engine: its prompts and metrics, our speed and records.

    \b
    Example:
      almost-eval harness --tasks arc_easy,hellaswag --model ./my-checkpoint
    """
    from almost_eval.tasks.harness import Harness

    def build(data: Any, prompting: Any) -> Harness:
        return Harness(tasks, data, prompting, shots=shots, limit=given["limit"])

    return _evaluate(build, given, own_prompts=True)


cli.add_command(vicuna)
cli.add_command(judge)


@cli.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(run_a: Path, run_b: Path, seed: int, as_json: bool) -> int:
    """Is B better than A? Paired on the samples both runs scored.

    \b
    Example:
      almost-eval compare runs/before runs/after
    """
    from almost_eval.compare.comparison import compare_runs, render

    comparison = compare_runs(run_a, run_b, seed=seed)
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False))
    else:
        render(comparison, open_console())
    return 0


cli.add_command(parity)


@cli.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--samples", default=16, show_default=True, type=click.IntRange(min=1), help="How many to score again.")
@options(MODEL_OPTIONS, [DATA_ROOT])
@click.option("--seed", default=0, show_default=True, help="Chooses the samples to score again.")
def verify(run_folder: Path, samples: int, seed: int, **given: Any) -> int:
    """Recompute every metric of a run from its lines; with --model, score a sample of them again.

    \b
    Example:
      almost-eval verify runs/my-run
      almost-eval verify runs/my-run --model ./my-checkpoint --samples 32
    """
    from rich.text import Text

    from almost_eval.data.sources import find_data
    from almost_eval.run.store import read_spec
    from almost_eval.run.verify import rescore, verify_run

    spec = read_spec(run_folder)
    data = find_data(spec["data"]["source"], given["data_root"])
    found = verify_run(run_folder, data)
    if given["model"]:
        from almost_eval.tasks.registry import build_task

        prompts = (spec["prompt_set"] or {}).get("name")

        def build(source: Any, prompting: Any) -> Any:
            return build_task(spec["task"], spec["protocol"], spec["settings"], source, prompting)

        run = prepare_run(
            build,
            given | _as_run(spec, given),
            reward=spec["requires"] == "reward",
            # Few-shot documents: lm-eval's words, or built-in ones that no template rendered.
            own_prompts=prompts == "lm-eval" or (prompts == "builtin" and spec["template"] is None),
        )
        rescore(run_folder, run, found, n=samples, seed=seed)
    console = open_console()
    console.print(f"{found.samples} samples, {found.metrics} entries of results.json recomputed")
    if given["model"]:
        console.print(f"{found.rescored} samples scored again, largest difference {found.largest_difference:.2g}")
    for problem in found.problems[:PROBLEMS_SHOWN]:
        console.print(Text.assemble(("differs:", "red"), f" {problem}"), soft_wrap=True)
    if len(found.problems) > PROBLEMS_SHOWN:
        console.print(f"and {len(found.problems) - PROBLEMS_SHOWN} more")
    console.print("verified" if found.passed else f"[red]not verified: {len(found.problems)} differences[/red]")
    return 0 if found.passed else 1


def _as_run(spec: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a spec's prompts and numbers again; what is given for the engine wins."""
    prompts, template, engine = spec["prompt_set"], spec["template"], spec["engine"]
    asked = template["name"] if template else "none"
    name = given["engine"] or engine["name"]
    options = {
        "data": spec["data"]["source"],
        "prompt_set": prompts and ("builtin" if prompts["name"] == "builtin" else "official"),
        "template": asked if spec["template_asked"] else "auto",
        "seed": spec["seed"],
        "engine": name,
    }
    if name != "openai":
        options["max_length"] = engine["context_length"]
        taken = ("dtype", "attention") if name == "hf" else ("dtype",)
        options |= {key: engine[key] for key in taken if given[key] == "auto" and engine.get(key)}
    elif not given["base_url"]:
        options["base_url"] = engine.get("base_url")
    return options


for command in (report, tax, arena, list_all, completion):
    cli.add_command(command)
add_config(cli)


def _evaluate(build: Command, given: dict[str, Any], *, reward: bool = False, own_prompts: bool = False) -> int:
    """Prepare, then run or show what would be run."""
    from almost_eval.progress import progress_for
    from almost_eval.run.trackers import log_results
    from almost_eval.run.validity import parse_allowed

    allowed = parse_allowed(given["allow"])
    run = prepare_run(build, given, reward=reward, own_prompts=own_prompts, allowed=allowed)
    if given["dry_run"]:
        facts = run.describe()
        if given["as_json"]:
            click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        else:
            from almost_eval.report.console import print_preflight

            print_preflight(facts, open_console())
        return 0
    folder = given["output"] or run.default_folder()
    results, _ = run.execute(folder, progress_for(), started=STARTED)
    log_results(folder, results, given["log_to"])
    return _show(results, folder, given["as_json"])


def _show(results: Mapping[str, Any], folder: Path, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        from almost_eval.report.console import print_results

        print_results(results, open_console(), folder=str(folder))
    return 0 if results["validity"]["passed"] else 3


def main() -> NoReturn:
    """Run the command line."""
    run_command_line(cli, "almost-eval")


if __name__ == "__main__":
    main()
