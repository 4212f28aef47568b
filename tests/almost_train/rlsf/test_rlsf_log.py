"""The guards and the log, on rows that a reader can check by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import RunError
from almost_eval.files import read_rows
from almost_train.rlsf.log import StepLog, batch_row, length_adjusted, length_slope, sample_row, trend, verdict


def step_row(step: int, reward: float, length: float, slope: float) -> dict[str, Any]:
    """A step whose rewards rise by `slope` for each token, within the step."""
    return {
        "step": step,
        "kl": 0.0,
        "reward": reward,
        "length": length,
        "length_variance": 4.0,
        "reward_length_covariance": 4 * slope,
    }


def test_length_adjusted_reward_by_hand() -> None:
    # 0.1 a token within the steps: the second is 10 tokens longer, worth 1 of its 1.5.
    rows = [step_row(0, 2.0, 10, 0.1), step_row(1, 3.5, 20, 0.1)]
    assert length_slope(rows) == pytest.approx(0.1)
    assert length_adjusted(rows) == pytest.approx([2.0, 2.5])


def test_trend_by_hand() -> None:
    # 0, 1, 5: slope (5 - 0) / 2 = 2.5; residuals 0.5, -1, 0.5; error sqrt(1.5 / 1 / 2) = 0.866; 2.5 / 0.866 = 2.887
    assert trend([0.0, 1.0, 5.0]) == pytest.approx((2.5, 2.5 / math.sqrt(0.75)))
    assert trend([1.0, 1.0, 1.0]) == (0.0, 0.0)
    assert trend([1.0, 2.0]) == (0.0, 0.0)


def test_reward_hacking_is_reward_that_rises_by_length_alone() -> None:
    noise = [0.02 * (-1) ** i for i in range(20)]
    # 2 tokens a step, 0.1 each: + 0.2 a step from length, - 0.1 from the rest.
    hacked = [step_row(i, 0.1 * i + noise[i], 10 + 2 * i, 0.1) for i in range(20)]
    assert verdict(hacked, 10.0, 20) == "reward_hacking"
    assert verdict(hacked[:19], 10.0, 20) is None  # the window is not full
    assert verdict(hacked, 10.0, 0) is None  # switched off
    honest = [step_row(i, 0.3 * i + noise[i], 10 + 2 * i, 0.1) for i in range(20)]
    assert verdict(honest, 10.0, 20) is None
    falling = [step_row(i, -0.3 * i + noise[i], 10 + 2 * i, 0.1) for i in range(20)]
    assert verdict(falling, 10.0, 20) is None
    assert verdict([{**hacked[0], "kl": 11.0}], 10.0, 20) == "kl"


def test_the_row_of_a_batch_by_hand() -> None:
    # Rewards 1 and 3: mean 2, deviation sqrt(2). Lengths 4 and 8: mean 6, variance 4; covariance (1 x 2 + 1 x 2) / 2.
    row = batch_row(7, [1.0, 3.0], [4, 8], [True, False])
    assert (row["reward"], row["reward_std"], row["length"]) == (2, pytest.approx(math.sqrt(2)), 6)
    assert (row["length_variance"], row["reward_length_covariance"], row["ended"]) == (4, 2, 0.5)


def test_a_reward_that_is_not_finite_names_the_step() -> None:
    with pytest.raises(RunError, match="step 7: 1 of 2 values of reward are not finite"):
        batch_row(7, [1.0, math.nan], [4, 8], [True, True])


def test_a_log_that_goes_on_drops_what_will_be_written_again(tmp_path: Path) -> None:
    with StepLog(tmp_path, 0) as log:
        for step in range(3):
            log.step({**step_row(step, 1.0, 5, 0.0), "grad": math.nan})
            log.samples([sample_row(step, "p1", "Hello", "Hi", 1.0, True)])
    with StepLog(tmp_path, 2) as log:
        assert [row["step"] for row in log.rows] == [0, 1]
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 1]
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [0, 1]
    assert read_rows(tmp_path / "log.jsonl")[0]["grad"] is None  # JSON has no NaN
