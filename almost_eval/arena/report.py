"""What the votes of a blind arena say: win rates, strengths, position bias, and agreement with machines.

A tie and "both bad" count as half a win for each side, and the report shows how many there were. Every interval is
clustered by session, since one person's votes are not independent. Strengths are Bradley-Terry's. A round in which a
system named itself was not blind: its vote is counted as such, and is in no other figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from almost_eval.arena.votes import VOTES, Vote
from almost_eval.errors import InputError, RunError, StoreError
from almost_eval.files import json_line, whole_file
from almost_eval.judge.aggregate import mean_scores
from almost_eval.judge.lines import reviews_of
from almost_eval.run.store import read_samples, read_spec
from almost_eval.stats import bradley_terry, bradley_terry_bootstrap, cohen_kappa, draw_members, mean_metric
from almost_eval.types import JSONObject, Metric

RESAMPLES = 500
"""Of whole sessions, for the intervals of strengths and of kappa."""
MAX_FAILED = 0.05
"""Share of the resamples that may have no estimate; above it there is no interval."""
SIDES = ("side-a", "side-b")
"""`model_id` of the two exported answer files: a judge must not know the systems either."""


@dataclass(frozen=True, slots=True)
class PairReport:
    """Two systems against each other."""

    system: str
    other: str
    wins: int
    """Of `system`."""
    losses: int
    ties: int
    both_bad: int
    win_rate: Metric
    """Of `system`; a tie and "both bad" count half."""


@dataclass(frozen=True, slots=True)
class VoterAgreement:
    """How far the voters and a machine say the same of the same pairs."""

    source: str
    """`reward model`, or the judge run."""
    n: int
    """Pairs that both judged; on `decisive` of them both name a winner."""
    decisive: int
    rate: Metric
    """Share of the decisive pairs on which they name the same one."""
    kappa: float | None
    """Cohen's kappa over a, b and tie ("both bad" being a tie); None where it is not defined."""
    kappa_ci95: tuple[float, float] | None
    """Percentile interval over resampled sessions."""


@dataclass(frozen=True, slots=True)
class Strengths:
    """Bradley-Terry log strengths of the systems."""

    values: Mapping[str, float] | None = None
    """Mean zero; None where they are not finite, for `reason`."""
    ci95: Mapping[str, tuple[float, float]] | None = None
    """Percentile interval over resampled sessions; None with fewer than two, or where many resamples are not finite."""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ArenaReport:
    """Everything the votes say."""

    votes: int
    """In the figures; `named` come on top."""
    named: int
    """Votes that were not blind: a system named itself."""
    sessions: int
    counts: Mapping[str, int]
    """Vote -> how often."""
    systems: Mapping[str, Metric]
    """System -> win rate over all its rounds."""
    pairs: tuple[PairReport, ...]
    strengths: Strengths
    position: Metric
    """Share of the votes with a winner that went to side A; 0.5 where the voters do not look at the side."""
    agreement: tuple[VoterAgreement, ...]

    def to_dict(self) -> JSONObject:
        """JSON."""
        strengths = self.strengths
        return {
            "votes": self.votes,
            "named": self.named,
            "sessions": self.sessions,
            "counts": dict(self.counts),
            "systems": {name: metric.to_dict() for name, metric in self.systems.items()},
            "pairs": [asdict(pair) | {"win_rate": pair.win_rate.to_dict()} for pair in self.pairs],
            "bradley_terry": {
                "strengths": strengths.values and dict(strengths.values),
                "ci95": strengths.ci95 and {name: list(ends) for name, ends in strengths.ci95.items()},
                "reason": strengths.reason,
            },
            "position": self.position.to_dict(),
            "agreement": [asdict(one) | {"rate": one.rate.to_dict()} for one in self.agreement],
        }


def report(
    votes: Sequence[Vote], judges: Mapping[str, Mapping[str, str]] | None = None, *, seed: int = 0
) -> ArenaReport:
    """What the votes of one arena say; `judges` is name of a judge -> vote id -> `a`, `b` or `tie`.

    Raises:
        InputError: there are no votes, or none that was blind.
    """
    if not votes:
        raise InputError("there are no votes yet; cast some in the Arena tab of almost-chat")
    every, votes = votes, [vote for vote in votes if vote.is_blind]
    if not votes:
        raise InputError(f"in each of the {len(every)} rounds a system named itself, so no vote was blind; cast others")
    rng = np.random.default_rng(seed)
    names = sorted({name for vote in votes for name in (vote.system_a, vote.system_b)})
    decisive = [vote for vote in votes if vote.vote in ("a", "b")]
    strengths = _strengths(votes, names, rng)
    machines = {"reward model": _by_reward(votes), **(judges or {})}
    return ArenaReport(
        votes=len(votes),
        named=len(every) - len(votes),
        sessions=len({vote.session for vote in votes}),
        counts={name: Counter(vote.vote for vote in votes)[name] for name in VOTES},
        systems={name: _win_rate(votes, name) for name in names},
        pairs=tuple(
            _pair(votes, name, other)
            for i, name in enumerate(names)
            for other in names[i + 1 :]
            if any({vote.system_a, vote.system_b} == {name, other} for vote in votes)
        ),
        strengths=strengths,
        position=mean_metric([float(vote.vote == "a") for vote in decisive], [vote.session for vote in decisive]),
        agreement=tuple(_agreement(votes, name, verdicts, rng) for name, verdicts in machines.items() if verdicts),
    )


def _win_rate(votes: Sequence[Vote], name: str, *, clustered: bool = True) -> Metric:
    mine = [vote for vote in votes if name in (vote.system_a, vote.system_b) and vote.system_a != vote.system_b]
    scores = [vote.score_a if vote.system_a == name else 1 - vote.score_a for vote in mine]
    return mean_metric(scores, [vote.session for vote in mine] if clustered else None)


@dataclass(frozen=True, slots=True)
class Board:
    """How the systems stand now."""

    rates: Mapping[str, Metric]
    """System -> win rate over all its rounds, the best first."""
    votes: int
    """Blind ones, all in the rates."""
    sessions: int
    """With fewer than two the intervals cannot be clustered: they take one person's votes as independent."""
    named: int
    """Votes that were not blind, in no rate."""


def board(votes: Sequence[Vote]) -> Board:
    """The win rates alone, quick enough for a page that shows them after each vote."""
    blind = [vote for vote in votes if vote.is_blind]
    names = sorted({name for vote in blind for name in (vote.system_a, vote.system_b)})
    sessions = len({vote.session for vote in blind})
    rates = {name: _win_rate(blind, name, clustered=sessions > 1) for name in names}
    ranked = sorted(rates, key=lambda name: -(rates[name].value or 0.0))
    return Board({name: rates[name] for name in ranked}, len(blind), sessions, len(votes) - len(blind))


def _pair(votes: Sequence[Vote], name: str, other: str) -> PairReport:
    theirs = [vote for vote in votes if {vote.system_a, vote.system_b} == {name, other}]
    won = [{"a": vote.system_a, "b": vote.system_b}.get(vote.vote) for vote in theirs]
    counts = Counter(vote.vote for vote in theirs)
    rate = _win_rate(theirs, name)
    return PairReport(name, other, won.count(name), won.count(other), counts["tie"], counts["both_bad"], rate)


def _strengths(votes: Sequence[Vote], names: Sequence[str], rng: np.random.Generator) -> Strengths:
    place = {name: i for i, name in enumerate(names)}
    session = {name: g for g, name in enumerate(dict.fromkeys(vote.session for vote in votes))}
    wins = np.zeros((len(session), len(names), len(names)))  # (G, P, P) [g, i, j]: how often i beat j in session g
    for vote in votes:
        g, a, b = session[vote.session], place[vote.system_a], place[vote.system_b]
        if a != b:
            wins[g, a, b] += vote.score_a
            wins[g, b, a] += 1 - vote.score_a
    try:
        strengths = bradley_terry(wins.sum(axis=0))
    except ValueError:
        reason = "some systems have only won or only lost, so their strength has no finite estimate: vote on"
        return Strengths(reason=reason)
    values = {name: float(strengths[i]) for name, i in place.items()}
    resampled = bradley_terry_bootstrap(wins, n_resamples=RESAMPLES, rng=rng, draw=draw_members, max_failed=MAX_FAILED)
    if resampled is None:
        return Strengths(values)
    ends, _ = resampled  # (P, 2)
    return Strengths(values, {name: (float(ends[i, 0]), float(ends[i, 1])) for name, i in place.items()})


def _by_reward(votes: Sequence[Vote]) -> dict[str, str]:
    return {
        vote.id: "tie" if vote.reward_a == vote.reward_b else "a" if vote.reward_a > vote.reward_b else "b"
        for vote in votes
        if vote.reward_a is not None and vote.reward_b is not None
    }


def _agreement(
    votes: Sequence[Vote], source: str, verdicts: Mapping[str, str], rng: np.random.Generator
) -> VoterAgreement:
    both = [vote for vote in votes if vote.id in verdicts]
    decisive = [vote for vote in both if vote.vote in ("a", "b") and verdicts[vote.id] in ("a", "b")]
    same = [float(vote.vote == verdicts[vote.id]) for vote in decisive]
    kappa = cohen_kappa(
        [("tie" if vote.vote == "both_bad" else vote.vote, verdicts[vote.id]) for vote in both],
        [vote.session for vote in both],
        n_resamples=RESAMPLES,
        rng=rng,
        draw=draw_members,
        max_failed=MAX_FAILED,
    )
    rate = mean_metric(same, [vote.session for vote in decisive])
    return VoterAgreement(source, len(both), len(decisive), rate, kappa.value, kappa.ci95)


# --- a judge's run over the same pairs ---


def judge_verdicts(folder: Path) -> dict[str, str]:
    """Vote id -> what a judge run says of the pair: `a`, `b` or `tie`; where it saw both orders, their mean.

    The run is one of `almost-eval vicuna` over the files of `export`, side A as the baseline.

    Raises:
        StoreError: no run folder, or not of those files.
    """
    read_spec(folder)
    reviews = reviews_of(list(read_samples(folder)))
    if any((review.baseline, review.model) != SIDES for review in reviews):
        raise StoreError(f"{folder} judged other files; judge those of `arena export`, answers-a as --baseline")
    means = mean_scores(reviews)
    return {vote: "tie" if mean == 0.5 else "b" if mean > 0.5 else "a" for vote, mean in means.items()}


def question_text(vote: Vote) -> str:
    """The prompt as one question: what its user's turns say."""
    return " ".join(message["content"] for message in vote.prompt if message["role"] == "user")


def export(votes: Sequence[Vote], folder: Path) -> list[Path]:
    """Write the votes as JSONL, and their pairs as FastChat's question and answer files for a judge.

    Returns:
        `votes.jsonl`, `questions.jsonl`, `answers-a.jsonl`, `answers-b.jsonl`.

    Raises:
        RunError: the folder cannot be written.
    """
    lines: dict[str, list[JSONObject]] = {
        "votes": [vote.to_dict() for vote in votes],
        "questions": [{"question_id": vote.id, "text": question_text(vote), "category": "arena"} for vote in votes],
    }
    for side, name in zip("ab", SIDES, strict=True):  # all answers as one text, as `question_text` has all questions
        lines[f"answers-{side}"] = [
            {"question_id": vote.id, "text": "\n\n".join(vote.answers(side)), "model_id": name} for vote in votes
        ]
    try:
        for name, rows in lines.items():
            with whole_file(folder / f"{name}.jsonl") as stream:
                stream.writelines(json_line(row).encode() for row in rows)
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); choose another folder") from None
    return [folder / f"{name}.jsonl" for name in lines]
