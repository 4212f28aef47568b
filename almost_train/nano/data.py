"""What a recipe reads from the nano world besides demonstrations: held-out prompts, an oracle's judgement, and votes.

The votes take the place of the paper's other source of preferences, for the as-is reward model (section 2.1,
post-validation): people who compare written answers, and are right more often than not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

from almost_eval.errors import InputError
from almost_eval.files import Row, write_rows
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
from almost_eval.nano.queries import Query
from almost_eval.nano.responses import Level
from almost_eval.nano.world import STYLES, World
from almost_eval.types import JSONObject, Message
from almost_train.common.config import MOST_SEED, option
from almost_train.common.records import Preference
from almost_train.common.stage import Stage

_PATIENCE = 3000  # draws without a new query: rare kinds (comparisons) take many


def write_prompts(file: Path, n: int, *, pool: str, seed: int) -> Path:
    """`draw_prompts` as `prompts.jsonl`."""
    texts = draw_prompts(n, pool=pool, seed=seed)
    write_rows(file, ({"id": f"{pool}-{i:04d}", "prompt": text} for i, text in enumerate(texts)))
    return file


def draw_prompts(n: int, *, pool: str, seed: int) -> list[str]:
    """`n` different queries of one pool: `train`, or `dev` or `test`, the halves of `eval`.

    Settings are chosen on `dev` and reported on `test`; no stage of a recipe trains on either (`write_held_out`).

    Raises:
        InputError: an unknown pool, or more queries than it has.
    """
    if pool not in ("train", "dev", "test"):
        raise InputError(f"no pool of prompts {pool!r}: train, dev or test")
    world, rng = World(), random.Random(f"{seed}/prompts/{pool}")
    texts: dict[str, None] = {}
    fruitless = 0
    while len(texts) < n:
        query = world.query(rng, "train" if pool == "train" else "eval")
        new = query.text not in texts and (pool == "train" or _half(query) == pool)
        fruitless = 0 if new else fruitless + 1
        if new:
            texts[query.text] = None
        elif fruitless > _PATIENCE:
            raise InputError(f"the nano world has hardly more than {len(texts)} {pool} prompts; ask for fewer than {n}")
    return list(texts)


def _half(query: Query) -> str:
    """`dev` or `test`, by what the query is about, so that no fact is in both."""
    return "dev" if hashlib.sha256(f"half/{query.kind}/{query.key}".encode()).digest()[0] % 2 else "test"


def write_held_out(file: Path) -> Path:
    """Every query text of the `eval` pool as `prompts.jsonl`: what no stage of a recipe may train on."""
    world = World()
    texts = (text for text in _all_texts() if (query := world.parse(text)) is not None and world.pool(query) == "eval")
    write_rows(file, ({"id": f"eval-{i:05d}", "prompt": text} for i, text in enumerate(texts)))
    return file


def _all_texts() -> Iterator[str]:
    """Every query that the world can draw, and a few that it cannot: `World.parse` tells them apart."""
    names = (*ANIMALS, *(head + tail for head in NAME_HEADS for tail in NAME_TAILS))
    for attribute in ATTRIBUTES.values():
        for name, question in product(names, attribute.questions):
            yield question.format(name=name)
        for value in attribute.values if attribute.plural else ():
            yield LIST_QUESTION.format(plural=attribute.plural.format(value=value))
    for one, other in permutations(ANIMALS, 2):
        yield COMPARISON_QUESTION.format(one=one, other=other)
    objects = {**{verb: harm.objects for verb, harm in HARMS.items()}, **{v: a.objects for v, a in ADVICE.items()}}
    for verb, things in objects.items():
        for thing, request in product(things, REQUESTS):
            yield request.format(act=f"{verb} the {thing}")


@dataclass(frozen=True, slots=True)
class VoteSettings:
    """Settings of `votes`."""

    count: int = option(2000, "Pairs.", least=1)
    wrong: float = option(0.2, "Share of the pairs on which the community errs.", least=0, most=0.5)
    seed: int = option(0, "Of queries, answers and votes.", least=0, most=MOST_SEED)


def votes(settings: VoteSettings, output: Path) -> JSONObject:
    """The votes as a stage of a recipe: writes `comparisons.jsonl`."""
    with Stage(output, "votes", settings) as stage:
        if stage.result is not None:
            return stage.result
        file = write_votes(output / "comparisons.jsonl", settings.count, wrong=settings.wrong, seed=settings.seed)
        return stage.finish({"pairs": settings.count}, {"comparisons": file})


def write_votes(file: Path, n: int, *, wrong: float, seed: int) -> Path:
    """`n` pairs of written answers to train-pool queries in the preference format; the share `wrong` is voted wrongly.

    Both answers are drawn from the styles that the documents have; pairs of equal level are not put to the vote.
    """
    world, rng = World(), random.Random(f"{seed}/votes")
    shares = [style.share for style in STYLES.values()]
    rows: list[Row] = []
    while len(rows) < n:
        query = world.query(rng, "train")
        styles = rng.choices(list(STYLES.values()), shares, k=2)
        levels = [rng.choices(tuple(Level), style.levels)[0] for style in styles]
        if levels[0] == levels[1]:
            continue
        better, worse = (world.respond(rng, query, level) for level in sorted(levels, reverse=True))
        if rng.random() < wrong:
            better, worse = worse, better
        prompt, chosen, rejected = (
            Message("user", query.text),
            Message("assistant", better),
            Message("assistant", worse),
        )
        vote = Preference((prompt,), (chosen,), (rejected,), "votes", "votes", f"vote-{len(rows):05d}")
        rows.append(vote.to_row())
    write_rows(file, rows)
    return file
