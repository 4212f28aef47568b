"""The nano world: a small land of animals, what is true of them, and how people talk about it with an assistant.

A world is its seed: the seed deals the facts. Queries, answers in four styles, dialogues and whole documents are drawn
from it with a generator that the caller hands in. A document has one latent style, most often not a good one, so that
a language model trained on documents is steered by the demonstrations it reads, as vanilla models of the real size
are (ALMoST, arXiv 2305.13735, section 2). Three modules stand on this one: `oracle.py` (ground truth), then
`tables.py` (benchmark rows), then `documents.py` (text to pre-train on).

Pure: the standard library only.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from almost_eval.errors import InputError, did_you_mean
from almost_eval.nano.lexicon import ANIMALS, ATTRIBUTES, FAREWELLS, GOODBYES
from almost_eval.nano.queries import DRAW, KINDS, Facts, Pool, Query, parse_query, pool_of
from almost_eval.nano.responses import WRITE, Level
from almost_eval.types import Conversation, Message

SEPARATOR = "\n\n-----"
"""Closes every dialogue of a document, as in the official demonstrations; the nano models' end-of-text token."""


@dataclass(frozen=True, slots=True)
class Style:
    """How the assistant of one document answers."""

    share: float
    """Of the documents."""
    levels: tuple[float, float, float, float]
    """Probability of each level, bad to good."""


STYLES = {
    "good": Style(0.20, (0.00, 0.02, 0.08, 0.90)),
    "plain": Style(0.25, (0.05, 0.20, 0.65, 0.10)),
    "sloppy": Style(0.30, (0.20, 0.60, 0.18, 0.02)),
    "bad": Style(0.25, (0.65, 0.22, 0.11, 0.02)),
}
QUALITIES = {"good": (0.00, 0.00, 0.05, 0.95), "weak": (0.05, 0.30, 0.63, 0.02), "bad": (0.65, 0.22, 0.11, 0.02)}
"""Demonstrations: probability of each level, bad to good."""

TURNS = (0.62, 0.24, 0.09, 0.05)
"""Probability of one to four queries in a dialogue."""
GOODBYE = 0.2
"""Probability that the user says goodbye at the end."""


@dataclass(frozen=True)
class World:
    """The facts of one seed, and the text about them."""

    seed: int = 0

    def generator(self, purpose: str) -> random.Random:
        """A generator for one purpose: neither the order of the calls nor a new purpose changes another's draws."""
        return random.Random(f"{self.seed}/{purpose}")  # a string is hashed by SHA-512: the same in every process

    @cached_property
    def facts(self) -> Facts:
        """Animal -> attribute -> value; each value of an attribute belongs to equally many animals."""
        facts: dict[str, dict[str, str]] = {animal: {} for animal in ANIMALS}
        for attribute in ATTRIBUTES.values():
            dealt = list(itertools.islice(itertools.cycle(attribute.values), len(ANIMALS)))
            self.generator(f"facts/{attribute.name}").shuffle(dealt)
            for animal, value in zip(ANIMALS, dealt, strict=True):
                facts[animal][attribute.name] = value
        return facts

    # --- queries and answers ---

    def query(self, rng: random.Random, pool: Pool | None = None, kind: str | None = None) -> Query:
        """A query of `pool` (`train`, `eval`, or None for both), of one kind or of the usual mixture.

        Raises:
            InputError: an unknown pool or kind.
        """
        if pool not in (None, "train", "eval"):
            raise InputError(f"no pool {pool!r}: train, eval or None")
        if kind is not None and kind not in KINDS:
            raise InputError(f"no kind of query {kind!r}: {did_you_mean(kind, KINDS)}")
        kind = kind or rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
        # The kind is drawn once and only the rest again: rejection must not shift the mixture.
        while True:
            query = DRAW[kind](rng, self.facts)
            if pool is None or self.pool(query) == pool:
                return query

    def pool(self, query: Query) -> Pool:
        """The pool that a query belongs to."""
        return pool_of(query.kind, query.key, self.seed)

    def parse(self, text: str) -> Query | None:
        """The query of a text that `query` could have written, else None."""
        return parse_query(text, self.facts)

    def respond(self, rng: random.Random, query: Query, level: int) -> str:
        """An answer in the style of a level: 3 good, 2 terse, 1 sloppy, 0 bad."""
        return WRITE[query.kind](rng, query, Level(level), self.facts)

    def seed_prompts(self, rng: random.Random, n: int) -> list[str]:
        """Texts of `n` different queries of the train pool, to start prompt mining from."""
        prompts: dict[str, None] = {}  # a set that keeps its order
        while len(prompts) < n:
            prompts[self.query(rng, "train").text] = None
        return list(prompts)

    # --- dialogues ---

    def dialogue(
        self,
        rng: random.Random,
        levels: Sequence[float],
        *,
        pool: Pool | None = None,
        turns: int | None = None,
        goodbye: float = GOODBYE,
    ) -> Conversation:
        """Queries and answers in turn (one to four where `turns` is None); each query stands for itself.

        `levels` is the probability of each level of an answer, bad to good; `goodbye` that of a user who takes leave.
        """
        turns = turns or rng.choices((1, 2, 3, 4), TURNS)[0]
        messages: list[Message] = []
        for _ in range(turns):
            query = self.query(rng, pool)
            level = rng.choices(tuple(Level), levels)[0]
            messages += (Message("user", query.text), Message("assistant", self.respond(rng, query, level)))
        if rng.random() < goodbye:
            level = rng.choices(tuple(Level), levels)[0]
            messages += (Message("user", rng.choice(GOODBYES)), Message("assistant", FAREWELLS[level]))
        return tuple(messages)

    def demonstrations(
        self, rng: random.Random, quality: str, n: int, *, turns: int | None = 1, goodbye: float = 0.0
    ) -> list[Conversation]:
        """`n` dialogues of one quality (`good`, `weak` or `bad`) from the train pool, one query each unless told.

        Raises:
            InputError: an unknown quality.
        """
        if quality not in QUALITIES:
            raise InputError(f"no demonstrations of quality {quality!r}: {did_you_mean(quality, QUALITIES)}")
        return [self.dialogue(rng, QUALITIES[quality], pool="train", turns=turns, goodbye=goodbye) for _ in range(n)]


def render(conversation: Conversation) -> str:
    """A dialogue in the text form of the official demonstrations, closed by the separator.

    The same text as `chat.dialogue_text` with `SEPARATOR` as EOS; here without jinja, as pre-training writes millions.
    """
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[message.role]}: {message.content}" for message in conversation) + SEPARATOR
