"""The learning rate of every trainer, against numbers by hand and against the logs.

RLOO's and GRPO's log is in `rlsf/test_trl.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from almost_eval.files import read_rows, write_rows
from almost_train.common.schedule import learning_rate_factor
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft


def test_learning_rate_rises_then_follows_the_schedule() -> None:
    # 10 updates, 2 of warm-up: 1/2, 2/2, then 8 from 0/8 on
    rates = {name: [learning_rate_factor(u, 10, 0.2, name) for u in range(10)] for name in ("linear", "cosine")}
    assert rates["linear"] == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert rates["cosine"][6] == pytest.approx(0.5)  # half way: (1 + cos(pi / 2)) / 2
    assert learning_rate_factor(9, 10, 0.2, "constant") == 1
    assert learning_rate_factor(0, 10, 0.0, "constant") == 1


@pytest.mark.usefixtures("one_thread")
def test_sfts_log_has_the_rates_by_hand(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "How big?"}, {"role": "assistant", "content": "Big."}]
    write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 4)
    settings = SFTSettings(
        epochs=1, batch_size=1, micro_batch_size=1, learning_rate=1e-3, warmup_share=0.3, device="cpu"
    )
    train_sft(settings, tmp_path / "rows.jsonl", "nano/vanilla-small", tmp_path / "out")
    # 4 steps, ceil(4 x 0.3) = 2 of warm-up: 1/2 and 2/2; then (1 + cos 0) / 2 and (1 + cos(pi / 2)) / 2.
    rates = [row["lr"] for row in read_rows(tmp_path / "out" / "log.jsonl")]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_all_algorithms_have_the_same_rates(algorithm: str, schedule: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "How big is the cat?"}])
    sizes: dict[str, Any] = {"mini_batch_size": 4, "ppo_epochs": 1} if algorithm == "ppo" else {}
    settings = RLSFSettings(
        algorithm=algorithm,
        schedule=schedule,
        warmup_ratio=0.3,
        steps=4,
        batch_size=4,
        max_new_tokens=4,
        learning_rate=1e-4,
        device="cpu",
        **sizes,
    )
    rlsf(settings, tmp_path / "prompts.jsonl", "nano/sft", "nano/reward", tmp_path / "out")
    rates = [row["learning_rate"] for row in read_rows(tmp_path / "out" / "log.jsonl")[:-1]]
    last = {"constant": 1e-4, "linear": 5e-5, "cosine": 5e-5}[schedule]
    assert rates == pytest.approx([5e-5, 1e-4, 1e-4, last])
