"""The options of `vicuna` and of the judge's commands, and the questions and judges that they name.

Imported with the command line, so nothing heavy here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import SEED, FiniteRange, import_transformers
from almost_eval.cli.options import DATA_ROOT, ENGINE_FIELDS, GENERATION_FIELDS, TEMPLATE, engine_flag, joined
from almost_eval.errors import InputError
from almost_eval.judge.build import MAX_NEW_TOKENS, NANO_JUDGE, NANO_MAX_NEW_TOKENS, JudgeOptions, open_judges
from almost_eval.judge.families import DEFAULT_FAMILY, FAMILIES, FAMILY_OF_TURNS
from almost_eval.judge.modes import MODES

if TYPE_CHECKING:
    from almost_eval.data.sources import DataSource
    from almost_eval.judge.judges import Judge
    from almost_eval.judge.records import Question

Flags = Mapping[str, Any]
"""Name of a parameter -> its value, as click gives them."""
PATH = click.Path(path_type=Path)
FAMILY = click.Choice(list(FAMILIES))
BY_CATEGORY = "by-category"
"""A temperature of its own for each category of questions."""


class AnswerTemperature(click.ParamType):
    """A number from 0, or `by-category`."""

    name = "NUMBER|by-category"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """See `click.ParamType.convert`."""
        if value == BY_CATEGORY:
            return BY_CATEGORY
        number: float = FiniteRange(min=0).convert(value, param, ctx)
        return number


def _choice(context: click.Context, option: click.Parameter, value: str) -> int | None:
    """A number from 1; None is all."""
    if value == "all":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise InputError(f"--choice is {value!r}; give a number from 1, or all")
    return int(value)


_JUDGE = "A model of the API (gpt-6.1-terra), nano (the nano world's oracle) or reward:CKPT"
_ASKED = [
    click.option("--judge-prompt", type=PATH, help="A prompt file, instead of a prompt set."),
    click.option(
        "--prompt-family",
        type=FAMILY,
        help=f"Scores, letters, or marks of one answer.  [{DEFAULT_FAMILY}; several turns: {FAMILY_OF_TURNS}]",
    ),
    click.option(
        "--verdict",
        type=click.Choice(list(MODES)),
        help="As text, one JSON object, or the probabilities of a letter (--prompt-family mt-bench).  [text]",
    ),
    click.option("--prompt-set", help="official (the default on real data) or builtin (our own wording)."),
    click.option(
        "--concurrency", default=32, show_default=True, type=click.IntRange(min=1), help="Requests at a time."
    ),
    click.option("--timeout", default=120.0, show_default=True, help="Seconds that one review may take."),
    click.option("--max-cost", type=FiniteRange(min=0), help="USD that all reviews may cost, at most."),
    click.option("--price-in", type=FiniteRange(min=0), help="USD per million prompt tokens, instead of the table's."),
    click.option("--price-out", type=FiniteRange(min=0), help="USD per million completion tokens."),
    click.option(
        "--price-cached", type=FiniteRange(min=0), help="USD per million prompt tokens from a cache.  [--price-in]"
    ),
    click.option(
        "--price-reasoning", type=FiniteRange(min=0), help="USD per million tokens of thinking.  [--price-out]"
    ),
    click.option(
        "--price-batch",
        type=FiniteRange(min=0),
        help="Share of the price that a batch costs: 0.5.  [the table's; else 1]",
    ),
    click.option("--batch", is_flag=True, help="By the provider's batch API: cheaper, and a day at most."),
    click.option("--batch-wait", type=FiniteRange(min=0), help="Seconds to wait for batches.  [until they end]"),
    click.option(
        "--max-tokens", type=click.IntRange(min=1), help="Tokens of a review, thinking included.  [the prompt's]"
    ),
    click.option("--judge-temperature", type=FiniteRange(0, 2), help="Of the reviews.  [the prompt's]"),
    click.option("--reasoning-effort", help="How much the judge thinks: low, medium, high, or its own words."),
    click.option("--judge-options", metavar="JSON", help="More fields of each request: '{\"top_p\": 0.9}'."),
]
_REACHED = [
    click.option(
        "--judge-base-url",
        multiple=True,
        callback=joined,
        help="Any OpenAI-compatible endpoint, up to and with /v1; several share the reviews.",
    ),
    *_ASKED,
]
JUDGE_OPTIONS = [click.option("--judge", help=f"{_JUDGE}."), *_REACHED]
"""Of one judge."""
PANEL_OPTIONS = [
    click.option("--judge", "judges", multiple=True, help=f"{_JUDGE}; several are a panel."),
    click.option(
        "--judge-at", multiple=True, metavar="JUDGE=URL", help="Endpoint of one judge of a panel, or several by commas."
    ),
    click.option(
        "--judge-price", multiple=True, metavar="JUDGE=IN,OUT", help="USD per million tokens of one judge of a panel."
    ),
    click.option(
        "--judge-family", multiple=True, metavar="JUDGE=NAME", help="A judge's maker: marks its self-preference."
    ),
    click.option("--system-family", multiple=True, metavar="SYSTEM=NAME", help="A system's maker, by the same names."),
    *_REACHED,
]
"""Of one judge or several."""
CHECK_OPTIONS = [
    click.option("--judge", multiple=True, help="The judge in question; given again, the one that it is to replace."),
    click.option(
        "--judge-base-url",
        multiple=True,
        help="OpenAI-compatible endpoint, up to and with /v1; several share the reviews. With two judges: of both, or "
        "one for each, or several by commas.",
    ),
    *_ASKED,
]
"""Of a judge and, perhaps, the one it is to replace."""
ARCHIVE = click.option(
    "--archive", multiple=True, type=PATH, help="Archived reviews: a folder with answer/ and review/, or files."
)
DATA_OPTIONS = [
    click.option("--data", help="Data: hub (the real questions) or nano (built in; the default for built-in models)."),
    DATA_ROOT,
    click.option(
        "--questions", type=PATH, help="mt-bench, or a question file (Vicuna's, MT-Bench's or AlpacaEval's shape)."
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Questions, the first so many."),
]
TURN_OPTIONS = [
    click.option("--turns", type=click.IntRange(min=1), help="Turns of each question, the first so many.  [all]"),
    click.option(
        "--reference",
        help="Reference answers: published or corrected (FastChat's for MT-Bench), or a file of answers.  "
        "[mt-bench: published; a question file: its own]",
    ),
]
JUDGES_OWN = ("concurrency", "timeout")
"""Options of an engine that are the judge's here, not those of the engine that writes the answers."""
_HELP = {
    "engine": "hf, vllm or openai, which write the answers.  [hf]",
    "base_url": "openai: the endpoint that answers, up to and with /v1.",
}
ENGINE_OPTIONS = [
    engine_flag(option, _HELP.get(name, "")) for name, option in GENERATION_FIELDS.items() if name not in JUDGES_OWN
]
"""Of the engine that writes the answers."""
LOADING_OPTIONS = [
    engine_flag(ENGINE_FIELDS[option.name])
    for option in fields(JudgeOptions)
    if option.name in ENGINE_FIELDS and option.name not in JUDGES_OWN
]
"""How a reward model is loaded."""
ANSWER_OPTIONS = [
    click.option("--model", help="Checkpoint directory, hub id or built-in name; or an answer file."),
    click.option("--baseline", help="What it is compared with: the same kinds."),
    click.option("--answers", type=PATH, help="The model's answers, as FastChat writes them, instead of --model."),
    click.option("--models", metavar="A B C ...", help="Each against each, instead of --model and --baseline."),
    click.argument("more", nargs=-1, metavar=""),
    click.option(
        "--temperature",
        type=AnswerTemperature(),
        help="Of the answers: a number, or by-category as FastChat has it.  [0.7; mt-bench: by-category]",
    ),
    click.option("--top-p", default=1.0, show_default=True, type=FiniteRange(0, 1, min_open=True), help="Nucleus."),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        help=f"Tokens of an answer.  [{MAX_NEW_TOKENS}; nano data: {NANO_MAX_NEW_TOKENS}]",
    ),
    click.option("--stop", multiple=True, help="A string that ends an answer, besides the template's own."),
    TEMPLATE,
    click.option(
        "--answer-reasoning",
        "--reasoning",
        "reasoning",
        type=click.Choice(["strip", "keep", "refuse"]),
        default="strip",
        show_default=True,
        help="Thinking in an answer: judged without it, judged with it, or refused.",
    ),
    click.option(
        "--choice",
        metavar="N|all",
        default="1",
        show_default=True,
        callback=_choice,
        help="Which answer, where a file holds several to a question; all judges each of them.",
    ),
    click.option("--max-answer-chars", type=click.IntRange(min=1), help="Cut longer answers, and count them."),
]
TIES = click.option(
    "--ties",
    type=click.Choice(["half", "drop"]),
    default="half",
    show_default=True,
    help="A tie is half a win, or none.",
)
ORDERS = click.option(
    "--orders",
    type=click.Choice(["both", "forward", "reverse"]),
    default="both",
    show_default=True,
    help="forward: the baseline is Assistant 1.",
)
REASK = click.option("--reask", is_flag=True, help="Ask once more for a review that cannot be read.")
RUN_OPTIONS = [
    click.option(
        "--judging",
        type=click.Choice(["pairwise", "single"]),
        default="pairwise",
        show_default=True,
        help="Two answers compared, or each graded from 1 to 10 by itself.",
    ),
    ORDERS,
    TIES,
    REASK,
    click.option("--output", type=PATH, help="Run folder; the default is named by the run."),
    click.option("--seed", default=0, show_default=True, type=SEED, help="Of the answers."),
    click.option("--allow", multiple=True, metavar="CHECK=SHARE", help="Share of reviews a validity check may flag."),
    click.option("--dry-run", is_flag=True, help="Show requests, tokens and price; send nothing, load no weights."),
]
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")


# --- what they name


def find_data_of(flags: Flags, *, built_in: bool = False) -> DataSource:
    """The data that the flags name; without a name the nano world's, where its oracle or built-in models say so."""
    from almost_eval.data.sources import find_data

    is_nano = NANO_JUDGE in flags["judges"] and not flags["data_root"]
    name = "nano" if flags["data"] is None and is_nano else flags["data"]
    return find_data(name, flags["data_root"], built_in_model=built_in and not flags["questions"])


def find_questions_of(flags: Flags, *, built_in: bool = False) -> tuple[DataSource, list[Question], str]:
    """Data, questions, and the digest of these."""
    from almost_eval.judge.questions import find_questions

    data = find_data_of(flags, built_in=built_in)
    asked = {name: flags.get(name) for name in ("limit", "turns", "reference")}
    return data, *find_questions(flags["questions"], data, **asked)


def open_judges_of(flags: Flags, data: DataSource, *, several_turns: bool = False) -> Judge:
    """The judge, or the panel, that the flags name; see `open_judges`."""
    options = JudgeOptions(**{field.name: flags[field.name] for field in fields(JudgeOptions) if field.name in flags})
    if any(JudgeOptions(judge=name).is_reward_model for name in flags["judges"]):
        import_transformers()
    endpoints, prices = named(flags, "judge_at"), named(flags, "judge_price")
    return open_judges(flags["judges"], options, data, endpoints=endpoints, prices=prices, several_turns=several_turns)


def named(flags: Flags, name: str) -> dict[str, str]:
    """NAME=VALUE of a flag that may be given several times; empty for a command without it."""
    pairs: dict[str, str] = {}
    for text in flags.get(name, ()):
        key, sign, value = text.partition("=")
        if not (key and sign and value):
            raise InputError(f"--{name.replace('_', '-')} {text!r} is not NAME=VALUE; write the name, =, and the value")
        if pairs.setdefault(key, value) != value:
            raise InputError(f"--{name.replace('_', '-')} names {key} twice, with {pairs[key]} and {value}; keep one")
    return pairs
