"""A verdict as one JSON object: the schema that a judge is held to, and a strict reader of what it writes.

The reason comes before the verdict in the schema, as a model writes the fields in this order: it judges after it has
compared. What a schema cannot promise at every endpoint (a range, no field twice) is checked here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

from almost_eval.judge.records import Side, Unparsed, Verdict
from almost_eval.types import JSONMapping, JSONObject

RESPONSE_FORMAT = "response_format"
"""The field of a request that holds the schema."""
LOWEST, HIGHEST = 1.0, 10.0
"""The scale that the prompts state."""

REASON = "reason"
SCORES = ("score_1", "score_2")
LETTER = "verdict"
Scores = tuple[float, float]
NAME = r"(?:assistant|answer|response|model|chatbot|ai)"
"""How a review may call what it compares, before a number or a letter."""
SIDES = {"1": 0, "a": 0, "one": 0, "2": 1, "b": 1, "two": 1}
_FIELD = re.compile(rf"{NAME}[ _#-]?(1|2|a|b)(?:[ _]?(?:score|rating))?|(?:score|rating)[ _](1|2|a|b)", re.I)
"""A field of a JSON object that holds the score of one side, where no schema was kept."""
WINNERS: dict[str, Side] = {"A": "1", "B": "2", "C": "tie"}

_PROPERTIES: dict[str, JSONObject] = {
    "scores": {
        REASON: {"type": "string", "description": "What is good and bad about each answer."},
        SCORES[0]: {"type": "number", "description": "Of Assistant 1, from 1 to 10."},
        SCORES[1]: {"type": "number", "description": "Of Assistant 2, from 1 to 10."},
    },
    "letters": {
        REASON: {"type": "string", "description": "How the two answers compare."},
        LETTER: {
            "type": "string",
            "enum": list(WINNERS),
            "description": "A: assistant A is better; B: assistant B is better; C: equally good.",
        },
    },
}
"""Form of the reviews -> the fields of a verdict. Ranges are in words: several endpoints refuse `minimum`."""

CLOSING = {
    "scores": (
        "Whatever was said above of the form of your output: write one JSON object and nothing else, with these fields "
        'in this order: "reason" (a text: what is good and bad about each answer), "score_1" (a number from 1 to 10, '
        'of Assistant 1), "score_2" (a number from 1 to 10, of Assistant 2).'
    ),
    "letters": (
        "Whatever was said above of the form of your output: write one JSON object and nothing else, with these fields "
        'in this order: "reason" (a text: how the two answers compare), "verdict" ("A" if assistant A is better, "B" '
        'if assistant B is better, "C" if they are equally good).'
    ),
}
"""Form of the reviews -> the end of the prompt. An endpoint that takes no schema goes by these words alone."""


def response_format(form: str) -> JSONObject:
    """What a request states, so that the reply is a verdict of this form."""
    properties = _PROPERTIES[form]
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def parse_object(form: str, text: str) -> Verdict | Unparsed:
    """The verdict of a text that is one JSON object and nothing else.

    Returns:
        A verdict, or why there is none: `not_json`, `duplicate_field`, `missing_field`, `unknown_field`, `wrong_type`
        or `out_of_range`.
    """
    try:
        fields = json.loads(text, object_pairs_hook=_with_repeats, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return Unparsed("not_json")
    return _verdict(form, fields)


def parse_embedded(form: str, text: str, material: str = "") -> Verdict | Unparsed | None:
    """The verdict of the JSON objects in a text, where the endpoint was not held to a schema. One that stands in
    `material`, which the judge may have quoted, is none.

    Returns:
        A verdict; `ambiguous` where two objects differ; None where no object is a verdict.
    """
    verdicts = {
        verdict
        for fields in _objects_in(text, material)
        for verdict in [_verdict(form, fields)]
        if isinstance(verdict, Verdict)
    }
    if len(verdicts) > 1:
        return Unparsed("ambiguous")
    return verdicts.pop() if verdicts else None


def object_scores(review: str) -> list[Scores] | Unparsed:
    """The scores of a review that is one JSON object, by the names of its fields; none for any other review."""
    try:
        fields = json.loads(re.sub(r"\A\s*```\w*\s*|\s*```\s*\Z", "", review), object_pairs_hook=_with_repeats)
    except (ValueError, RecursionError):
        return []
    return Unparsed("duplicate_field") if _has_score_twice(fields) else _scores_by_name(fields)


def embedded_scores(review: str, material: str) -> list[Scores] | Unparsed:
    """The same of each JSON object in a text that `material` does not hold.

    Returns:
        The scores; `duplicate_field` where an object states one of them twice: a reader of JSON takes the last, a
        person the first.
    """
    objects = list(_objects_in(review, material))
    if any(map(_has_score_twice, objects)):
        return Unparsed("duplicate_field")
    return [scores for fields in objects for scores in _scores_by_name(fields)]


def _objects_in(text: str, material: str) -> Iterator[object]:
    """Each JSON object in a text that does not stand in what it may have quoted."""
    decoder = json.JSONDecoder(object_pairs_hook=_with_repeats, parse_constant=_no_number)
    at = text.find("{")
    while at >= 0:
        end = at + 1
        try:
            fields, end = decoder.raw_decode(text, at)
            if text[at:end] not in material:
                yield fields
        except (ValueError, RecursionError):
            pass
        at = text.find("{", end)


def _scores_by_name(fields: object) -> list[Scores]:
    """Scores of both sides; several where one side has two names, and they differ."""
    if not isinstance(fields, dict):
        return []
    both = fields.get("scores")
    sides: tuple[set[float], set[float]] = set(), set()
    rows = list(fields.items())
    if isinstance(both, dict):
        rows += both.items()
    elif isinstance(both, list) and len(both) == 2:
        rows += zip(SCORES, both, strict=True)
    for name, value in rows:
        score = value.get("score") if isinstance(value, dict) else value
        if (match := _FIELD.fullmatch(name.strip())) and _is_number(score):
            sides[SIDES[(match[1] or match[2]).lower()]].add(float(score))
    return [(one, two) for one in sides[0] for two in sides[1]]


def _verdict(form: str, fields: object) -> Verdict | Unparsed:
    expected = _PROPERTIES[form]
    if not isinstance(fields, dict):
        return Unparsed("not_json")
    if any(isinstance(value, _Repeated) for value in fields.values()):
        return Unparsed("duplicate_field")
    if not fields.keys() >= expected.keys():
        return Unparsed("missing_field")
    if fields.keys() != expected.keys():
        return Unparsed("unknown_field")
    if not isinstance(fields[REASON], str):
        return Unparsed("wrong_type")
    return _by_letter(fields) if LETTER in expected else _by_scores(fields)


def _by_letter(fields: JSONMapping) -> Verdict | Unparsed:
    letter = fields[LETTER]
    if not isinstance(letter, str):
        return Unparsed("wrong_type")
    return Verdict(WINNERS[letter]) if letter in WINNERS else Unparsed("out_of_range")


def _by_scores(fields: JSONMapping) -> Verdict | Unparsed:
    first, second = (fields[name] for name in SCORES)
    if not (_is_number(first) and _is_number(second)):
        return Unparsed("wrong_type")
    if not (LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST):
        return Unparsed("out_of_range")
    return Verdict.of_scores(float(first), float(second))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Repeated:
    """The value of a field that stands in an object twice."""


def _with_repeats(pairs: list[tuple[str, Any]]) -> JSONObject:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        fields |= {name: _Repeated() for name, n in Counter(name for name, _ in pairs).items() if n > 1}
    return fields


def _has_score_twice(fields: object) -> bool:
    """Whether a field of an object, or of one within, stands there twice and is one that scores are read from."""
    if not isinstance(fields, dict):
        return False
    return any(
        (isinstance(value, _Repeated) and (name in ("score", "scores") or bool(_FIELD.fullmatch(name.strip()))))
        or _has_score_twice(value)
        for name, value in fields.items()
    )


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
