"""From ranked configurations to pairs of answers: the official rules, pure.

ALMoST (arXiv 2305.13735, section 2.1; naver-ai/ALMoST `synthetic_feedback.py`). For one prompt, in this order:

1. Configurations of different rank make pairs; the answer of the better rank is `chosen`.
2. Answers that broke a rule (BAD) take part in no pair and in no length.
3. A pair is dropped if the chosen answer is shorter than the rejected one *and* shorter than mean - std / 2 of this
   prompt's answers (characters; the population's deviation).
4. Of the pairs whose chosen answer has the same rank only the first is kept, best configurations first. So each rank
   wins at most once, against the best answer below it that step 3 keeps. (`pairs: all` skips this step.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from almost_eval.errors import DataError, InputError
from almost_train.common.yaml_file import read_yaml, yaml_value

Ranking = tuple[tuple[str, ...], ...]
"""Groups of configurations of equal rank, best first."""


@dataclass(frozen=True, slots=True)
class RankedAnswer:
    """The answer of one configuration."""

    configuration: str
    text: str
    rejected: str | None
    """The rule it breaks, or None."""


@dataclass(frozen=True, slots=True)
class RankedPair:
    """Two answers to one prompt, by rank."""

    prompt_id: str
    chosen: RankedAnswer
    rejected: RankedAnswer
    reason: str | None = None
    """Why the pair is dropped: `bad_response`, `length_rule`, `rank_has_pair`; or None."""


def read_ranking(file: Path) -> Ranking:
    """The groups of `ranking.yaml`: a list, best first, whose items are a name or a list of names of equal rank.

    Raises:
        DataError: absent or not YAML.
        InputError: see `as_ranking`.
    """
    groups = read_yaml(file, "it lists the configurations, best first")
    return as_ranking(groups, str(file))


def as_ranking(items: object, where: str) -> Ranking:
    """The groups of a list, as YAML holds it.

    Raises:
        InputError: not a list of names and lists of names, fewer than two groups, or a name twice; with `where`.
    """
    groups = [[item] if isinstance(item, str) else item for item in items] if isinstance(items, list) else []
    if not groups or not all(
        isinstance(g, list) and g and all(isinstance(name, str) and name for name in g) for g in groups
    ):
        raise InputError(
            f"{where} must be a list of configurations, best first; those of equal rank in a list of their own"
        )
    if len(groups) < 2:
        raise InputError(f"{where} has one rank; pairs need at least two")
    names = [name for group in groups for name in group]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{where} has {twice!r} twice; a configuration has one rank")
    return tuple(tuple(group) for group in groups)


def ranking_text(ranking: Ranking) -> str:
    """The file that `read_ranking` reads. A name that YAML would not read as itself (`1`, `no`) is in quotes."""
    return "".join(f"- [{', '.join(map(_in_yaml, group))}]\n" for group in ranking)


def _in_yaml(name: str) -> str:
    try:
        same = yaml_value(name, name) == name
    except DataError:
        same = False
    return name if same else json.dumps(name)


def ranked_pairs(
    prompt_id: str,
    answers: Mapping[str, RankedAnswer],
    ranking: Ranking,
    *,
    length_rule: bool = True,
    one_win_a_rank: bool = True,
) -> list[RankedPair]:
    """Every pair of configurations of different rank, with the reason where it is dropped.

    `answers` are by configuration, all of the ranking. `length_rule` is step 3 of the module's text, `one_win_a_rank`
    step 4.
    """
    ordered = [(rank, answers[name]) for rank, group in enumerate(ranking) for name in group]
    long_enough = _long_enough([answer for _, answer in ordered])
    pairs: list[RankedPair] = []
    won: set[int] = set()
    for (rank, chosen), (other_rank, rejected) in combinations(ordered, 2):
        if rank == other_rank:
            continue
        reason = None
        if chosen.rejected or rejected.rejected:
            reason = "bad_response"
        elif length_rule and len(chosen.text) < len(rejected.text) and not long_enough[chosen.configuration]:
            reason = "length_rule"
        elif one_win_a_rank and rank in won:
            reason = "rank_has_pair"
        else:
            won.add(rank)
        pairs.append(RankedPair(prompt_id, chosen, rejected, reason))
    return pairs


def _long_enough(answers: Sequence[RankedAnswer]) -> dict[str, bool]:
    """Configuration -> whether its answer has at least mean - std / 2 characters, of those that broke no rule."""
    lengths = [len(answer.text) for answer in answers if answer.rejected is None]
    if not lengths:
        return {answer.configuration: False for answer in answers}
    # numpy's mean and std, as in the official code: a length equal to the bound is then treated in the same way.
    bound = float(np.mean(lengths) - np.std(lengths) / 2)
    return {answer.configuration: len(answer.text) >= bound for answer in answers}
