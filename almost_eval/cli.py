"""`almost-eval`: the command line. Imports what a command needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from almost_eval import __version__
from almost_eval.command_line import Commands, open_console, options, run_command_line
from almost_eval.errors import InputError, did_you_mean
from almost_eval.startup import import_transformers

STARTED = time.perf_counter()
Command = Callable[..., Any]
PROBLEMS_SHOWN = 20


def _count_or_auto(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of at least 1")
    return int(value)


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


DATA_OPTIONS = [
    click.option("--data", help="Data: hub (the real sets) or nano (built in; the default for built-in models)."),
    click.option("--data-root", help="Folder laid out like the hub, looked in first. [env: ALMOST_DATA_ROOT]"),
    click.option("--prompt-set", help="official (the default on real data) or builtin (our own wording)."),
    click.option(
        "--template",
        default="auto",
        show_default=True,
        help="auto, none, almost, alpaca, vicuna, dolly, oasst, a FILE.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Samples of each category, subject or task."),
]
MODEL_OPTIONS = [
    click.option("--model", help="Checkpoint directory, hub id or built-in name."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
    click.option("--attention", default="auto", show_default=True, help="auto, sdpa, eager or flash_attention_2."),
    click.option(
        "--batch-size", default="auto", show_default=True, callback=_count_or_auto, help="Sequences in a forward pass."
    ),
    click.option("--batch-tokens", default="auto", callback=_count_or_auto, help="Tokens in a forward pass."),
    click.option("--max-length", type=click.IntRange(min=2), help="Context length, below the model's own."),
    click.option("--share-prefixes/--no-share-prefixes", default=True, help="Compute shared prefixes once."),
    click.option("--allow-pickle", is_flag=True, help="Accept pickled weights, which can run code."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint ships."),
]
RUN_OPTIONS = [
    click.option("--output", type=click.Path(path_type=Path), help="Run folder; the default is named by the run."),
    click.option("--seed", default=0, show_default=True, help="Of whatever is drawn."),
    click.option("--allow", multiple=True, metavar="CHECK=SHARE", help="Share of samples a validity check may flag."),
    click.option("--dry-run", is_flag=True, help="Show the first prompt and the lengths; load no weights."),
    click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table."),
]


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
      almost-eval hhh                                      built-in model and data, nothing to download
      almost-eval hhh --model ./my-checkpoint --data-root ./hub
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


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
@click.option("--metrics", default="mc1,mc2", show_default=True, callback=_names, help="mc1, mc2, mc1_true_prompt.")
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
@click.option("--subjects", callback=_names, help="Subjects, or stem, humanities, social_sciences, other.  [all]")
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
@click.option("--tasks", required=True, callback=_names, help="lm-eval's names: tasks, groups or tags, by commas.")
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
    from almost_eval.compare import compare_runs, render

    comparison = compare_runs(run_a, run_b, seed=seed)
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False))
    else:
        render(comparison, open_console())
    return 0


@cli.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--samples", default=16, show_default=True, type=click.IntRange(min=1), help="How many to score again.")
@options(MODEL_OPTIONS, [DATA_OPTIONS[1]])
@click.option("--seed", default=0, show_default=True, help="Chooses the samples to score again.")
def verify(run_folder: Path, samples: int, seed: int, **given: Any) -> int:
    """Recompute every metric of a run from its lines; with --model, score a sample of them again.

    \b
    Example:
      almost-eval verify runs/my-run
      almost-eval verify runs/my-run --model ./my-checkpoint --samples 32
    """
    from rich.text import Text

    from almost_eval.assets import find_data
    from almost_eval.store import read_spec
    from almost_eval.verify import rescore, verify_run

    spec = read_spec(run_folder)
    data = find_data(spec["data"]["source"], given["data_root"])
    found = verify_run(run_folder, data)
    if given["model"]:
        from almost_eval.tasks.build import build_task

        prompts = (spec["prompt_set"] or {}).get("name")

        def build(source: Any, prompting: Any) -> Any:
            return build_task(spec["task"], spec["protocol"], spec["settings"], source, prompting)

        run = _prepare(
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
    """The options that make a spec's prompts and numbers again; a dtype or attention that is given wins."""
    prompts, template, engine = spec["prompt_set"], spec["template"], spec["engine"]
    asked = template["name"] if template else "none"
    options = {
        "data": spec["data"]["source"],
        "prompt_set": prompts and ("builtin" if prompts["name"] == "builtin" else "official"),
        "template": asked if spec["template_asked"] else "auto",
        "max_length": engine["context_length"],
        "seed": spec["seed"],
    }
    return options | {key: engine[key] for key in ("dtype", "attention") if given[key] == "auto"}


@cli.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print results.json.")
def report(run_folder: Path, as_json: bool) -> int:
    """Show a finished run again.

    \b
    Example:
      almost-eval report runs/my-run
    """
    from almost_eval.store import read_results

    return _show(read_results(run_folder), run_folder, as_json)


def _evaluate(build: Command, given: dict[str, Any], *, reward: bool = False, own_prompts: bool = False) -> int:
    """Prepare, then run or show what would be run."""
    from almost_eval.progress import progress_for
    from almost_eval.validity import parse_allowed

    allowed = parse_allowed(given["allow"])
    run = _prepare(build, given, reward=reward, own_prompts=own_prompts, allowed=allowed)
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
    return _show(results, folder, given["as_json"])


def _prepare(
    build: Command,
    given: Mapping[str, Any],
    *,
    reward: bool = False,
    own_prompts: bool = False,
    allowed: Mapping[str, float] | None = None,
) -> Any:
    """Model (without weights), data, prompts, task: everything that can be refused early, in that order."""
    from almost_eval.assets import find_data
    from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, DEFAULT_REWARD_MODEL
    from almost_eval.runner import Run
    from almost_eval.tasks.base import Prompting, resolve_prompting

    name = given["model"] or (DEFAULT_REWARD_MODEL if reward else DEFAULT_MODEL)
    common = {
        key: given[key]
        for key in (
            "dtype",
            "device",
            "attention",
            "batch_size",
            "batch_tokens",
            "max_length",
            "allow_pickle",
            "trust_remote_code",
        )
    }
    data = find_data(given["data"], given["data_root"], built_in_model=name in BUILT_IN)
    import_transformers()
    if reward:
        if given["prompt_set"]:
            raise InputError("--prompt-set: a reward model reads the dialogue itself, so it takes no prompts")
        from almost_eval.rewards import HFRewardModel

        model: Any = HFRewardModel(name, template=_reward_template(given["template"]), **common)
        return Run(build(data, Prompting()), model, seed=given["seed"], allowed=allowed)
    from almost_eval.engines.hf import HFEngine

    model = HFEngine(name, share_prefixes=given["share_prefixes"], **common)
    prompting = resolve_prompting(
        data, given["prompt_set"], given["template"], model.tokenizer, own_prompts=own_prompts
    )
    return Run(build(data, prompting), model, seed=given["seed"], allowed=allowed)


def _reward_template(choice: str) -> Any:
    from almost_eval.chat import load_template

    if choice == "none":
        raise InputError("--template none: a reward model reads a conversation, so it needs a template; use auto")
    return None if choice == "auto" else load_template(choice)


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
