"""What a request says beside its messages, and what happens to a parameter that the endpoint refuses.

Judges differ in what they take. Reasoning models refuse `max_tokens` (they want `max_completion_tokens`) and every
temperature but 1; others refuse the temperature beside top_p, a seed, a schema of the reply (it is then sent as
`json_object`, and left out where that is refused too). Each provider says so in words of its own, inside an envelope of
its own: `refused_parameter` reads them. What was refused is exchanged or left out from then on, for all requests to
this endpoint, and every reply says with which parameters it came about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from almost_eval.judge.records import JudgeRequest
from almost_eval.types import JSONObject

MAX_TOKENS, MAX_COMPLETION_TOKENS = "max_tokens", "max_completion_tokens"
_EXCHANGED = {MAX_TOKENS: MAX_COMPLETION_TOKENS, MAX_COMPLETION_TOKENS: MAX_TOKENS}
RESPONSE_FORMAT, JSON_SCHEMA, JSON_OBJECT = "response_format", "json_schema", "json_object"
LOGPROBS = "logprobs"
_NEEDED = (LOGPROBS, "top_logprobs")
"""Without them a reply is worth nothing to the run that requests them: a refusal is told, and nothing is left out."""
_BESIDE = ("temperature", "top_p")
"""Of these some models take one only. The first is kept: it is the one that the protocol states."""

_REFUSES = re.compile(
    r"unsupported|unavailable|not support|n't support|only support|unrecognized|unrecognised|unknown|unexpected"
    r"|not permitted|not allowed|forbidden|not accept|only accept|deprecated|cannot both|can't both|not available"
    r"|not recognized"
    r"|no longer|must be (?:1|omitted|unset)|only the default|not compatible|incompatible|mutually exclusive"
    r"|disallowed|not a valid (?:parameter|argument|field)|additional properties|invalid (?:parameter|argument|field)"
    r"|extra[_ ](?:forbidden|inputs?|fields?)",
    re.I,
)
_MUST_BE_ONE = re.compile(r"\b(?:must be|only) (?:set to )?1(?:\.0)?\b", re.I)
_FORMAT_WORDS = re.compile(
    r"response[_ ]?format|json[_ ]?schema|json[_ ]object|json mode|structured[_ ]outputs?|guided[_ ]json", re.I
)
_OTHER_NAMES = {"reasoningeffort": "reasoning_effort", "maxtokens": MAX_TOKENS, "topp": "top_p"}
"""As providers write a parameter in a sentence: in camel case."""
_LONGEST_BODY = 20_000
"""Characters of a refusal that are read."""


@dataclass
class Parameters:
    """What is sent to one endpoint for one judge."""

    first: str = MAX_TOKENS
    """The name under which the bound on tokens is sent at first."""
    changes: dict[str, str | None] = field(default_factory=dict)
    """Parameter -> what is sent in its place; None where it is left out."""

    def of(self, request: JudgeRequest) -> JSONObject:
        """The fields of the body besides `model` and `messages`."""
        wanted = {"temperature": request.temperature, self.first: request.max_tokens, **request.options}
        sent: JSONObject = {}
        for name, value in wanted.items():
            name_now = self.changes.get(name, name)
            if name == RESPONSE_FORMAT and name_now == JSON_OBJECT:
                sent[name] = {"type": JSON_OBJECT}
            elif name_now is not None and value is not None:
                sent[name_now] = value
        return sent

    def change(self, sent: Mapping[str, object], refusal: object) -> str | None:
        """Take in what a refusal (its body as JSON, or text) says of a request that was sent with these parameters.

        Returns:
            What is done about it, in words; None where it names no parameter that was sent.
        """
        name = refused_parameter(sent, refusal)
        if name is None:
            return None
        origin = next((wanted for wanted, now in self.changes.items() if now == name), name)
        if name in _NEEDED:
            return None
        if name == RESPONSE_FORMAT:
            stated = sent[name]
            is_schema = isinstance(stated, Mapping) and stated.get("type") == JSON_SCHEMA
            self.changes[name] = JSON_OBJECT if is_schema and name not in self.changes else None
        elif name in _EXCHANGED and origin == name:
            self.changes[origin] = _EXCHANGED[name]
        else:
            self.changes[origin] = None
        return self.words(origin)

    def words(self, name: str) -> str:
        """What became of a parameter."""
        now = self.changes.get(name, name)
        if name == RESPONSE_FORMAT and now == JSON_OBJECT:
            return f"{name} {JSON_SCHEMA} sent as {JSON_OBJECT}"
        return f"{name} left out" if now is None else f"{name} sent as {now}"

    @property
    def is_bounded(self) -> bool:
        """Whether the endpoint takes a bound on the tokens of a reply at all."""
        return self.changes.get(self.first, self.first) is not None

    def merge(self, changes: Mapping[str, str | None]) -> None:
        """Take in what an earlier process has learnt."""
        self.changes.update(changes)


def refused_parameter(sent: Mapping[str, object], refusal: object) -> str | None:
    """The parameter that an endpoint refuses to take, whatever envelope it says so in; None where it names none."""
    parts = [(key, text) for key, text in _parts(refusal) if key != "input"]  # pydantic repeats the value there
    if RESPONSE_FORMAT in sent and any(_FORMAT_WORDS.search(text) for _, text in parts):
        return RESPONSE_FORMAT  # however it is said: the schema is this toolkit's, so that the user cannot mend it
    if not any(_REFUSES.search(text) or _MUST_BE_ONE.search(text) for _, text in parts):
        return None  # a value that is out of range is the user's to mend
    for key, text in parts:  # a field of its own names it: OpenAI's and Azure's `param`, pydantic's `loc`
        if key in ("param", "loc") and (name := _named(sent, text)) is not None:
            return name
    texts = [text for key, text in parts if key not in ("type", "code", "param")]
    for text in texts:
        if not (refuses := _REFUSES.search(text) or _MUST_BE_ONE.search(text)):
            continue
        if all(re.search(rf"\b{name}\b", text) for name in _BESIDE) and _BESIDE[1] in sent:
            return _BESIDE[1]
        # The parameter that stands nearest to the word of refusal: others may be named as what to use instead.
        less_advice = re.sub(r"\buse [^.]*?instead\b", "", text, flags=re.I)
        places = [(abs(at - refuses.start()), name) for name in sent for at in _places(name, less_advice)]
        if places:
            return min(places)[1]
    return None


def _places(name: str, text: str) -> list[int]:
    other = next((camel for camel, ours in _OTHER_NAMES.items() if ours == name), None)
    names = rf"\b(?:{re.escape(name)}{f'|{other}' if other else ''})\b"
    return [match.start() for match in re.finditer(names, text, re.I)]


def _named(sent: Mapping[str, object], text: str) -> str | None:
    """The parameter that a `param` or a `loc` names: `temperature`, `body.temperature`, `response_format.type`."""
    words = re.findall(r"\w+", text)
    return next((word for word in words if word in sent), None)


def _parts(refusal: object, key: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Every text of a refusal with the key it stands under.

    JSON inside a text (a provider's answer that a router hands on) is opened too; a list of names, as pydantic's
    `loc`, is one text.
    """
    if depth > 8:
        return []
    if isinstance(refusal, Mapping):
        return [part for k, value in refusal.items() for part in _parts(value, str(k), depth + 1)]
    if isinstance(refusal, list):
        if key == "loc":
            return [("loc", ".".join(map(str, refusal)))]
        return [part for value in refusal for part in _parts(value, key, depth + 1)]
    if not isinstance(refusal, str):
        return []
    text = refusal[:_LONGEST_BODY]
    inner = text[text.find("{") :] if "{" in text else ""
    try:
        opened, _ = json.JSONDecoder().raw_decode(inner)
    except ValueError:
        # vLLM puts a Python list into its message: [{'type': 'extra_forbidden', 'loc': ('body', 'seed'), ...}]
        located = [("loc", match[1]) for match in re.finditer(r"'loc': ?[(\[]([^)\]]*)[)\]]", text)]
        return [*located, (key, text)]
    return [*_parts(opened, key, depth + 1), (key, text)]
