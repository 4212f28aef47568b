"""`synthesize comparisons`: pairs of answers by rank, filtered, in TRL's preference format.

ALMoST (arXiv 2305.13735, section 2.1). The filters are applied in this order; a dropped pair is kept in a file of its
own, with the reason:

1. `responses`, `length`, `one_win_a_rank`: the heuristic filter, see `ranking`.
2. `identical`: both answers are the same text (ours; the official code keeps such a pair).
3. `as_is`: a reward model trained on another source of preferences must agree (the paper's second filter; the official
   code does not have it).
4. `balance`: a departure of ours, off by default. The length rule drops only pairs whose chosen answer is the shorter:
   labels get better, but longer answers win more often. `balance_length` keeps as many pairs with the longer answer
   chosen as with the shorter, so that length tells nothing about the label.

Memory does not grow with the answers: they are read from their files prompt by prompt (`answers`), once to make and
judge the pairs and once for each file that is written. What is held of a pair is three bytes, of a prompt some 200.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from almost_eval.errors import DataError, RunError
from almost_eval.files import LineWriter, Row, iterate_rows, write_rows
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.progress import Progress
from almost_eval.types import JSONObject, Message
from almost_train.common.config import MOST_SEED, option
from almost_train.common.records import Preference
from almost_train.common.stage import Stage, model_input
from almost_train.synthetic.answers import AnsweredPrompt, AnswerFiles
from almost_train.synthetic.ranking import Ranking, ranked_pairs, read_ranking
from almost_train.synthetic.sampling import derived_rng

_HEURISTIC = {"responses": "bad_response", "length": "length_rule", "one_win_a_rank": "rank_has_pair"}
"""Step of the heuristic filter -> the reason that `ranking` gives."""

REWARD_BATCH = 5_000
"""Prompts whose answers the as-is reward model reads together: it sorts them by length, and holds their tokens."""

Indices = npt.NDArray[np.int64]
"""Pairs: those of the first prompt, in the order of `ranked_pairs`, then those of the second."""


@dataclass(frozen=True, slots=True)
class ComparisonSettings:
    """Settings of `synthesize comparisons`; the defaults are the official ones."""

    length_rule: bool = option(True, "Drop pairs whose chosen answer is shorter and far below the mean length.")
    pairs: str = option(
        "official", "Pairs of a prompt: at most one win for each rank, or all.", choices=("official", "all")
    )
    drop_identical: bool = option(True, "Drop pairs of two equal texts.")
    balance_length: bool = option(False, "Keep as many pairs with the longer answer chosen as with the shorter.")
    seed: int = option(0, "Seed of the draw of balance-length.", least=0, most=MOST_SEED)
    device: str = option("auto", "Where the as-is reward model runs.")


def synthesize_comparisons(
    settings: ComparisonSettings,
    responses: Path,
    ranking: Path,
    output: Path,
    *,
    as_is_reward_model: str | None = None,
    progress: Progress | None = None,
) -> JSONObject:
    """Write `comparisons.jsonl` and `comparisons.rejected.jsonl` (the same with `reason`) under `output`.

    A row has prompt, chosen and rejected as messages, chosen_source, rejected_source and prompt_id; after the as-is
    filter also chosen_as_is_reward and rejected_as_is_reward (raw logits).

    Args:
        settings: which filters to apply.
        responses: the folder of `synthesize responses`.
        ranking: `ranking.yaml`: see `read_ranking`. Configurations that it does not name are left out
            (metrics.not_ranked).
        output: the stage's folder.
        as_is_reward_model: a reward model's checkpoint for the second filter, or None.
        progress: where to report.

    Returns:
        `result.json`: metrics.filters says of each filter what went in and came out, what it dropped for which reason,
        and the share of its pairs whose chosen answer is the longer.

    Raises:
        InputError: a ranking that is malformed or names a configuration without answers; answers to other prompts; a
            reward model that cannot be loaded; a folder of another run.
        RunError: no pair is left.
    """
    checkpoint: Checkpoint | None = None
    if as_is_reward_model:  # a wrong checkpoint is refused here; the weights are loaded when the first pair needs them
        checkpoint = find_checkpoint(as_is_reward_model, architectures=("SequenceClassification", "RewardModel"))
    groups = read_ranking(ranking)
    files = _files(groups, responses)
    answers = AnswerFiles(files)
    inputs: dict[str, Path | str] = {"ranking": str([list(group) for group in groups])}
    inputs |= {f"responses {name}": file for name, file in files.items()}
    if as_is_reward_model:
        inputs["as_is_reward_model"] = model_input(as_is_reward_model)
    with Stage(output, "synthesize-comparisons", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result
        funnel = _Funnel(settings, groups, answers)
        # 1. The heuristic filter.
        for name, reason in _HEURISTIC.items():
            funnel.drop(name, {reason: funnel.kept[funnel.broken(reason)]})
        if settings.drop_identical:
            funnel.drop("identical", {"identical": funnel.kept[funnel.identical[funnel.kept]]})
        # 2. The as-is reward model.
        scored = output / ".as_is.jsonl"
        if checkpoint:
            with LineWriter(scored) as log:
                funnel.rewards = _Rewards(funnel, log)
                funnel.rewards.compute(checkpoint, settings.device, progress or Progress())
            funnel.drop("as_is", funnel.rewards.disagreements())
        # 3. Length balance.
        if settings.balance_length:
            funnel.drop("balance", {"length_balance": _surplus(funnel, settings.seed)})
        not_ranked = sorted({file.stem for file in responses.glob("*.jsonl")} - files.keys())
        # 4. The outputs.
        result = funnel.finish(stage, {"not_ranked": not_ranked})
        scored.unlink(missing_ok=True)
        return result


def _files(ranking: Ranking, responses: Path) -> dict[str, Path]:
    """Configuration -> its file, for all of the ranking."""
    files = {name: responses / f"{name}.jsonl" for group in ranking for name in group}
    absent = [name for name, file in files.items() if not file.is_file()]
    if absent:
        there = ", ".join(sorted(file.stem for file in responses.glob("*.jsonl"))) or "none"
        raise DataError(f"{responses} has no answers of the ranked configuration {absent[0]!r}; it has: {there}")
    return files


# --- the filters ---


class _Funnel:
    """All pairs, and which filter dropped which."""

    def __init__(self, settings: ComparisonSettings, ranking: Ranking, answers: AnswerFiles) -> None:
        self.answers = answers
        self.names = [name for group in ranking for name in group]
        """Configurations, best first."""
        ranks = [rank for rank, group in enumerate(ranking) for _ in group]
        places = [(a, b) for a, b in combinations(range(len(self.names)), 2) if ranks[a] != ranks[b]]
        self.chosen, self.rejected = np.array(places).T
        """Of each pair of a prompt: the places of its configurations among the names."""
        self.n = len(answers) * len(places)
        self.longer = np.zeros(self.n, np.int8)
        """1 where the chosen answer is the longer (in characters), -1 where it is the shorter."""
        self.identical = np.zeros(self.n, bool)
        self._heuristic = np.zeros(self.n, np.uint8)
        """What the heuristic filter says: the place of the reason in `_HEURISTIC`, from 1, or 0."""
        self._fates = np.zeros(self.n, np.uint8)
        """Why a pair is dropped: the place of the reason in `_reasons`, from 1, or 0."""
        self._reasons: list[str] = []
        self.kept: Indices = np.arange(self.n)
        self.rewards: _Rewards | None = None
        self._table: JSONObject = {}
        self._judge(settings, ranking)

    def _judge(self, settings: ComparisonSettings, ranking: Ranking) -> None:
        codes = {None: 0} | {reason: code for code, reason in enumerate(_HEURISTIC.values(), 1)}
        rules = {"length_rule": settings.length_rule, "one_win_a_rank": settings.pairs == "official"}
        index = 0
        for one in self.answers.read(range(len(self.answers))):
            for pair in ranked_pairs(one.id, one.answers, ranking, **rules):
                by = len(pair.chosen.text) - len(pair.rejected.text)
                self.longer[index] = (by > 0) - (by < 0)
                self.identical[index] = pair.chosen.text == pair.rejected.text
                self._heuristic[index] = codes[pair.reason]
                index += 1

    def broken(self, reason: str) -> npt.NDArray[np.bool_]:
        """Of each kept pair, whether the heuristic filter drops it for this reason."""
        code = list(_HEURISTIC.values()).index(reason) + 1
        return self._heuristic[self.kept] == code

    def prompts_of(self, indices: Indices) -> Indices:
        """The number of the prompt of each pair."""
        return indices // len(self.chosen)

    def drop(self, name: str, reasons: Mapping[str, Indices]) -> None:
        """Take pairs out, and note in the table what the filter did."""
        before = self.kept
        some = {reason: indices for reason, indices in reasons.items() if indices.size}
        for reason, indices in some.items():
            self._reasons.append(reason)
            self._fates[indices] = len(self._reasons)
        self.kept = before[self._fates[before] == 0]
        self._table[name] = {
            "in": before.size,
            "out": self.kept.size,
            "dropped": {reason: indices.size for reason, indices in sorted(some.items())},
            "chosen_longer_in": self._share(before),
            "chosen_longer_out": self._share(self.kept),
        }

    def finish(self, stage: Stage, more: Mapping[str, object]) -> JSONObject:
        """Write the outputs; `more` goes into the metrics. Raises RunError where no pair is left."""
        files = {name: stage.folder / f"{name}.jsonl" for name in ("comparisons", "comparisons.rejected")}
        dropped = self._rows(np.flatnonzero(self._fates), lambda i: {"reason": self._reasons[self._fates[i] - 1]})
        write_rows(files["comparisons.rejected"], dropped)
        if not self.kept.size:
            each = np.bincount(self._fates, minlength=len(self._reasons) + 1)[1:].tolist()
            most = sorted(zip(self._reasons, each, strict=True), key=lambda one: -one[1])
            counts = ", ".join(f"{reason} {n}" for reason, n in most)
            raise RunError(f"no pair of {self.n} is left ({counts}); see {files['comparisons.rejected']}")
        write_rows(files["comparisons"], self._rows(self.kept))
        each = np.bincount(self.kept % len(self.chosen), minlength=len(self.chosen)).tolist()
        sources = {self._source(at): n for at, n in enumerate(each) if n}
        metrics = {
            "prompts": len(self.answers),
            "prompts_with_pairs": np.unique(self.prompts_of(self.kept)).size,
            "comparisons": self.kept.size,
            "chosen_longer": self._share(self.kept),
            "filters": self._table,
            "sources": dict(sorted(sources.items())),
            **more,
        }
        return stage.finish(metrics, files)

    def with_prompts(self, indices: Indices) -> Iterator[tuple[AnsweredPrompt, int, Indices]]:
        """Each prompt of these pairs (ascending), its number, and its pairs among them."""
        numbers = self.prompts_of(indices)
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        ends = np.append(firsts, indices.size)[1:]
        numbers = numbers[firsts]
        prompts = self.answers.read(map(int, numbers))
        for one, number, first, end in zip(prompts, numbers, firsts, ends, strict=True):
            yield one, int(number), indices[first:end]

    def _rows(self, indices: Indices, more: Callable[[int], Row] = lambda i: {}) -> Iterator[Row]:
        """The rows of these pairs (ascending), each with what `more` says of it."""
        for one, number, mine in self.with_prompts(indices):
            for index in mine.tolist():
                sides = {"chosen": self._name(self.chosen, index), "rejected": self._name(self.rejected, index)}
                row = Preference(
                    prompt=(Message("user", one.prompt),),
                    chosen=(Message("assistant", one.answers[sides["chosen"]].text),),
                    rejected=(Message("assistant", one.answers[sides["rejected"]].text),),
                    chosen_source=sides["chosen"],
                    rejected_source=sides["rejected"],
                    prompt_id=one.id,
                ).to_row()
                if self.rewards is not None and self.rewards.any:
                    row |= {f"{role}_as_is_reward": self.rewards.of(number, name) for role, name in sides.items()}
                yield row | more(index)

    def _name(self, side: Indices, index: int) -> str:
        return self.names[side[index % len(side)]]

    def _source(self, place: int) -> str:
        return f"{self.names[self.chosen[place]]} > {self.names[self.rejected[place]]}"

    def _share(self, indices: Indices) -> float | None:
        """Of these pairs, how many have the longer text chosen, 0 to 1; equal lengths count as no."""
        return round(int((self.longer[indices] > 0).sum()) / indices.size, 4) if indices.size else None


class _Rewards:
    """Raw logits of the answers in kept pairs, by the as-is reward model; `log` has those of an earlier process."""

    def __init__(self, funnel: _Funnel, log: LineWriter) -> None:
        self._funnel = funnel
        self._log = log
        shape = len(funnel.answers), len(funnel.names)
        self._values = np.full(shape, np.nan)  # (prompts, configurations); NaN where it is not finite
        self._known = np.zeros(shape, bool)
        """False of an answer that is in no kept pair, or is longer than the model's context."""
        places = {name: place for place, name in enumerate(funnel.names)}
        for rows in _batches((row for _, row in iterate_rows(log.file)), REWARD_BATCH):
            numbers = funnel.answers.numbers([row["prompt_id"] for row in rows])
            for row, number in zip(rows, numbers.tolist(), strict=True):
                if number >= 0 and row["configuration"] in places:
                    self._enter(number, places[row["configuration"]], row["reward"])

    @property
    def any(self) -> bool:
        """Whether any answer has one."""
        return bool(self._known.any())

    def of(self, number: int, name: str) -> float | None:
        """The reward of an answer; None where it is not finite, or there is none."""
        value = float(self._values[number, self._funnel.names.index(name)])
        return None if math.isnan(value) else value

    def compute(self, checkpoint: Checkpoint, device: str, progress: Progress) -> None:
        """Compute those that are not known yet."""
        funnel = self._funnel
        wanted = np.zeros_like(self._known)
        numbers, pairs = funnel.prompts_of(funnel.kept), funnel.kept % len(funnel.chosen)
        wanted[numbers, funnel.chosen[pairs]] = wanted[numbers, funnel.rejected[pairs]] = True
        if not (wanted & ~self._known).any():
            return
        from almost_eval.rewards.hf import HFRewardModel

        model = HFRewardModel(checkpoint, device=device)
        with progress.track("as-is reward model", int(wanted.sum()), int((wanted & self._known).sum())) as advance:
            for batch in _batches(funnel.with_prompts(funnel.kept), REWARD_BATCH):
                # In the order of the pairs: which answers share a forward pass follows from it.
                ids = {number: one.id for one, number, _ in batch}
                texts = {
                    (number, int(side)): (Message("user", one.prompt), Message("assistant", one.answers[name].text))
                    for one, number, indices in batch
                    for pair in (indices % len(funnel.chosen)).tolist()
                    for side in (funnel.chosen[pair], funnel.rejected[pair])
                    for name in (funnel.names[side],)
                }
                missing = sum(not self._known[key] for key in texts)
                if not missing:
                    continue
                lengths = model.lengths(list(texts.values()))
                fit = [key for key, length in zip(texts, lengths, strict=True) if length <= model.context_length]
                todo = [i for i, key in enumerate(fit) if not self._known[key]]
                advance(missing - len(todo))  # too long
                for i, reward in model.stream([texts[key] for key in fit], todo):
                    (number, place), value = fit[i], reward if math.isfinite(reward) else None
                    row = {"prompt_id": ids[number], "configuration": funnel.names[place], "reward": value}
                    self._log.append(row)
                    self._enter(number, place, value)
                    advance(1)

    def disagreements(self) -> dict[str, Indices]:
        """Kept pairs in which the model does not prefer the chosen answer, or has no reward for one of the two."""
        funnel, kept = self._funnel, self._funnel.kept
        numbers, pairs = funnel.prompts_of(kept), kept % len(funnel.chosen)
        sides = [(numbers, side[pairs]) for side in (funnel.chosen, funnel.rejected)]
        known = self._known[sides[0]] & self._known[sides[1]]
        chosen, rejected = self._values[sides[0]], self._values[sides[1]]
        finite = known & ~np.isnan(chosen) & ~np.isnan(rejected)
        reasons = {
            "as_is_too_long": ~known,
            "as_is_not_finite": known & ~finite,
            "as_is_disagrees": finite & (chosen < rejected),
            "as_is_tie": finite & (chosen == rejected),
        }
        indices = {reason: kept[where] for reason, where in reasons.items() if where.any()}
        return dict(sorted(indices.items(), key=lambda one: int(one[1][0])))

    def _enter(self, number: int, place: int, reward: float | None) -> None:
        self._known[number, place] = True
        self._values[number, place] = math.nan if reward is None else reward


def _surplus(funnel: _Funnel, seed: int) -> Indices:
    """Kept pairs to drop, so that the chosen answer is as often the longer as the shorter."""
    longer = funnel.kept[funnel.longer[funnel.kept] > 0]
    shorter = funnel.kept[funnel.longer[funnel.kept] < 0]
    more, fewer = (longer, shorter) if longer.size > shorter.size else (shorter, longer)
    # A sample of places, and not of the array itself: that would be copied into a list of its values.
    drawn = derived_rng(seed, "balance-length").sample(range(more.size), more.size - fewer.size)
    return more[np.array(drawn, np.int64)]


_Item = TypeVar("_Item")


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch
