"""Rewards of pairs of real answers and of self-play candidates, on disk chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from almost_eval.files import Row
from almost_eval.progress import Progress
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Conversation, Message
from almost_train.common.resume import RowLog
from benchmarks.real_world.data import Pair

CHUNK = 64
"""Rows that are scored, and are on disk, together."""


def score_pairs(pairs: Sequence[Pair], model: Path, file: Path, progress: Progress) -> None:
    """Write a row for each pair: number, cluster, rewards (raw logits; null where too long), characters of both."""
    with _missing(file, len(pairs), progress) as (log, chunks):
        scorer: HFRewardModel | None = None
        for numbers in chunks:
            scorer = scorer or HFRewardModel(str(model), dtype="bfloat16")
            own = [pairs[number] for number in numbers]
            rewards = _rewards(scorer, [dialogue for pair in own for dialogue in (pair.chosen, pair.rejected)])
            rows: list[Row] = [
                {
                    "number": number,
                    "cluster": pair.cluster,
                    "chosen_reward": rewards[2 * place],
                    "rejected_reward": rewards[2 * place + 1],
                    "chosen_chars": len(pair.chosen[-1].content),
                    "rejected_chars": len(pair.rejected[-1].content),
                }
                for place, (number, pair) in enumerate(zip(numbers, own, strict=True))
            ]
            log.append(*rows)


def score_candidates(
    turns: Sequence[Row], prompts: Mapping[str, str], model: Path, file: Path, progress: Progress
) -> None:
    """Write a row for each dialogue: number, id, both rewards of each valid candidate of its first turn.

    Args:
        turns: rows of `candidates.jsonl`, of first turns.
        prompts: id -> the first user turn.
        model: the second reward model.
        file: where to write.
        progress: where to report.
    """
    with _missing(file, len(turns), progress) as (log, chunks):
        scorer: HFRewardModel | None = None
        for numbers in chunks:
            scorer = scorer or HFRewardModel(str(model), dtype="bfloat16")
            valid = [[c for c in turns[number]["candidates"] if c["rejected"] is None] for number in numbers]
            rewards = iter(
                _rewards(
                    scorer,
                    [
                        (Message("user", prompts[turns[number]["id"]]), Message("assistant", candidate["text"]))
                        for number, own in zip(numbers, valid, strict=True)
                        for candidate in own
                    ],
                )
            )
            rows: list[Row] = [
                {
                    "number": number,
                    "id": turns[number]["id"],
                    "first": [candidate["reward"] for candidate in own],
                    "second": [next(rewards) for _ in own],
                }
                for number, own in zip(numbers, valid, strict=True)
            ]
            log.append(*rows)


class _missing:
    """A file of numbered rows, and the numbers that it lacks, in chunks."""

    def __init__(self, file: Path, count: int, progress: Progress) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.count, self.progress = file, count, progress

    def __enter__(self) -> tuple[RowLog, Iterator[list[int]]]:
        self.log = RowLog(self.file).__enter__()
        return self.log, self._chunks()

    def __exit__(self, *error: object) -> None:
        self.log.__exit__(*error)  # type: ignore[arg-type]

    def _chunks(self) -> Iterator[list[int]]:
        known = {row["number"] for row in self.log.rows}
        missing = [number for number in range(self.count) if number not in known]
        with self.progress.track(self.file.stem, self.count, len(known)) as advance:
            for start in range(0, len(missing), CHUNK):
                yield missing[start : start + CHUNK]
                advance(len(missing[start : start + CHUNK]))


def _rewards(scorer: HFRewardModel, dialogues: Sequence[Conversation]) -> list[float | None]:
    """Raw logits; None of a dialogue that the model cannot read whole."""
    lengths = scorer.lengths(dialogues)
    fit = [k for k, length in enumerate(lengths) if length <= scorer.context_length]
    rewards: list[float | None] = [None] * len(dialogues)
    for index, reward in scorer.stream([dialogues[k] for k in fit]):
        rewards[fit[index]] = reward
    return rewards
