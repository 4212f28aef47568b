"""Human preferences from a blind arena: votes on disk, and what they say.

A vote is stored with everything that was on the screen: the prompt, both answers whole, which system stood on which
side, the settings, a random session id, and nothing about the person. The report counts a tie and "both bad" as half a
win for each side and shows how many there were; every interval is clustered by session, since one person's votes are
not independent. Strengths are Bradley-Terry's (`stats.bradley_terry`).

SQLite in WAL mode with `synchronous=FULL`: several processes and threads may vote at once, a vote is on disk before
its voter is told so, and neither a killed process nor a power cut loses it.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from almost_eval.errors import InputError, RunError, StoreError
from almost_eval.stats import bradley_terry, mean_metric
from almost_eval.types import Metric

VOTES = ("a", "b", "tie", "both_bad")
"""What can be voted: the side that is better, neither, or neither being any good."""

RESAMPLES = 500
"""Of whole sessions, for the intervals of strengths and of kappa."""

_APPLICATION = 0x414C4D56  # "ALMV": tells a vote file from any other SQLite file
_VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS votes (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, prompt TEXT NOT NULL, source TEXT NOT NULL,
  system_a TEXT NOT NULL, system_b TEXT NOT NULL, text_a TEXT NOT NULL, text_b TEXT NOT NULL,
  vote TEXT NOT NULL CHECK (vote IN ('a', 'b', 'tie', 'both_bad')),
  reward_a REAL, reward_b REAL, settings TEXT NOT NULL, recorded TEXT NOT NULL
) STRICT
"""


@dataclass(frozen=True, slots=True)
class Vote:
    """One round and its verdict."""

    id: str
    """Of the round: a second vote on it is refused."""
    session: str
    """Random, one for each visitor's page; says nothing about who it is."""
    prompt: tuple[Mapping[str, str], ...]
    """Messages, as both systems were sent them."""
    source: str
    """`typed`, or the id of the question that was drawn."""
    system_a: str
    """Name of the system whose answer was shown as A."""
    system_b: str
    text_a: str
    """The answer, whole."""
    text_b: str
    vote: str
    """One of `VOTES`."""
    reward_a: float | None = None
    """Raw logit of the reward model, where there is one; not shown before the vote."""
    reward_b: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How both answers were drawn, and the seed that shuffled the sides."""
    recorded: str = ""
    """UTC, ISO 8601, to the second; set when it is stored."""

    @property
    def score_a(self) -> float:
        """1 where A won, 0 where B did, else 0.5."""
        return {"a": 1.0, "b": 0.0}.get(self.vote, 0.5)

    def to_dict(self) -> dict[str, Any]:
        """A line of the export."""
        return asdict(self) | {"prompt": [dict(message) for message in self.prompt]}


class VoteStore:
    """A file of votes. Any number of stores may have it open, in this process and in others.

    Args:
        path: the SQLite file; it and its folder are made at the first vote.

    Raises:
        StoreError: there is something else in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            with self._open():
                pass

    def append(self, vote: Vote) -> None:
        """Store one vote; it is on disk when this returns.

        Raises:
            InputError: the round has been voted on, or `vote` is none of `VOTES`.
            RunError: the disk is full or gone, or the file stayed locked.
        """
        if vote.vote not in VOTES:
            raise InputError(f"unknown vote {vote.vote!r}; known: {', '.join(VOTES)}")
        row = vote.to_dict()
        row |= {"prompt": _json(row["prompt"]), "settings": _json(dict(vote.settings))}
        row["recorded"] = vote.recorded or datetime.now(UTC).isoformat(timespec="seconds")
        places = ", ".join(f":{name}" for name in row)
        try:
            with self._open() as connection:
                connection.execute(f"INSERT INTO votes ({', '.join(row)}) VALUES ({places})", row)
        except sqlite3.IntegrityError:
            raise InputError("this round has a vote already; start the next one") from None
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"the vote could not be stored in {self.path} ({error})") from None

    def votes(self) -> list[Vote]:
        """All of them, in the order they were cast.

        Raises:
            StoreError: no such file, or another kind of file.
        """
        if not self.path.is_file():
            raise StoreError(f"no votes at {self.path}; give the file that almost-chat --votes wrote")
        with self._open() as connection:
            return [_vote(row) for row in connection.execute("SELECT * FROM votes ORDER BY rowid")]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # A connection for each use: opening takes a fraction of a millisecond, and no thread ever shares one.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path} cannot be opened ({error}); give another file for the votes") from None
        with closing(connection):
            connection.row_factory = sqlite3.Row
            try:
                self._adopt(connection)
            except sqlite3.DatabaseError as error:
                raise StoreError(f"{self.path} is no file of votes ({error}); give another one") from None
            yield connection

    def _adopt(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # one view of the three, whoever may be making the file at this moment
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        connection.execute("COMMIT")
        if application == _APPLICATION and version == _VERSION:
            connection.execute("PRAGMA synchronous = FULL")
            return
        if application == _APPLICATION or tables:
            made = f"version {version} of this toolkit's votes" if application == _APPLICATION else "another program's"
            raise StoreError(f"{self.path} is {made}, which this version does not read; give another file")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")  # two processes may find it empty at once: the second finds it made
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("COMMIT")


def _vote(row: sqlite3.Row) -> Vote:
    values = dict(row)
    return Vote(**values | {"prompt": tuple(json.loads(values["prompt"])), "settings": json.loads(values["settings"])})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# --- what the votes say ---


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
class Agreement:
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
class ArenaReport:
    """Everything the votes say."""

    votes: int
    sessions: int
    counts: Mapping[str, int]
    """Vote -> how often."""
    systems: Mapping[str, Metric]
    """System -> win rate over all its rounds."""
    pairs: tuple[PairReport, ...]
    strengths: Mapping[str, float] | None
    """Log strengths, mean zero; None where they are not finite, for `strengths_reason`."""
    strengths_ci95: Mapping[str, tuple[float, float]] | None
    """Percentile interval over resampled sessions; None with fewer than two, or where many resamples are not finite."""
    strengths_reason: str | None
    position: Metric
    """Share of the votes with a winner that went to side A; 0.5 where the voters do not look at the side."""
    agreement: tuple[Agreement, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "votes": self.votes,
            "sessions": self.sessions,
            "counts": dict(self.counts),
            "systems": {name: metric.to_dict() for name, metric in self.systems.items()},
            "pairs": [asdict(pair) | {"win_rate": pair.win_rate.to_dict()} for pair in self.pairs],
            "bradley_terry": {
                "strengths": self.strengths and dict(self.strengths),
                "ci95": self.strengths_ci95 and {name: list(ends) for name, ends in self.strengths_ci95.items()},
                "reason": self.strengths_reason,
            },
            "position": self.position.to_dict(),
            "agreement": [asdict(one) | {"rate": one.rate.to_dict()} for one in self.agreement],
        }


def report(
    votes: Sequence[Vote], judges: Mapping[str, Mapping[str, str]] | None = None, *, seed: int = 0
) -> ArenaReport:
    """What the votes say.

    Args:
        votes: of one arena.
        judges: name of a judge -> vote id -> `a`, `b` or `tie`.
        seed: of the resamples.

    Raises:
        InputError: there are no votes.
    """
    if not votes:
        raise InputError("there are no votes yet; cast some in the Arena tab of almost-chat")
    rng = np.random.default_rng(seed)
    names = sorted({name for vote in votes for name in (vote.system_a, vote.system_b)})
    decisive = [vote for vote in votes if vote.vote in ("a", "b")]
    strengths, ends, reason = _strengths(votes, names, rng)
    machines = {"reward model": _by_reward(votes), **(judges or {})}
    return ArenaReport(
        votes=len(votes),
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
        strengths_ci95=ends,
        strengths_reason=reason,
        position=mean_metric([float(vote.vote == "a") for vote in decisive], [vote.session for vote in decisive]),
        agreement=tuple(_agreement(votes, name, verdicts, rng) for name, verdicts in machines.items() if verdicts),
    )


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's kappa of two raters over the same items: (p_o - p_e) / (1 - p_e).

    None without items, and where chance alone would agree always (both used one and the same word throughout).
    """
    if len(first) != len(second):
        raise ValueError(f"ratings are not paired: {len(first)} and {len(second)}")
    if not first:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    of_first, of_second = Counter(first), Counter(second)
    chance = sum(of_first[word] * of_second[word] for word in of_first) / len(first) ** 2
    return None if chance == 1.0 else (observed - chance) / (1 - chance)


def judge_verdicts(folder: Path) -> dict[str, str]:
    """Vote id -> what a judge run says of the pair: `a`, `b` or `tie`; where it saw both orders, their mean.

    Args:
        folder: a run of `almost-eval vicuna` over the files of `export`, side A as the baseline.

    Raises:
        StoreError: no run folder, or not of those files.
    """
    from almost_eval.run.store import read_samples, read_spec

    read_spec(folder)
    scores: dict[str, list[float]] = {}
    for record in read_samples(folder):
        told = record.sample.metadata
        if (told.get("baseline"), told.get("model")) != SIDES:
            raise StoreError(f"{folder} judged other files; judge those of `arena export`, answers-a as --baseline")
        if record.score.value is not None:
            scores.setdefault(record.sample.cluster, []).append(record.score.value)
    means = {vote: sum(found) / len(found) for vote, found in scores.items()}
    return {vote: "tie" if mean == 0.5 else "b" if mean > 0.5 else "a" for vote, mean in means.items()}


SIDES = ("side-a", "side-b")
"""`model_id` of the two exported answer files: a judge must not know the systems either."""


def export(votes: Sequence[Vote], folder: Path) -> list[Path]:
    """Write the votes as JSONL, and their pairs as FastChat's question and answer files for a judge.

    Returns:
        `votes.jsonl`, `questions.jsonl`, `answers-a.jsonl`, `answers-b.jsonl`.

    Raises:
        RunError: the folder cannot be written.
    """
    asked = [" ".join(m["content"] for m in vote.prompt if m["role"] == "user") for vote in votes]
    lines: dict[str, list[dict[str, Any]]] = {
        "votes": [vote.to_dict() for vote in votes],
        "questions": [
            {"question_id": vote.id, "text": text, "category": "arena"} for vote, text in zip(votes, asked, strict=True)
        ],
        "answers-a": [{"question_id": vote.id, "text": vote.text_a, "model_id": SIDES[0]} for vote in votes],
        "answers-b": [{"question_id": vote.id, "text": vote.text_b, "model_id": SIDES[1]} for vote in votes],
    }
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in lines.items():
            file = folder / f"{name}.jsonl"
            file.write_text("".join(_json(row) + "\n" for row in rows), encoding="utf-8")
            files.append(file)
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error.strerror}); choose another folder") from None
    return files


def _win_rate(votes: Sequence[Vote], name: str) -> Metric:
    mine = [vote for vote in votes if name in (vote.system_a, vote.system_b) and vote.system_a != vote.system_b]
    scores = [vote.score_a if vote.system_a == name else 1 - vote.score_a for vote in mine]
    return mean_metric(scores, [vote.session for vote in mine])


def _pair(votes: Sequence[Vote], name: str, other: str) -> PairReport:
    theirs = [vote for vote in votes if {vote.system_a, vote.system_b} == {name, other}]
    won = [{"a": vote.system_a, "b": vote.system_b}.get(vote.vote) for vote in theirs]
    counts = Counter(vote.vote for vote in theirs)
    rate = _win_rate(theirs, name)
    return PairReport(name, other, won.count(name), won.count(other), counts["tie"], counts["both_bad"], rate)


def _strengths(
    votes: Sequence[Vote], names: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, float] | None, dict[str, tuple[float, float]] | None, str | None]:
    place = {name: i for i, name in enumerate(names)}

    def fit(chosen: Sequence[Vote]) -> list[float]:
        wins = np.zeros((len(names), len(names)))
        for vote in chosen:
            a, b = place[vote.system_a], place[vote.system_b]
            if a != b:
                wins[a, b] += vote.score_a
                wins[b, a] += 1 - vote.score_a
        return [float(strength) for strength in bradley_terry(wins)]

    try:
        found = fit(votes)
    except ValueError:
        return None, None, "some systems have only won or only lost, so their strength has no finite estimate: vote on"
    drawn = _resampled(fit, votes, rng)
    if drawn is None:
        return dict(zip(names, found, strict=True)), None, None
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    ends = {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
    return dict(zip(names, found, strict=True)), ends, None


def _by_reward(votes: Sequence[Vote]) -> dict[str, str]:
    return {
        vote.id: "tie" if vote.reward_a == vote.reward_b else "a" if vote.reward_a > vote.reward_b else "b"
        for vote in votes
        if vote.reward_a is not None and vote.reward_b is not None
    }


def _agreement(votes: Sequence[Vote], source: str, verdicts: Mapping[str, str], rng: np.random.Generator) -> Agreement:
    both = [vote for vote in votes if vote.id in verdicts]
    decisive = [vote for vote in both if vote.vote in ("a", "b") and verdicts[vote.id] in ("a", "b")]
    same = [float(vote.vote == verdicts[vote.id]) for vote in decisive]

    def fit(chosen: Sequence[Vote]) -> list[float]:
        human = ["tie" if vote.vote == "both_bad" else vote.vote for vote in chosen]
        found = kappa(human, [verdicts[vote.id] for vote in chosen])
        if found is None:
            raise ValueError("kappa is not defined")
        return [found]

    try:
        value: float | None = fit(both)[0]
    except ValueError:
        value = None
    drawn = None if value is None else _resampled(fit, both, rng)
    ends = None
    if drawn is not None:
        low, high = np.quantile(np.array(drawn)[:, 0], [0.025, 0.975])
        ends = (float(low), float(high))
    rate = mean_metric(same, [vote.session for vote in decisive])
    return Agreement(source, len(both), len(decisive), rate, value, ends)


def _resampled(
    fit: Callable[[Sequence[Vote]], list[float]], votes: Sequence[Vote], rng: np.random.Generator
) -> list[list[float]] | None:
    """`fit` on whole sessions drawn with replacement; None with fewer than two, or where over 5 % have no estimate."""
    sessions: dict[str, list[Vote]] = {}
    for vote in votes:
        sessions.setdefault(vote.session, []).append(vote)
    groups = list(sessions.values())
    if len(groups) < 2:
        return None
    drawn = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(groups), size=len(groups))
        try:
            drawn.append(fit([vote for g in chosen for vote in groups[g]]))
        except ValueError:
            continue
    return drawn if len(drawn) >= 0.95 * RESAMPLES else None
