"""The queries of the nano world: drawing one, and reading one back from its text.

Queries fall into two pools, `train` and `eval`, by a hash of what they are about (a fact, a request, a name), so that
all wordings of one thing are on the same side. Pre-training reads both: a model cannot know a fact that it never saw.
Alignment is trained on the one and measured on the other.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

from almost_eval.nano.lexicon import (
    ADVICE,
    ANIMALS,
    ATTRIBUTES,
    COMPARISON_QUESTION,
    HARMS,
    LIST_QUESTION,
    NAME_HEADS,
    NAME_TAILS,
    REQUESTS,
)

Dimension = Literal["helpful", "honest", "harmless"]
Pool = Literal["train", "eval"]
Facts = Mapping[str, Mapping[str, str]]
"""Animal -> attribute -> value."""

KINDS: dict[str, tuple[Dimension, int]] = {
    "fact": ("helpful", 38),
    "unknown": ("honest", 18),
    "harmful": ("harmless", 16),
    "advice": ("helpful", 16),
    "list": ("helpful", 7),
    "comparison": ("helpful", 5),
}
"""Kind -> the dimension it tests, and its share of the queries in percent."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question or request."""

    kind: str
    """A key of `KINDS`."""
    text: str
    """As the user writes it."""
    dimension: Dimension
    slots: Mapping[str, str] = field(hash=False)
    """What it is about: `animal` and `attribute`; `attribute` and `value`; `animal` and `other`; `verb` and `object`.
    """

    @property
    def key(self) -> str:
        """What it is about, whatever the wording: the pools are split by it."""
        slots = self.slots
        if self.kind == "comparison":  # the same pair in either order
            return "/".join(sorted((slots["animal"], slots["other"])))
        if self.kind == "unknown":
            return slots["animal"]
        return "/".join(slots[name] for name in ("animal", "attribute", "value", "verb", "object") if name in slots)

    def by_size(self, facts: Facts) -> list[str]:
        """The two animals of a comparison, the smaller one first."""
        sizes = ATTRIBUTES["size"].values
        return sorted((self.slots["animal"], self.slots["other"]), key=lambda name: sizes.index(facts[name]["size"]))


def make_query(kind: str, text: str, **slots: str) -> Query:
    """A query, its dimension looked up."""
    return Query(kind, text, KINDS[kind][0], slots)


@cache
def pool_of(kind: str, key: str, seed: int) -> Pool:
    """The pool of a key."""
    if kind == "fact":  # exactly half of each attribute's facts: there are few, and tables of fixed length ask them
        attribute = key.partition("/")[2]
        ranked = sorted((f"{animal}/{attribute}" for animal in ANIMALS), key=lambda fact: _hash(kind, fact, seed))
        return "train" if ranked.index(key) < len(ranked) // 2 else "eval"
    return "train" if _hash(kind, key, seed)[0] % 2 == 0 else "eval"


def _hash(kind: str, key: str, seed: int) -> bytes:
    # SHA-256 and not hash(), which is salted per process.
    return hashlib.sha256(f"{seed}/{kind}/{key}".encode()).digest()


def fact_query(animal: str, attribute: str, wording: int = 0) -> Query:
    """A question for one fact of a real animal."""
    text = ATTRIBUTES[attribute].questions[wording].format(name=animal)
    return make_query("fact", text, animal=animal, attribute=attribute)


def _fact(rng: random.Random, facts: Facts) -> Query:
    return fact_query(rng.choice(ANIMALS), rng.choice(list(ATTRIBUTES)), rng.randrange(2))


def _unknown(rng: random.Random, facts: Facts) -> Query:
    name = rng.choice(NAME_HEADS) + rng.choice(NAME_TAILS)
    attribute = rng.choice(list(ATTRIBUTES.values()))
    return make_query(
        "unknown", rng.choice(attribute.questions).format(name=name), animal=name, attribute=attribute.name
    )


def _request(kind: str, rng: random.Random, facts: Facts) -> Query:
    verb = rng.choice(list(HARMS if kind == "harmful" else ADVICE))
    thing = rng.choice((HARMS[verb] if kind == "harmful" else ADVICE[verb]).objects)
    return make_query(kind, rng.choice(REQUESTS).format(act=f"{verb} the {thing}"), verb=verb, object=thing)


def _list(rng: random.Random, facts: Facts) -> Query:
    attribute = rng.choice([a for a in ATTRIBUTES.values() if a.plural])
    value = rng.choice(attribute.values)
    text = LIST_QUESTION.format(plural=attribute.plural.format(value=value))
    return make_query("list", text, attribute=attribute.name, value=value)


def _comparison(rng: random.Random, facts: Facts) -> Query:
    one = rng.choice(ANIMALS)
    other = rng.choice([name for name in ANIMALS if facts[name]["size"] != facts[one]["size"]])
    return make_query("comparison", COMPARISON_QUESTION.format(one=one, other=other), animal=one, other=other)


DRAW: dict[str, Callable[[random.Random, Facts], Query]] = {
    "fact": _fact,
    "unknown": _unknown,
    "harmful": partial(_request, "harmful"),
    "advice": partial(_request, "advice"),
    "list": _list,
    "comparison": _comparison,
}
"""Kind -> draws a query of it."""


# --- reading back ---


def parse_query(text: str, facts: Facts) -> Query | None:
    """The query of a text that `World.query` could have written, else None.

    An animal that nobody knows may have any name of small letters: a simulated user may invent its own.
    """
    text = text.strip()
    for pattern, kind, fixed in _patterns():
        match = pattern.fullmatch(text)
        if not match:
            continue
        slots = match.groupdict() | fixed
        if kind == "fact" and slots["animal"] not in facts:
            kind = "unknown"
        if kind == "comparison":
            sizes = [facts[name]["size"] for name in (slots["animal"], slots["other"]) if name in facts]
            if len(set(sizes)) < 2:  # one that nobody knows, or two of the same size
                return None
        return make_query(kind, text, **slots)
    return None


@cache
def _patterns() -> list[tuple[re.Pattern[str], str, dict[str, str]]]:
    """(pattern, kind, slots that the wording itself fixes)."""

    def pattern(template: str, **groups: str) -> re.Pattern[str]:
        escaped = re.escape(template)
        for name, group in groups.items():
            escaped = escaped.replace(re.escape(f"{{{name}}}"), group)
        return re.compile(escaped)

    def one_of(name: str, words: tuple[str, ...]) -> str:
        return f"(?P<{name}>{'|'.join(words)})"

    patterns: list[tuple[re.Pattern[str], str, dict[str, str]]] = []
    for attribute in ATTRIBUTES.values():
        fixed = {"attribute": attribute.name}
        patterns += [(pattern(q, name="(?P<animal>[a-z]+)"), "fact", fixed) for q in attribute.questions]
        if attribute.plural:
            template = LIST_QUESTION.format(plural=attribute.plural)
            patterns.append((pattern(template, value=one_of("value", attribute.values)), "list", fixed))
    names = {"one": "(?P<animal>[a-z]+)", "other": "(?P<other>[a-z]+)"}
    patterns.append((pattern(COMPARISON_QUESTION, **names), "comparison", {}))
    verbs: list[tuple[str, str, tuple[str, ...]]] = [("harmful", verb, harm.objects) for verb, harm in HARMS.items()]
    verbs += [("advice", verb, advice.objects) for verb, advice in ADVICE.items()]
    for kind, verb, objects in verbs:
        act = f"{verb} the {one_of('object', objects)}"
        patterns += [(pattern(request, act=act), kind, {"verb": verb}) for request in REQUESTS]
    return patterns
