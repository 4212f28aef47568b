"""Votes of people as cases that a judge can be checked on, from three kinds of files.

- the arena's own, or the `votes.jsonl` of its export;
- pairs of hh-rlhf (`.jsonl` or `.jsonl.gz`), two dialogues `chosen` and `rejected` that differ in their last answer;
- MT-Bench's human judgments (`.jsonl`), with `model_a`, `conversation_a`, `winner`, `turn` and so on.

A pair of hh-rlhf has no places: which answer is Assistant 1 follows from the text's digest, for half of the pairs each.
What is no vote on one pair of answers (a second turn, whose first turns differ) is counted by its reason.
"""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from almost_eval.arena.report import question_text
from almost_eval.arena.votes import Vote, read_votes
from almost_eval.errors import DataError, problem_of
from almost_eval.files import Row, parse_lines
from almost_eval.judge.cases import HumanVote
from almost_eval.judge.records import Side
from almost_eval.types import JSONMapping

_WINNERS: dict[str, Side] = {"a": "1", "b": "2", "model_a": "1", "model_b": "2"}
"""Anything else that a file may say is a tie: `tie`, `both_bad`, `tie (inconsistent)`."""
_ANSWER = "\n\nAssistant:"


def read_human_votes(path: Path) -> tuple[list[HumanVote], dict[str, int]]:
    """The votes of a file, and why a row is none -> how many.

    Raises:
        DataError: no such file, no vote in it, or a row that is of none of these kinds.
        StoreError: a database that is no file of votes.
    """
    if path.suffix not in (".jsonl", ".gz"):
        return [_of_arena(vote) for vote in read_votes(path)], {}
    rows = _rows(path)
    if rows and "system_a" in rows[0]:
        return [_of_arena(vote) for vote in read_votes(path)], {}
    votes: list[HumanVote] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            vote = _of_transcripts(row) if "chosen" in row else _of_mt_bench(row)
        except (LookupError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is no vote ({problem_of(error)}); give an arena's file, hh-rlhf's pairs or "
                "MT-Bench's human judgments"
            ) from None
        if isinstance(vote, HumanVote):
            votes.append(vote)
        else:
            left_out[vote] += 1
    if not votes:
        raise DataError(f"{path} holds no vote on a pair of answers")
    return votes, dict(left_out)


def _rows(path: Path) -> list[Row]:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({problem_of(error)}); give a file of votes") from None
    rows = [row for _, row in parse_lines(str(path), text, unit="line")]
    if wrong := next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
        raise DataError(f"malformed data: {path}, line {wrong}: not a JSON object")
    return rows


def _of_arena(vote: Vote) -> HumanVote:
    systems = (vote.system_a, vote.system_b)
    return HumanVote(question_text(vote), vote.text_a, vote.text_b, _WINNERS.get(vote.vote, "tie"), systems)


def _of_transcripts(row: JSONMapping) -> HumanVote | str:
    """A pair of dialogues that differ in their last answer."""
    chosen, _, better = str(row["chosen"]).rpartition(_ANSWER)
    rejected, _, worse = str(row["rejected"]).rpartition(_ANSWER)
    if chosen != rejected:
        return "the dialogues differ before their last answer"
    if better.strip() == worse.strip():
        return "both answers are the same"
    turns = chosen.strip()
    question = turns.removeprefix("Human:").strip() if turns.count("\n\nHuman:") == 0 else turns
    first = hashlib.sha256((better + worse).encode()).digest()[0] % 2 == 0
    texts = (better.strip(), worse.strip())
    return HumanVote(question, *(texts if first else texts[::-1]), "1" if first else "2")


def _of_mt_bench(row: JSONMapping) -> HumanVote | str:
    if row["turn"] != 1:
        return "of a second turn, whose first turns differ"
    sides: list[Sequence[JSONMapping]] = [row["conversation_a"], row["conversation_b"]]
    first, second = (str(side[1]["content"]) for side in sides)
    question = str(sides[0][0]["content"])
    winner = _WINNERS.get(str(row["winner"]), "tie")
    return HumanVote(question, first, second, winner, (str(row["model_a"]), str(row["model_b"])))
