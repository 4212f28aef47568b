"""What a judge is shown: the prompts of a family, filled with a question and two answers.

The families are in `families/`. Each comes as `official`, the words of its authors read at run time (see
`fastchat.py`), or `builtin`, our own wording in `families/*.yaml`. `--judge-prompt FILE` is another one in the format
of those files:

    kind: scores                # letters, or rating; says how the review is read (see verdicts.py)
    temperature: 0.2            # optional
    max_tokens: 1024            # optional, of the review
    prompts:
      general:                  # required; used for every category that has no prompt of its own
        system: ...             # optional
        user: ...               # holds {question}, {answer_1} and {answer_2} ({answer} for a rating); may hold {fence}
      coding: ...               # optional, by category of the question
      reference: ...            # optional, holds {reference} too: math, reasoning and coding questions that have one
      general-turns: ...        # optional: the same, for the second turn of a question and those after it
      coding-turns: ...
      reference-turns: ...

In a prompt for later turns, what stands between {turns} and {/turns} is written once for each turn up to the judged
one, its places filled with the texts of that turn. Elsewhere a place has the text of the judged turn; {nth} is which it
is: second, third. A reference prompt needs a reference for every turn that it shows: without one the general is used.

Nothing in an answer can end its place in the frame. Where a prompt has a {fence}, that is a code which occurs in no
text of the case. The official prompts have fixed markers ("[The End of Assistant 1's Answer]", "### User:"): an answer
that holds one has it turned into "[quoted: The End of Assistant 1's Answer]". Any other answer goes in byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from almost_eval.data.prompt_sets import PROMPT_SET_NAMES
from almost_eval.data.sources import DataSource
from almost_eval.errors import DataError, InputError, did_you_mean
from almost_eval.judge.brackets import parse_letters, parse_rating
from almost_eval.judge.families import FAMILIES
from almost_eval.judge.fastchat import wrong_turns
from almost_eval.judge.frames import filled, shown_turns, texts_in
from almost_eval.judge.modes import Mode, closing_of
from almost_eval.judge.plain_text import without_thoughts
from almost_eval.judge.probabilities import parse_probabilities
from almost_eval.judge.records import Subject, TokenAlternatives, Unparsed, Verdict
from almost_eval.judge.structured import RESPONSE_FORMAT, parse_embedded, parse_object
from almost_eval.judge.verdicts import parse_scores
from almost_eval.run import provenance
from almost_eval.types import Message

PromptSetName = Literal["official", "builtin", "file"]


class ReviewForm(NamedTuple):
    """A form that reviews have."""

    parse: Callable[[str, str], Verdict | Unparsed]
    """(review, what it may have quoted) -> what it says."""
    temperature: float
    """Of a judge that writes this form, where its prompts name none. FastChat's own, as the next."""
    max_tokens: int
    """Of a review."""
    n_answers: int = 2
    """That a review is about: a pair, or one answer by itself."""


FORMS = {
    "scores": ReviewForm(parse_scores, 0.2, 1024),
    "letters": ReviewForm(parse_letters, 0.0, 2048),
    "rating": ReviewForm(parse_rating, 0.0, 2048, n_answers=1),
}
"""`kind` of a prompt file -> the form of its reviews."""

REFERENCE = "reference"
GENERAL = "general"
TURNS = "-turns"
"""End of the name of a prompt for the second turn and those after it."""
REFERENCE_CATEGORIES = frozenset({"math", "reasoning", "coding", "arena-hard-200"})
"""Questions that are judged against a reference answer, if there is one: FastChat's list."""

_VERDICT_WORDS = frozenset(
    "assistant answer score scores rating ratings verdict output result final overall the my is are and to out of a b c"
    " vs for".split()
)
"""Words of a first line that is the verdict. A sentence of a thought has others."""

_REQUIRED = {1: ("question", "answer"), 2: ("question", "answer_1", "answer_2")}
"""Number of answers in a prompt -> places that it must have."""


class PromptTemplate(NamedTuple):
    """The two messages of a request, with places to fill."""

    system: str
    user: str


class Wording(NamedTuple):
    """The words of a family."""

    templates: Mapping[str, PromptTemplate]
    """By category of the question; `general` for the rest, `reference` where there is a reference answer. Those that
    end in `-turns` are for later turns."""
    temperature: float | None = None
    """None: that of the family's form; so the next."""
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PromptFamily:
    """What a family states of itself."""

    title: str
    """What its reviews look like, for `list`."""
    form: str
    """A key of `FORMS`: how its reviews are read."""
    builtin: Path
    """Our own wording, in the format that this module's head describes."""
    official: Callable[[DataSource], Wording]
    """Reads the authors' wording. Raises DataError where it cannot be had, or is not the pinned one."""


def load_family(name: str) -> PromptFamily:
    """A family of `FAMILIES`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in FAMILIES:
        raise InputError(f"unknown prompt family {name!r}; {did_you_mean(name, FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    family = getattr(import_module(module), attribute)
    assert isinstance(family, PromptFamily)
    return family


@dataclass(frozen=True, slots=True)
class JudgePrompts:
    """One prompt family, ready to use."""

    name: str
    """The family, or the name of the file."""
    prompt_set: PromptSetName
    kind: str
    """A key of `FORMS`."""
    temperature: float
    max_tokens: int
    """Of the review."""
    templates: Mapping[str, PromptTemplate]
    """See `Wording`."""
    verdict: Mode = "text"
    """How a verdict is told; what is not text has an end of its own under the prompt."""

    @property
    def digest(self) -> str:
        """sha256 over everything that decides a request and how its reply is read."""
        templates = {category: list(template) for category, template in self.templates.items()}
        decisive = {
            "kind": self.kind,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "prompts": templates,
        }
        if (closing := closing_of(self.verdict, self.kind)) is not None:
            decisive |= {"verdict": self.verdict, "closing": closing}
        return provenance.digest(decisive)

    @property
    def for_later_turns(self) -> bool:
        """Whether there are words for the second turn of a question and those after it."""
        return GENERAL + TURNS in self.templates

    @property
    def n_answers(self) -> int:
        """That a prompt shows: two to compare, or one to grade."""
        return FORMS[self.kind].n_answers

    def messages(self, case: Subject) -> tuple[Message, ...]:
        """The request for one case: the system message, if there is one, and the user's."""
        template = self.templates[self._named(case)]
        texts = texts_in(template.user, case)
        system, user = (filled(part, texts.by_turn) for part in template)
        if (closing := closing_of(self.verdict, self.kind)) is not None:
            user = f"{user.rstrip()}\n\n{closing}"
        return (*((Message("system", system),) if system else ()), Message("user", user))

    def neutralised(self, case: Subject) -> int:
        """How many frame markers in the texts of a case were turned into quotations."""
        return texts_in(self.templates[self._named(case)].user, case).n_quoted

    def wrong_references(self, case: Subject) -> list[int]:
        """Turns whose reference answer is shown and known to be wrong."""
        if not self._named(case).startswith(REFERENCE):
            return []
        return wrong_turns(case.question, shown_turns(self.templates[self._named(case)].user, case))

    def parse(
        self,
        review: str,
        case: Subject,
        finish_reason: str = "stop",
        parameters: Mapping[str, object] | None = None,
        logprobs: Sequence[TokenAlternatives] | None = None,
    ) -> Verdict | Unparsed:
        """What a review of this case says; see `parse_review`."""
        return parse_review(self.kind, review, case, finish_reason, self.verdict, parameters, logprobs)

    def _named(self, case: Subject) -> str:
        """The name of the prompt for a case."""
        category, end = case.question.category, TURNS if case.turn > 1 else ""
        # What a prompt shows of references must be whole.
        is_whole = category in REFERENCE_CATEGORIES and all(case.question.references[: case.turn])
        if REFERENCE + end in self.templates and is_whole:
            return REFERENCE + end
        own = category + end
        return own if own in self.templates and category != REFERENCE else GENERAL + end


def parse_review(
    form: str,
    review: str,
    case: Subject,
    finish_reason: str = "stop",
    mode: Mode = "text",
    parameters: Mapping[str, object] | None = None,
    logprobs: Sequence[TokenAlternatives] | None = None,
) -> Verdict | Unparsed:
    """What a review of a case says.

    Nothing that it quotes from the question or the answers is a verdict, and nothing that it thought before its answer:
    a judge tries out verdicts while it thinks.

    Args:
        form: a key of `FORMS`.
        review: what the judge wrote, its thoughts too.
        case: what it is about.
        finish_reason: as the provider says. A review that was cut (`length`) and shows no end of a thought may be a
            thought from its first word on, where the template has opened it. Then a verdict counts only where a thought
            does not stand: alone in the first line. No number counts that another digit could have followed.
        mode: how the verdict was to be told.
        parameters: what the review came about with: whether the endpoint held it to JSON.
        logprobs: of its last tokens.
    """
    spoken = without_thoughts(review)
    if isinstance(spoken, Unparsed):
        return spoken
    shown = (case.question.turns, *(answer.turns for answer in case.answers))
    material = "\n".join(turns[at] for at in range(case.turn) for turns in shown)  # what it may quote
    if mode == "logprobs":
        return parse_probabilities(spoken, logprobs)
    if mode == "json":
        is_held = RESPONSE_FORMAT in (parameters or {})  # to JSON and nothing else: no endpoint has refused that
        told = parse_object(form, spoken) if is_held else parse_embedded(form, spoken, material)
        if told is not None:
            return Unparsed("cut") if isinstance(told, Unparsed) and finish_reason == "length" else told
    verdict = FORMS[form].parse(spoken, material)
    if finish_reason != "length":
        return verdict
    if FORMS[form].parse(f"{spoken}5", material) != verdict:
        return Unparsed("cut")
    if isinstance(verdict, Unparsed) or (spoken == review and not opens_with(form, spoken, verdict)):
        return Unparsed("cut")
    return verdict


def opens_with(form: str, review: str, verdict: Verdict) -> bool:
    """Whether the first line of a review that is not empty says this verdict by itself."""
    first = next((line for line in review.split("\n") if line.strip()), "")
    return FORMS[form].parse(first, "") == verdict and _VERDICT_WORDS.issuperset(re.findall(r"[a-z]+", first.lower()))


def load_judge_prompts(
    name: str, prompt_set: str | None, data: DataSource, *, file: Path | None = None
) -> JudgePrompts:
    """The prompts of a family.

    Args:
        name: one of `FAMILIES`; not read where there is a file.
        prompt_set: `official`, `builtin`, or None: official on real data, built-in on the nano world.
        data: where the official prompts are looked for.
        file: prompts of the user's own, in the format that this module's head describes.

    Raises:
        InputError: an unknown name, both a prompt set and a file, or a malformed file.
        DataError: the official prompts cannot be had, or are not the pinned ones.
    """
    if file is not None:
        if prompt_set is not None:
            raise InputError("--judge-prompt FILE takes no --prompt-set: the file is the prompt; leave one of them out")
        return _prompts(file.name, "file", *_read(file))
    family = load_family(name)
    prompt_set = prompt_set or ("builtin" if data.name == "nano" else "official")
    if prompt_set == "builtin":
        return _prompts(name, "builtin", *_read(family.builtin))
    if prompt_set != "official":
        raise InputError(f"unknown prompt set {prompt_set!r}; {did_you_mean(prompt_set, PROMPT_SET_NAMES)}")
    return _prompts(name, "official", family.form, family.official(data))


def _prompts(name: str, prompt_set: PromptSetName, form: str, wording: Wording) -> JudgePrompts:
    temperature, max_tokens = wording.temperature, wording.max_tokens
    return JudgePrompts(
        name,
        prompt_set,
        form,
        FORMS[form].temperature if temperature is None else temperature,
        FORMS[form].max_tokens if max_tokens is None else max_tokens,
        wording.templates,
    )


def _read(file: Path) -> tuple[str, Wording]:
    """Form and wording of a file in our own format."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())[:160]
        raise DataError(f"{file} cannot be read as judge prompts ({problem}); the format is in docs/judge.md") from None
    try:
        return _checked(content)
    except ValueError as error:
        raise DataError(f"{file} holds no judge prompts: {error}; see docs/judge.md for the format") from None


def _checked(content: object) -> tuple[str, Wording]:
    """Form and wording of a file; ValueError says what is wrong."""
    if not isinstance(content, dict) or not isinstance(content.get("prompts"), dict):
        raise ValueError("it needs `kind` and `prompts`, a mapping of categories to prompts")
    if unknown := sorted(map(str, content.keys() - {"kind", "temperature", "max_tokens", "prompts"})):
        raise ValueError(f"unknown key {unknown[0]!r}")
    form = content.get("kind")
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(f"kind is {form!r}, neither {' nor '.join(FORMS)}")
    if "general" not in content["prompts"]:
        raise ValueError("there is no prompt `general`, which every other category falls back on")
    required = _REQUIRED[FORMS[form].n_answers]
    templates = {str(name): _checked_template(str(name), row, required) for name, row in content["prompts"].items()}
    late = next((name for name in templates if name.endswith(TURNS)), None)
    if late and GENERAL + TURNS not in templates:
        raise ValueError(f"prompt {late} needs a prompt {GENERAL}{TURNS}, which other categories fall back on")
    temperature = content.get("temperature", FORMS[form].temperature)
    max_tokens = content.get("max_tokens", FORMS[form].max_tokens)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise ValueError(f"temperature is {temperature!r}, no number from 0 to 2")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}, no positive whole number")
    return form, Wording(templates, float(temperature), max_tokens)


def _checked_template(category: str, row: object, required: Iterable[str]) -> PromptTemplate:
    if not isinstance(row, dict) or not isinstance(row.get("user"), str) or not row.keys() <= {"system", "user"}:
        raise ValueError(f"prompt {category} must have a text `user`, and may have a text `system`")
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"prompt {category}: system is no text")
    needed = (*required, REFERENCE) if category.removesuffix(TURNS) == REFERENCE else tuple(required)
    if missing := [place for place in needed if f"{{{place}}}" not in row["user"]]:
        raise ValueError(f"prompt {category} has no place {{{missing[0]}}}")
    known = {*needed, "fence"} | ({"nth", "turns"} if category.endswith(TURNS) else set())
    for sign in ("{turns}", "{/turns}"):
        if category.endswith(TURNS) and sign not in row["user"]:
            raise ValueError(
                f"prompt {category} has no {sign}; between {{turns}} and {{/turns}} stands what each turn is"
            )
    if unknown := [place for place in re.findall(r"\{(\w+)\}", row["user"] + system) if place not in known]:
        raise ValueError(f"prompt {category} has an unknown place {{{unknown[0]}}}; {did_you_mean(unknown[0], known)}")
    return PromptTemplate(system, row["user"])
