"""`almost-eval vicuna` and `almost-eval judge report | check`. Imports what a command needs when it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import Commands, open_console, options
from almost_eval.cli.judge_options import (
    ANSWER_OPTIONS,
    DATA_OPTIONS,
    ENGINE_OPTIONS,
    FAMILIES,
    JSON,
    JUDGE_OPTIONS,
    LOADING_OPTIONS,
    MAX_NEW_TOKENS,
    NANO_MAX_NEW_TOKENS,
    ORDERS,
    PATH,
    RUN_OPTIONS,
)
from almost_eval.errors import InputError

if TYPE_CHECKING:
    from almost_eval.data.sources import DataSource
    from almost_eval.judge.answers import System
    from almost_eval.judge.judges import Judge
    from almost_eval.judge.records import Question
    from almost_eval.judge.run import JudgeRun

STARTED = time.perf_counter()
DEFAULT_JUDGE = "gpt-4"
DEFAULT_BASELINE = "nano/vanilla-medium"


@click.command()
@options(ANSWER_OPTIONS, JUDGE_OPTIONS, DATA_OPTIONS, RUN_OPTIONS, [JSON], ENGINE_OPTIONS)
def vicuna(**given: Any) -> int:
    """Two systems answer questions, and a judge says which answer is better.

    \b
    Example:
      almost-eval vicuna                                   built-in models, questions and judge; no key
      almost-eval vicuna --model ./my-model --baseline answers.jsonl --judge gpt-4 --dry-run
      almost-eval vicuna --models ./a ./b answers-c.jsonl --judge reward:./my-reward-model
    """
    from almost_eval.progress import progress_for

    run = _prepare(given)
    if given["dry_run"]:
        return _show_plan(run.describe(given["output"]), given["as_json"])
    folder = given["output"] or run.default_folder()
    results, _ = run.execute(folder, progress_for(), started=STARTED)
    return show(results, folder, given["as_json"])


def _prepare(given: Mapping[str, Any]) -> JudgeRun:
    """Everything that can be refused, cheapest first: usage, questions, judge, answer files, models."""
    from almost_eval.cli.startup import import_transformers
    from almost_eval.judge.answers import MAX_ANSWER_CHARS, Sampling, is_answer_file, open_system
    from almost_eval.judge.run import JudgeRun
    from almost_eval.nano import BUILT_IN
    from almost_eval.run.validity import parse_allowed

    allowed = parse_allowed(given["allow"])
    names = _system_names(given)
    built_in = all(name in BUILT_IN for name in names)
    data, questions, fingerprint = _questions(given, built_in=built_in)
    judge = open_judge(given, data)
    limit = None if given["max_answer_chars"] else MAX_ANSWER_CHARS
    sampling = Sampling(
        temperature=given["temperature"],
        top_p=given["top_p"],
        max_new_tokens=given["max_new_tokens"] or (NANO_MAX_NEW_TOKENS if data.name == "nano" else MAX_NEW_TOKENS),
        seed=given["seed"],
        template=given["template"],
        stop=given["stop"],
    )
    opened: dict[int, System] = {}
    # Files first: they are read in no time, and a model may have to be downloaded.
    for at in sorted(range(len(names)), key=lambda at: not is_answer_file(names[at])):
        if not is_answer_file(names[at]):
            import_transformers()
        subset = given["limit"] is not None
        opened[at] = open_system(names[at], questions, sampling, _engine_options(given), limit=limit, subset=subset)
    return JudgeRun(
        questions,
        fingerprint,
        data.name,
        [opened[at] for at in range(len(names))],
        judge,
        orders=given["orders"],
        ties=given["ties"],
        max_answer_chars=given["max_answer_chars"],
        seed=given["seed"],
        allowed=allowed,
    )


def _system_names(given: Mapping[str, Any]) -> list[str]:
    """Baseline and model, or all of a round robin."""
    from almost_eval.nano import BUILT_IN, DEFAULT_MODEL

    single = [flag for flag in ("model", "baseline", "answers") if given[flag]]
    if given["models"]:
        if single:
            raise InputError(
                f"--models names all systems, so --{single[0]} has no place beside it; leave one of them out"
            )
        names = [given["models"], *given["more"]]
        if len(names) < 2:
            raise InputError("--models needs two systems or more: --models A B C")
        return names
    if given["more"]:
        raise InputError(
            f"unexpected argument {given['more'][0]!r}; systems are named by --model, --baseline or --models"
        )
    if given["model"] and given["answers"]:
        raise InputError("--answers are the model's answers, so --model has no place beside it; leave one of them out")
    model = str(given["answers"] or given["model"] or DEFAULT_MODEL)
    baseline = given["baseline"]
    if baseline is None:
        if model not in BUILT_IN:
            raise InputError("--baseline is missing: give a checkpoint or an answer file to compare with")
        baseline = DEFAULT_BASELINE
    return [str(baseline), model]


def _questions(given: Mapping[str, Any], *, built_in: bool) -> tuple[DataSource, list[Question], str]:
    from almost_eval.data.sources import find_data
    from almost_eval.judge.questions import find_questions

    name = given["data"]
    if name is None and given["judge"] == "nano" and not given["data_root"]:
        name = "nano"
    data = find_data(name, given["data_root"], built_in_model=built_in and not given["questions"])
    questions, fingerprint = find_questions(given["questions"], data, limit=given["limit"])
    return data, questions, fingerprint


def open_judge(given: Mapping[str, Any], data: DataSource) -> Judge:
    """The judge that `--judge` names, without weights and without a request.

    Raises:
        InputError: an option that this judge does not take; whatever the judge refuses.
    """
    name = given["judge"] or ("nano" if data.name == "nano" else DEFAULT_JUDGE)
    local = name == "nano" or name.startswith("reward:")
    if local:
        flags = ("judge_base_url", "judge_prompt", "prompt_set", "max_cost", "price_in", "price_out")
        if unused := next((flag for flag in flags if given[flag] is not None), None):
            raise InputError(
                f"--{unused.replace('_', '-')} belongs to a judge behind an API, not to {name}; leave it out"
            )
    if name == "nano":
        from almost_eval.judge.local import NanoJudge

        return NanoJudge()
    if local:
        from almost_eval.cli.startup import import_transformers
        from almost_eval.judge.local import RewardJudge
        from almost_eval.rewards.hf import HFRewardModel

        import_transformers()
        taken = {key: given[key] for key in ("dtype", "device", "attention", "allow_pickle", "trust_remote_code")}
        return RewardJudge(HFRewardModel(name.removeprefix("reward:"), **taken), name)
    from almost_eval.judge.judges import Connection, ModelJudge
    from almost_eval.judge.prompts import load_judge_prompts

    prompts = load_judge_prompts(given["prompt_family"], given["prompt_set"], data, file=given["judge_prompt"])
    connection = Connection(
        base_url=given["judge_base_url"],
        **{key: given[key] for key in ("timeout", "concurrency", "max_cost", "price_in", "price_out")},
    )
    return ModelJudge(name, prompts, connection, reask=given.get("reask", False), dry=given.get("dry_run", False))


def _engine_options(given: Mapping[str, Any]) -> Any:
    from almost_eval.engines.build import EngineOptions

    names = [option.name for option in _params(ENGINE_OPTIONS)]
    return EngineOptions(**{name: given[name] for name in names if name})


def _params(group: list[Callable[..., Any]]) -> list[click.Parameter]:
    """The parameters that these decorators add."""

    def bare() -> None: ...

    for option in group:
        bare = option(bare)
    return list(getattr(bare, "__click_params__", []))


def _show_plan(facts: Mapping[str, Any], as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        from almost_eval.report.console import print_preflight

        print_preflight(facts, open_console())
    return 0


def show(results: Mapping[str, Any], folder: Path | None, as_json: bool) -> int:
    """Print results, and say whether the headline stands."""
    if as_json:
        click.echo(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        from almost_eval.report.console import print_results

        print_results(results, open_console(), folder=str(folder) if folder else None)
    return 0 if results["validity"]["passed"] else 3


@click.group(cls=Commands)
def judge() -> None:
    """Reviews again, without a call; and whether a judge is any good."""


@judge.command("report")
@click.argument("run_folder", type=PATH, required=False)
@click.option(
    "--archive", multiple=True, type=PATH, help="Archived reviews: a folder with answer/ and review/, or files."
)
@click.option("--ties", type=click.Choice(["half", "drop"]), help="A tie is half a win, or none.  [as the run]")
@ORDERS
@click.option("--prompt-family", type=click.Choice(FAMILIES), help="Read the stored reviews by this family's parser.")
@options(DATA_OPTIONS)
@JSON
def judge_report(run_folder: Path | None, archive: tuple[Path, ...], as_json: bool, **given: Any) -> int:
    """Aggregate stored or archived reviews anew. Asks nobody.

    \b
    Example:
      almost-eval judge report runs/my-run --ties drop --orders forward
      almost-eval judge report --archive vicuna-archive --data-root ./hub
    """
    if (run_folder is None) == (not archive):
        raise InputError("give the folder of a run, or --archive with a folder of archived reviews")
    if run_folder is not None:
        from almost_eval.judge.results import redraw

        results = redraw(run_folder, ties=given["ties"], orders=given["orders"], family=given["prompt_family"])
        return show(results, run_folder, as_json)
    from almost_eval.judge.archive import aggregate_archives, find_archives
    from almost_eval.judge.prompts import load_judge_prompts
    from almost_eval.report.judge_console import print_archives

    data, questions, _ = _questions(given | {"judge": None}, built_in=False)
    prompts = load_judge_prompts(given["prompt_family"] or "vicuna", "builtin", data)
    rows = aggregate_archives(
        find_archives(archive, questions), prompts, ties=given["ties"] or "half", orders=given["orders"]
    )
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        print_archives(rows, open_console())
    return 0


@judge.command("check")
@click.option("--archive", multiple=True, required=True, type=PATH, help="A folder with answer/ and review/, or files.")
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(min=1), help="Times each pair is asked.")
@click.option("--output", type=PATH, help="Folder of the replies and results; the default is named by the judge.")
@options(JUDGE_OPTIONS, DATA_OPTIONS)
@ORDERS
@click.option("--seed", default=0, show_default=True, help="Chooses the pairs of --limit, and of the bootstrap.")
@click.option("--dry-run", is_flag=True, help="Show requests, tokens and price; send nothing, load no weights.")
@JSON
@options(LOADING_OPTIONS)
def judge_check(archive: tuple[Path, ...], **given: Any) -> int:
    """Is the judge any good? It reviews archived pairs, and is compared with the archived verdicts.

    \b
    Example:
      almost-eval judge check --judge gpt-4o-mini --archive vicuna-archive --limit 20 --repeats 2 --dry-run
      almost-eval judge check --judge reward:./my-reward-model --archive vicuna-archive
    """
    from almost_eval.judge.archive import find_archives
    from almost_eval.judge.check import JudgeCheck
    from almost_eval.judge.prompts import load_judge_prompts
    from almost_eval.progress import progress_for

    if given["judge"] is None:
        raise InputError("--judge is missing: name a model of the API (gpt-4), or reward:CKPT")
    data, questions, fingerprint = _questions(given | {"limit": None}, built_in=False)
    archives = find_archives(archive, questions)
    judge = open_judge(given, data)
    reader = load_judge_prompts("vicuna", "builtin", data)
    check = JudgeCheck(
        archives,
        reader,
        judge,
        fingerprint,
        orders=given["orders"],
        limit=given["limit"],
        repeats=given["repeats"],
        seed=given["seed"],
    )
    if given["dry_run"]:
        return _show_plan(check.describe(given["output"]), given["as_json"])
    folder = given["output"] or check.default_folder()
    results = check.execute(folder, progress_for())
    return show(results, folder, given["as_json"])
