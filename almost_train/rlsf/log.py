"""The log of reinforcement learning, and the guards that stop it by what the log says. Uses no model and no torch.

A row of `log.jsonl` describes the policy *before* the update of that step. The last row has no update. A guard reads
the rows alone, so a resumed run stops where an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from almost_eval.errors import RunError
from almost_eval.files import LineWriter, Row, read_rows, write_rows
from almost_eval.run.trackers import Trackers
from almost_eval.types import JSONObject
from almost_train.common.resume import refuse_gaps

SAMPLES = 4
"""Completions of a step that go to samples.jsonl."""


class NotFinite(RunError):
    """A loss, a gradient, a reward or a KL is NaN or infinite.

    Args:
        message: says which, and at which step.
        untrained: before the first update: a lower learning rate would not help.
    """

    def __init__(self, message: str, untrained: bool = False) -> None:
        super().__init__(message)
        self.untrained = untrained


def batch_row(step: int, rewards: Sequence[float], lengths: Sequence[int], ended: Sequence[bool]) -> Row:
    """The part of a row that every algorithm has.

    Args:
        step: number of updates before this batch was sampled.
        rewards: raw logits of the reward model.
        lengths: tokens of each completion.
        ended: whether it ends in EOS.

    Raises:
        NotFinite: a reward.
    """
    refuse_non_finite(step, "reward", rewards)
    n = len(rewards)
    reward, length = sum(rewards) / n, sum(lengths) / n
    return {
        "step": step,
        "reward": reward,
        "reward_std": math.sqrt(sum((r - reward) ** 2 for r in rewards) / max(n - 1, 1)),
        "length": length,
        "length_variance": sum((x - length) ** 2 for x in lengths) / n,
        "reward_length_covariance": sum((r - reward) * (x - length) for r, x in zip(rewards, lengths, strict=True)) / n,
        "ended": sum(ended) / n,
    }


def refuse_non_finite(step: int, what: str, values: Sequence[float]) -> None:
    """Raise NotFinite where a value is NaN or infinite."""
    bad = sum(not math.isfinite(value) for value in values)
    if bad:
        untrained = step == 0 and what in ("reward", "KL")
        raise NotFinite(f"step {step}: {bad} of {len(values)} values of {what} are not finite", untrained)


# --- length ---


def length_slope(rows: Sequence[Row]) -> float:
    """Reward units a token: regression of reward on length within the steps, pooled over them; 0 without variance."""
    variance = sum(row["length_variance"] for row in rows)
    return sum(row["reward_length_covariance"] for row in rows) / variance if variance > 0 else 0.0


def length_adjusted(rows: Sequence[Row]) -> list[float]:
    """Mean reward of each step less what its length explains: as if all were as long as in the first of the rows.

    The slope is that within the steps, so that a policy which only writes more does not pass for a better one.
    """
    slope = length_slope(rows)
    return [row["reward"] - slope * (row["length"] - rows[0]["length"]) for row in rows]


def trend(values: Sequence[float]) -> tuple[float, float]:
    """(slope a step, slope / standard error) of a straight line through the values; (0, 0) for fewer than three."""
    n = len(values)
    if n < 3:
        return 0.0, 0.0
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread
    errors = sum((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(values))
    standard_error = math.sqrt(errors / (n - 2) / spread)
    if standard_error <= 1e-12 * abs(slope):
        return slope, math.copysign(math.inf, slope) if slope else 0.0
    return slope, slope / standard_error


def verdict(rows: Sequence[Row], kl_limit: float, window: int) -> str | None:
    """Why training must stop after these rows, or None.

    `kl`: the last step's KL is beyond the limit (nats a completion). `reward_hacking`: over the last `window` steps the
    reward rises while the length-adjusted reward falls, each by more than two standard errors of its trend.
    """
    if rows and rows[-1]["kl"] > kl_limit:
        return "kl"
    if window and len(rows) >= window:
        last = rows[-window:]
        if trend([row["reward"] for row in last])[1] > 2 and trend(length_adjusted(last))[1] < -2:
            return "reward_hacking"
    return None


def last_good_step(rows: Sequence[Row], why: str, window: int) -> int:
    """The last step whose policy, as it was before that step's update, is trusted; -1 where none is."""
    return rows[-1]["step"] - (1 if why == "kl" else window)


# --- files ---


class StepLog:
    """`log.jsonl` and `samples.jsonl` of an output folder, and the trackers of `--log-to`. A context manager.

    Args:
        folder: of the stage.
        step: go on from here: rows of this step and later ones are dropped, they will be written again.
        active: False on every process but the first, which alone writes.
    """

    def __init__(self, folder: Path, step: int, *, active: bool = True) -> None:
        self._folder = folder
        self._step = step
        self._active = active
        self.rows: list[Row] = []
        """Every row so far, on every process."""

    def __enter__(self) -> StepLog:
        file, samples = self._folder / "log.jsonl", self._folder / "samples.jsonl"
        self.rows = self._earlier(file)
        refuse_gaps(file, len(self.rows), self._step)
        if self._active:
            write_rows(file, self.rows)
            write_rows(samples, self._earlier(samples))
        with ExitStack() as stack:
            self._trackers = stack.enter_context(Trackers(self._folder, self.rows, active=self._active))
            if self._active:
                self._log, self._samples = (stack.enter_context(LineWriter(name)) for name in (file, samples))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def _earlier(self, file: Path) -> list[Row]:
        """The rows before `step`; a last line that a kill cut short is left out."""
        rows = read_rows(file, torn_end=True) if file.exists() else []
        return [row for row in rows if row["step"] < self._step]

    def step(self, row: Row) -> None:
        """Add the row of a step, with its length-adjusted reward; a number that does not exist is null."""
        row = {**row, "length_adjusted_reward": length_adjusted([*self.rows, row])[-1]}
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        if self._active:
            self._log.append(row)
            self._trackers.log(row)

    def samples(self, rows: Sequence[Row]) -> None:
        """Add some completions."""
        if self._active:
            self._samples.append(*rows)


def sample_row(step: int, prompt_id: str, prompt: str, completion: str, reward: float, ended: bool) -> Row:
    """One line of `samples.jsonl`."""
    return {"step": step, "id": prompt_id, "prompt": prompt, "completion": completion, "reward": reward, "ended": ended}


def summary(rows: Sequence[Row]) -> JSONObject:
    """Metrics of a whole run for `result.json`: means over the first and the last tenth of its steps."""
    return first_and_last(rows, ("reward", "length_adjusted_reward", "kl", "entropy", "length", "ended"))


def first_and_last(rows: Sequence[Row], names: Sequence[str]) -> JSONObject:
    """`<name>_first` and `<name>_last`: means over the first and the last tenth of the rows; None without a number."""
    part = max(1, len(rows) // 10)
    ends = {"first": rows[:part], "last": rows[-part:]}
    metrics: JSONObject = {}
    for name in names:
        for end, some in ends.items():
            values = [row[name] for row in some if row.get(name) is not None]
            metrics[f"{name}_{end}"] = sum(values) / len(values) if values else None
    return metrics
