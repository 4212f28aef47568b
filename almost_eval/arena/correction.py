"""A judge's win rate corrected by the votes that people cast on the same pairs of answers.

A vote belongs to a judged pair where the question and both answers are the same text, blanks at their ends aside. What
belongs to none is counted by its reason and has no part in a figure. Each question counts once: with the mean of its
votes (a tie and "both bad" are half a win) and the mean of the judge's scores in its orders.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from almost_eval.arena.ppi import MIN_VOTED, corrected_mean
from almost_eval.arena.report import SIDES, question_text
from almost_eval.arena.votes import Vote
from almost_eval.errors import InputError, RunError
from almost_eval.files import write_json
from almost_eval.judge.aggregate import Orders, Ties, mean_scores
from almost_eval.judge.lines import reviews_of, withheld
from almost_eval.judge.names import CORRECTED, HUMAN, VOTES_FILE
from almost_eval.judge.panel import names_of
from almost_eval.judge.panel_results import majority
from almost_eval.judge.records import Pair
from almost_eval.judge.results import StoredRun, redraw, redrawn_records
from almost_eval.types import JSONObject


@dataclass(frozen=True, slots=True)
class MatchedVotes:
    """Votes on the pairs of a run."""

    scores: dict[str, float]
    """Question -> the model's mean score by its votes."""
    matched: int
    sessions: int
    """Visitors who cast the matched votes."""
    unmatched: dict[str, int]
    """Why a vote belongs to no pair -> how many."""


def match_votes(votes: Sequence[Vote], pairs: Iterable[Pair]) -> MatchedVotes:
    """The votes on judged pairs of two systems."""
    by_text: dict[str, dict[str, Pair]] = {}
    for pair in pairs:  # one question may stand twice in a file, with an answer for each
        by_text.setdefault(pair.question.text.strip(), {})[pair.question.id] = pair
    by_question: dict[str, list[float]] = {}
    unmatched: Counter[str] = Counter()
    sessions = set()
    for vote in votes:
        if not vote.is_blind:
            unmatched["not blind, as a system named itself"] += 1
            continue
        same = by_text.get(question_text(vote).strip(), {}).values()
        sides = (vote.text_a.strip(), vote.text_b.strip())
        texts = {pair.question.id: tuple(answer.text.strip() for answer in pair.by_system) for pair in same}
        question = next((id for id, both in texts.items() if sides in (both, both[::-1])), None)
        if question is None:
            unmatched["on other answers to a judged question" if texts else "on another question"] += 1
            continue
        score = vote.score_a if sides[0] == texts[question][1] else 1 - vote.score_a
        if sides[0] == sides[1]:  # nobody can say which system it is that won
            score = 0.5
        by_question.setdefault(question, []).append(score)
        sessions.add(vote.session)
    means = {question: math.fsum(scores) / len(scores) for question, scores in by_question.items()}
    return MatchedVotes(means, sum(map(len, by_question.values())), len(sessions), dict(unmatched))


def corrected(
    folder: Path, votes: Sequence[Vote], *, ties: Ties | None = None, orders: Orders = "both", family: str | None = None
) -> JSONObject:
    """The results of `judge.results.redraw` with two more metrics, and under `votes` how they came about.

    `win_rate_human` is of the votes alone, `win_rate_human_corrected` of votes and judge. A tie is half a win in both,
    whatever `ties` says of the judge's own win rate.

    Raises:
        InputError: not a run of two systems, or no vote is on one of its judged pairs; see `redraw` too.
        StoreError: see `redraw`.
    """
    results = redraw(folder, ties=ties, orders=orders, family=family)
    run = StoredRun(folder)
    if run.graded:
        raise InputError(f"--votes: {folder} graded each answer by itself; give a run of two systems")
    names = [system["name"] for system in run.spec["settings"]["systems"].values()]
    if len(names) != 2:
        raise InputError(f"--votes: {folder} judged {len(names)} systems; give a run of two")
    if tuple(names) == SIDES:
        raise InputError(
            f"--votes: {folder} judged the two sides of an arena, and a system may stand on either; compare judge and "
            "voters by `almost-eval arena report --judge`"
        )
    # A vote is on one question and one answer of each system: of several turns or choices, on the first.
    cases = [case for case, _ in run.pairs.values()]
    pairs = [case for case in cases if isinstance(case, Pair) and (case.turn, case.choice) == (1, 1)]
    matched = match_votes(votes, pairs)
    reviews = [r for r in reviews_of(redrawn_records(run, orders, family)) if (r.turn, r.choice) == (1, 1)]
    judge = mean_scores(majority(reviews) if names_of(run.spec["settings"]["judge"]) else reviews)
    voted = [question for question in matched.scores if question in judge]
    if not voted:
        why = ", ".join(f"{n} {reason}" for reason, n in matched.unmatched.items()) or "the judge has no verdict there"
        raise InputError(f"--votes: none of {len(votes)} votes is on a judged pair of {folder} ({why})")
    elsewhere = [score for question, score in judge.items() if question not in matched.scores]
    both = corrected_mean([matched.scores[q] for q in voted], [judge[q] for q in voted], elsewhere)
    metrics = {HUMAN: both.human.to_dict(), CORRECTED: both.corrected.to_dict()}
    if not results["validity"]["passed"]:
        metrics[CORRECTED] |= withheld(results["validity"]["reason"])
    problem = None
    if len(voted) < MIN_VOTED:
        problem = f"{len(voted)} questions have a vote and a verdict; an interval and a correction need {MIN_VOTED}"
    elif not elsewhere:
        problem = "every judged question has a vote, so the judge adds nothing to the votes"
    facts = {
        "votes": len(votes),
        "matched": matched.matched,
        "sessions": matched.sessions,
        "unmatched": matched.unmatched,
        "questions_with_votes": len(voted),
        "questions_with_votes_and_no_verdict": len(matched.scores) - len(voted),
        "questions_without_votes": len(elsewhere),
        "power": both.power,
        "worth": both.worth,
        "problem": problem,
    }
    return {**results, "metrics": results["metrics"] | metrics, "votes": facts}


def keep(folder: Path, results: JSONObject) -> Path:
    """Write what `corrected` returned of the votes into the run's folder, for its page.

    Raises:
        RunError: it cannot be written.
    """
    names = ("win_rate", HUMAN, CORRECTED)
    kept = {"metrics": {name: results["metrics"][name] for name in names}, "votes": results["votes"]}
    try:
        write_json(folder / VOTES_FILE, kept)
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); leave --keep out") from None
    return folder / VOTES_FILE
