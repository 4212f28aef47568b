"""What a judge is shown: the prompts of a family, filled with a question and two answers.

The families are in `families/`. Each comes as `official`, the words of its authors read at run time (see
`fastchat.py`), or `builtin`, our own wording in `families/*.yaml`. `--judge-prompt FILE` is another one in the format
of those files:

    kind: scores                # or letters; says how the review is read (see verdicts.py)
    temperature: 0.2            # optional
    max_tokens: 1024            # optional, of the review
    prompts:
      general:                  # required; used for every category that has no prompt of its own
        system: ...             # optional
        user: ...               # holds {question}, {answer_1} and {answer_2}; may hold {fence}
      coding: ...               # optional, by category of the question
      reference: ...            # optional, holds {reference} too: math, reasoning and coding questions that have one

Nothing in an answer can end its place in the frame. Where a prompt has a {fence}, that is a code which occurs in no
text of the pair. The official prompts have fixed markers ("[The End of Assistant 1's Answer]"): an answer that holds
one has it turned into "[quoted: The End of Assistant 1's Answer]". Any other answer goes in byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from almost_eval.data.prompt_sets import PROMPT_SET_NAMES
from almost_eval.data.sources import DataSource
from almost_eval.errors import DataError, InputError, did_you_mean
from almost_eval.judge.families import FAMILIES
from almost_eval.judge.modes import Mode, closing_of
from almost_eval.judge.probabilities import parse_probabilities
from almost_eval.judge.records import Pair, TokenAlternatives, Unparsed, Verdict
from almost_eval.judge.structured import is_held, parse_embedded, parse_object
from almost_eval.judge.verdicts import parse_letters, parse_scores
from almost_eval.models.reasoning import split_reasoning
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


FORMS = {"scores": ReviewForm(parse_scores, 0.2, 1024), "letters": ReviewForm(parse_letters, 0.0, 2048)}
"""`kind` of a prompt file -> the form of its reviews."""

REFERENCE = "reference"
REFERENCE_CATEGORIES = frozenset({"math", "reasoning", "coding"})
"""Questions that are judged against a reference answer, if there is one: FastChat's list."""

_VERDICT_WORDS = frozenset(
    "assistant answer score scores rating ratings verdict output result final overall the my is are and to out of a b c"
    " vs for".split()
)
"""Words of a first line that is the verdict. A sentence of a thought has others."""

_REQUIRED = ("question", "answer_1", "answer_2")
_PLACES = re.compile(r"\{(question|answer_1|answer_2|reference|fence)\}")
_MARKER = re.compile(r"\[([A-Z][^\[\]{}\n]*)\]")
_QUOTED = "quoted: "


class PromptTemplate(NamedTuple):
    """The two messages of a request, with places to fill."""

    system: str
    user: str


class Wording(NamedTuple):
    """The words of a family."""

    templates: Mapping[str, PromptTemplate]
    """By category of the question; `general` for the rest, `reference` where there is a reference answer."""
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

    def messages(self, pair: Pair) -> tuple[Message, ...]:
        """The request for one pair: the system message, if there is one, and the user's."""
        template, (texts, _) = self._template(pair), self._texts(pair)
        filled = PromptTemplate(*(_PLACES.sub(lambda match: texts[match[1]], part) for part in template))
        closing = closing_of(self.verdict, self.kind)
        user = Message("user", filled.user if closing is None else f"{filled.user.rstrip()}\n\n{closing}")
        return (Message("system", filled.system), user) if filled.system else (user,)

    def neutralised(self, pair: Pair) -> int:
        """How many frame markers in the texts of a pair were turned into quotations."""
        return self._texts(pair)[1]

    def parse(
        self,
        review: str,
        pair: Pair,
        finish_reason: str = "stop",
        parameters: Mapping[str, object] | None = None,
        logprobs: Sequence[TokenAlternatives] | None = None,
    ) -> Verdict | Unparsed:
        """What a review of this pair says; see `parse_review`."""
        return parse_review(self.kind, review, pair, finish_reason, self.verdict, parameters, logprobs)

    def _template(self, pair: Pair) -> PromptTemplate:
        category = pair.question.category
        if REFERENCE in self.templates and pair.question.reference and category in REFERENCE_CATEGORIES:
            return self.templates[REFERENCE]
        return self.templates.get(category if category != REFERENCE else "general") or self.templates["general"]

    def _texts(self, pair: Pair) -> tuple[dict[str, str], int]:
        """What fills the places, and how many markers had to be neutralised."""
        template = self._template(pair)
        texts = {
            "question": pair.question.text,
            "answer_1": pair.answer_1.text,
            "answer_2": pair.answer_2.text,
            "reference": pair.question.reference or "",
        }
        if "{fence}" in template.user:
            return texts | {"fence": _fence(texts)}, 0
        markers = _marker_pattern(template.user)
        if markers is None:
            return texts, 0
        counted = {place: markers.subn(rf"[{_QUOTED}\1]", text) for place, text in texts.items()}
        used = set(_PLACES.findall(template.user))
        return {place: text for place, (text, _) in counted.items()}, sum(counted[place][1] for place in used)


def _fence(texts: Mapping[str, str]) -> str:
    """A code that follows from the texts, so that the same pair is the same request, and occurs in none of them."""
    whole = json.dumps(sorted(texts.items()))
    for attempt in range(1000):
        code = hashlib.sha256(f"{attempt}{whole}".encode()).hexdigest()[:12]
        if not any(code in text for text in texts.values()):
            return code
    raise AssertionError("a text cannot hold a thousand of its own digests")


def _marker_pattern(user: str) -> re.Pattern[str] | None:
    """What would read as a marker of this frame, whatever its case, spaces and apostrophes."""
    markers = []
    for inner in dict.fromkeys(_MARKER.findall(user)):
        words = (re.escape(word).replace("'", "['\u2018\u2019]") for word in inner.split())
        markers.append(r"\s+".join(words))
    if not markers:
        return None
    # With the mark of an earlier quotation, so that every change can be undone.
    return re.compile(rf"\[(\s*(?:{_QUOTED})*(?:{'|'.join(markers)})\s*)\]", re.I)


def parse_review(
    form: str,
    review: str,
    pair: Pair,
    finish_reason: str = "stop",
    mode: Mode = "text",
    parameters: Mapping[str, object] | None = None,
    logprobs: Sequence[TokenAlternatives] | None = None,
) -> Verdict | Unparsed:
    """What a review of a pair says.

    Nothing that it quotes from the question or the answers is a verdict, and nothing that it thought before its answer:
    a judge tries out verdicts while it thinks.

    Args:
        form: a key of `FORMS`.
        review: what the judge wrote, its thoughts too.
        pair: what it is about.
        finish_reason: as the provider says. A review that was cut (`length`) and shows no end of a thought may be a
            thought from its first word on, where the template has opened it. Then a verdict counts only where a thought
            does not stand: alone in the first line.
        mode: how the verdict was to be told.
        parameters: what the review came about with: whether the endpoint held it to JSON.
        logprobs: of its last tokens.
    """
    split = split_reasoning(review)
    if split.is_cut:
        return Unparsed("thinking_cut")
    if split.thought is not None and not split.answer.strip():
        return Unparsed("only_thinking")
    material = "\n".join((pair.question.text, pair.answer_1.text, pair.answer_2.text))
    if mode == "logprobs":
        return parse_probabilities(split.answer, logprobs)
    if mode == "json":
        held = is_held(parameters or {})
        told = parse_object(form, split.answer) if held else parse_embedded(form, split.answer, material)
        if told is not None:
            return Unparsed("cut") if isinstance(told, Unparsed) and finish_reason == "length" else told
    verdict = FORMS[form].parse(split.answer, material)
    if finish_reason != "length":
        return verdict
    if isinstance(verdict, Unparsed) or (split.thought is None and not opens_with(form, split.answer, verdict)):
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
    templates = {str(category): _checked_template(str(category), row) for category, row in content["prompts"].items()}
    temperature = content.get("temperature", FORMS[form].temperature)
    max_tokens = content.get("max_tokens", FORMS[form].max_tokens)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise ValueError(f"temperature is {temperature!r}, no number from 0 to 2")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}, no positive whole number")
    return form, Wording(templates, float(temperature), max_tokens)


def _checked_template(category: str, row: object) -> PromptTemplate:
    if not isinstance(row, dict) or not isinstance(row.get("user"), str) or not row.keys() <= {"system", "user"}:
        raise ValueError(f"prompt {category} must have a text `user`, and may have a text `system`")
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"prompt {category}: system is no text")
    needed = (*_REQUIRED, REFERENCE) if category == REFERENCE else _REQUIRED
    if missing := [place for place in needed if f"{{{place}}}" not in row["user"]]:
        raise ValueError(f"prompt {category} has no place {{{missing[0]}}}")
    known = {*needed, "fence"}
    if unknown := [place for place in re.findall(r"\{(\w+)\}", row["user"] + system) if place not in known]:
        raise ValueError(f"prompt {category} has an unknown place {{{unknown[0]}}}; {did_you_mean(unknown[0], known)}")
    return PromptTemplate(system, row["user"])
