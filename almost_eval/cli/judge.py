"""`almost-eval vicuna` and `almost-eval judge report | check`. Imports what a command needs when it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import SEED, Commands, import_transformers, open_console, options, print_json
from almost_eval.cli.judge_options import (
    ANSWER_OPTIONS,
    ARCHIVE,
    BY_CATEGORY,
    CHECK_OPTIONS,
    DATA_OPTIONS,
    ENGINE_OPTIONS,
    FAMILY,
    JSON,
    JUDGES_OWN,
    LOADING_OPTIONS,
    ORDERS,
    PANEL_OPTIONS,
    PATH,
    RUN_OPTIONS,
    TURN_OPTIONS,
    Flags,
    find_questions_of,
    named,
    open_judges_of,
)
from almost_eval.cli.options import SHARD, engine_options, show_plan, show_results, show_shard
from almost_eval.errors import InputError
from almost_eval.judge.build import DEFAULT_BASELINE, answer_budget
from almost_eval.judge.families import DEFAULT_FAMILY
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from almost_eval.judge.answers import System
    from almost_eval.judge.run import JudgeRun

STARTED = time.perf_counter()


@click.command()
@options(ANSWER_OPTIONS, PANEL_OPTIONS, DATA_OPTIONS, TURN_OPTIONS, RUN_OPTIONS, [SHARD, JSON], ENGINE_OPTIONS)
def vicuna(**flags: Any) -> int:
    """Two systems answer questions, and a judge says which answer is better.

    With --judging single it grades each answer by itself, from 1 to 10; then one system is enough.

    \b
    Example:
      almost-eval vicuna                                   built-in models, questions and judge; no key
      almost-eval vicuna --model ./my-model --baseline answers.jsonl --judge gpt-6.1-terra --dry-run
      almost-eval vicuna --models ./a ./b answers-c.jsonl --judge reward:./my-reward-model
      almost-eval vicuna --questions mt-bench --judging single --model ./my-model --judge gpt-6.1-terra
      almost-eval vicuna --answers a.jsonl --baseline b.jsonl --judge gpt-6.1-terra --judge reward:./my-reward-model

    With --shard K/N the models answer a part of the questions; almost-eval merge joins them, and the same command
    without it then asks the judge.
    """
    from almost_eval.progress import progress_for

    run, shard = _prepare(flags), flags["shard"]
    if shard:
        from almost_eval.judge.shards import describe_shard, write_shard
    if flags["dry_run"]:
        more = describe_shard(run, shard) if shard else {}
        return show_plan(run.describe(flags["output"]) | more, as_json=flags["as_json"])
    folder = flags["output"] or run.default_folder()
    if shard:
        return show_shard(write_shard(run, folder, shard, progress_for()), as_json=flags["as_json"])
    results, _ = run.execute(folder, progress_for(), started=STARTED)
    return show_results(results, folder, as_json=flags["as_json"])


def _prepare(flags: Flags) -> JudgeRun:
    """Everything that can be refused, cheapest first: usage, questions, judge, answer files, models."""
    from almost_eval.judge.answers import MAX_ANSWER_CHARS, is_answer_file, open_system
    from almost_eval.judge.model_system import Sampling
    from almost_eval.judge.panel import Families
    from almost_eval.judge.questions import names_of
    from almost_eval.judge.run import JudgeRun
    from almost_eval.nano import BUILT_IN
    from almost_eval.run.validity import parse_allowed

    allowed = parse_allowed(flags["allow"])
    names = _system_names(flags)
    built_in = all(name in BUILT_IN for name in names)
    data, questions, fingerprint = find_questions_of(flags, built_in=built_in)
    families = Families(named(flags, "judge_family"), named(flags, "system_family"))
    judge = open_judges_of(flags, data, several_turns=any(question.later for question in questions))
    limit = None if flags["max_answer_chars"] else MAX_ANSWER_CHARS
    sampling = Sampling(
        **_temperatures(flags),
        top_p=flags["top_p"],
        max_new_tokens=flags["max_new_tokens"] or answer_budget(data.name),
        seed=flags["seed"],
        template=flags["template"],
        stop=flags["stop"],
        reasoning=flags["reasoning"],
    )
    engine = engine_options({name: value for name, value in flags.items() if name not in JUDGES_OWN})
    opened: dict[int, System] = {}
    # Files first: they are read in no time, and a model may have to be downloaded.
    for at in sorted(range(len(names)), key=lambda at: not is_answer_file(names[at])):
        if not is_answer_file(names[at]):
            import_transformers()
        subset = flags["limit"] is not None
        opened[at] = open_system(
            names[at],
            questions,
            sampling,
            engine,
            limit=limit,
            subset=subset,
            reasoning=flags["reasoning"],
            choice=flags["choice"],
        )
    return JudgeRun(
        questions,
        fingerprint,
        data.name,
        [opened[at] for at in range(len(names))],
        judge,
        orders=flags["orders"],
        ties=flags["ties"],
        max_answer_chars=flags["max_answer_chars"],
        answer_reasoning=flags["reasoning"],
        choice="all" if flags["choice"] is None else None,
        judging=flags["judging"],
        questions_named=names_of(flags["questions"], flags["reference"]),
        seed=flags["seed"],
        allowed=allowed,
        families=families,
    )


def _temperatures(flags: Flags) -> dict[str, Any]:
    """The fields of `Sampling` that `--temperature` states."""
    from almost_eval.judge.fastchat import TEMPERATURES
    from almost_eval.judge.questions import is_mt_bench

    stated = flags["temperature"]
    if stated == BY_CATEGORY or (stated is None and is_mt_bench(flags["questions"])):
        return {"temperatures": TEMPERATURES}
    return {} if stated is None else {"temperature": stated}


def _system_names(flags: Flags) -> list[str]:
    """Baseline and model, or all of a round robin; without a baseline the model alone, where answers are graded."""
    from almost_eval.nano import BUILT_IN, DEFAULT_MODEL

    single = [flag for flag in ("model", "baseline", "answers") if flags[flag]]
    if flags["models"]:
        if single:
            raise InputError(
                f"--models names all systems, so --{single[0]} has no place beside it; leave one of them out"
            )
        names = [flags["models"], *flags["more"]]
        if len(names) < 2 and flags["judging"] == "pairwise":
            raise InputError("--models needs two systems or more: --models A B C")
        return names
    if flags["more"]:
        raise InputError(
            f"unexpected argument {flags['more'][0]!r}; systems are named by --model, --baseline or --models"
        )
    if flags["model"] and flags["answers"]:
        raise InputError("--answers are the model's answers, so --model has no place beside it; leave one of them out")
    model = str(flags["answers"] or flags["model"] or DEFAULT_MODEL)
    baseline = flags["baseline"]
    if baseline is None:
        if flags["judging"] == "single":
            return [model]
        if model not in BUILT_IN:
            raise InputError("--baseline is missing: give a checkpoint or an answer file to compare with")
        baseline = DEFAULT_BASELINE
    return [str(baseline), model]


@click.group(cls=Commands)
def judge() -> None:
    """Reviews again, without a call; and whether a judge is any good."""


@judge.command("report")
@click.argument("run_folder", type=PATH, required=False)
@ARCHIVE
@click.option("--ties", type=click.Choice(["half", "drop"]), help="A tie is half a win, or none.  [as the run]")
@ORDERS
@click.option("--prompt-family", type=FAMILY, help="Read the stored reviews by this family's parser.")
@click.option(
    "--votes",
    type=PATH,
    help="Votes of people on pairs of the run: corrects the win rate by them (arena file or export).",
)
@click.option("--keep", is_flag=True, help="Keep what --votes say in the run folder: the run's page then shows it.")
@options(DATA_OPTIONS)
@JSON
def judge_report(
    run_folder: Path | None, archive: tuple[Path, ...], votes: Path | None, as_json: bool, **flags: Any
) -> int:
    """Aggregate stored or archived reviews anew. Asks nobody.

    \b
    Example:
      almost-eval judge report runs/my-run --ties drop --orders forward
      almost-eval judge report runs/my-run --votes runs/arena.db
      almost-eval judge report --archive vicuna-archive --data-root ./hub
    """
    if (run_folder is None) == (not archive):
        raise InputError("give the folder of a run, or --archive with a folder of archived reviews")
    if run_folder is not None:
        return show_results(_redrawn(run_folder, votes, flags), run_folder, as_json=as_json)
    if votes is not None:
        raise InputError("--votes are votes on the pairs of a run; give the folder of a run, not --archive")
    from almost_eval.judge.cases import aggregate_archives, find_archives
    from almost_eval.judge.prompts import load_judge_prompts
    from almost_eval.report.judge_console import print_archives

    data, questions, _ = find_questions_of(flags | {"judges": ()})
    prompts = load_judge_prompts(flags["prompt_family"] or DEFAULT_FAMILY, "builtin", data)
    if prompts.n_answers != 2:
        raise InputError(f"--prompt-family {prompts.name} is about one answer, archived reviews are about two")
    rows = aggregate_archives(
        find_archives(archive, questions), prompts, ties=flags["ties"] or "half", orders=flags["orders"]
    )
    if as_json:
        print_json(rows)
    else:
        print_archives(rows, open_console())
    return 0


def _redrawn(folder: Path, votes: Path | None, flags: Flags) -> JSONObject:
    """The results of a run with these flags, corrected by votes where there are some."""
    if votes is None:
        if flags["keep"]:
            raise InputError("--keep keeps what --votes say; give them too")
        from almost_eval.judge.results import redraw

        return redraw(folder, ties=flags["ties"], orders=flags["orders"], family=flags["prompt_family"])
    from almost_eval.arena.correction import corrected, keep
    from almost_eval.arena.votes import read_votes

    results = corrected(
        folder, read_votes(votes), ties=flags["ties"], orders=flags["orders"], family=flags["prompt_family"]
    )
    if flags["keep"]:
        keep(folder, results)
    return results


@judge.command("check")
@ARCHIVE
@click.option("--archive-judge", default="GPT-4", show_default=True, help="Whose the archived reviews are.")
@click.option("--votes", type=PATH, help="Votes of people: an arena's file or export, hh-rlhf's pairs, MT-Bench's.")
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(min=1), help="Times each pair is asked.")
@click.option("--output", type=PATH, help="Folder of the replies and results; the default is named by the judge.")
@options(CHECK_OPTIONS, DATA_OPTIONS)
@ORDERS
@click.option(
    "--seed", default=0, show_default=True, type=SEED, help="Chooses the pairs of --limit, and of the bootstrap."
)
@click.option("--dry-run", is_flag=True, help="Show requests, tokens and price; send nothing, load no weights.")
@JSON
@options(LOADING_OPTIONS)
def judge_check(archive: tuple[Path, ...], as_json: bool, **flags: Any) -> int:
    """May this judge take another's place? It reviews archived pairs, and pairs that people voted on.

    \b
    Example:
      almost-eval judge check --judge gpt-6-luna --archive vicuna-archive --limit 20 --repeats 2 --dry-run
      almost-eval judge check --judge gpt-6-luna --judge gpt-6.1-terra --archive vicuna-archive --max-cost 2
      almost-eval judge check --judge reward:./my-reward-model --votes hh-rlhf/test.jsonl.gz
    """
    from almost_eval.cli.judge_check import check_judges

    return check_judges(archive, flags, as_json)
