"""Advantages of RLOO and GRPO against numbers computed by hand, on the tensors that their trainers learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from almost_eval.files import read_rows, write_rows
from almost_eval.rewards.hf import HFRewardModel
from almost_train.rlsf import trl
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf

pytestmark = pytest.mark.usefixtures("one_thread")

ANIMALS = "otter panther owl fox bear wolf hare lynx".split()
SMALL: dict[str, Any] = {
    "steps": 2,
    "batch_size": 8,
    "micro_batch_size": 4,
    "num_generations": 4,
    "max_new_tokens": 10,
    "learning_rate": 5e-3,
    "kl_coefficient": 0.1,
    "kl_limit": 1000.0,
    "guard_window": 0,
    "device": "cpu",
}
EPSILON = 1e-4
"""TRL adds it to a deviation that it divides by."""


@dataclass
class Seen:
    """Of each step, as TRL made it."""

    rewards: list[list[float]] = field(default_factory=list)
    """What the reward function returned: less the EOS penalty, before KL."""
    kl: list[list[float]] = field(default_factory=list)
    """Nats a completion, by the trainer's own policy and reference."""
    advantages: list[list[float]] = field(default_factory=list)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """Trains on the nano world; what its trainer saw."""

    def train(**changes: Any) -> Seen:
        seen, made = Seen(), trl.make_trainer

        def spy(*arguments: Any) -> Any:
            trainer: Any
            trainer, watch = made(*arguments)
            score, learn = trainer._calculate_rewards, trainer._generate_and_score_completions

            def scored(*inputs: Any) -> torch.Tensor:
                rewards: torch.Tensor = score(*inputs)  # (B, 1)
                seen.rewards.append(rewards[:, 0].double().tolist())
                return rewards

            def learnt(inputs: Any) -> dict[str, Any]:
                batch: dict[str, Any] = learn(inputs)
                seen.advantages.append(batch["advantages"].double().tolist())
                seen.kl.append(_kl(trainer, batch).tolist())
                return batch

            trainer._calculate_rewards, trainer._generate_and_score_completions = scored, learnt
            return trainer, watch

        monkeypatch.setattr(trl, "make_trainer", spy)
        write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"How big is the {a}?"} for a in ANIMALS])
        rlsf(RLSFSettings(**SMALL | changes), tmp_path / "prompts.jsonl", "nano/sft", "nano/reward", tmp_path / "out")
        return seen

    return train


@torch.no_grad()
def _kl(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) log p - log p_ref of the completions, nats, as the models are before the update."""
    ids, attention = (torch.cat([batch[f"prompt_{n}"], batch[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    width = batch["completion_ids"].shape[1]
    own, reference = (
        trainer._get_per_token_logps_and_entropies(model, ids, attention, width, 4)[0]
        for model in (trainer.model, trainer.ref_model)
    )
    return ((own - reference).double() * batch["completion_mask"]).sum(1)


# --- numbers of a reader ---

REWARDS = [1.0, 2.0, 4.0, 9.0, 0.0, 0.0, 0.0, 3.0]
"""Of four completions of one prompt, and four of another."""
LEFT_OUT = [
    # The other three have the mean (2 + 4 + 9) / 3 = 5, (1 + 4 + 9) / 3 = 14/3, (1 + 2 + 9) / 3 = 4 and
    # (1 + 2 + 4) / 3 = 7/3; of the second prompt 1, 1, 1 and 0.
    *(1 - 5, 2 - 14 / 3, 4 - 4, 9 - 7 / 3),
    *(0 - 1, 0 - 1, 0 - 1, 3 - 0),
]
# Their mean is 0; the sum of their squares is 16 + 64/9 + 0 + 400/9 = 608/9, and 1 + 1 + 1 + 9 = 12.
WHITENED = [advantage / (sqrt((608 / 9 + 12) / 7) + EPSILON) for advantage in LEFT_OUT]
CENTRED = [
    # Means 16/4 = 4 and 3/4.
    *(1 - 4, 2 - 4, 4 - 4, 9 - 4),
    *(0 - 3 / 4, 0 - 3 / 4, 0 - 3 / 4, 3 - 3 / 4),
]
# Squares: 9 + 4 + 0 + 25 = 38, and 3 x 9/16 + 81/16 = 27/4; divided by 3 for a deviation of each prompt.
SCALED = [
    *(advantage / (sqrt(38 / 3) + EPSILON) for advantage in CENTRED[:4]),
    *(advantage / (sqrt(27 / 12) + EPSILON) for advantage in CENTRED[4:]),
]


@pytest.mark.parametrize(
    ("by_hand", "settings"),
    [
        (LEFT_OUT, {"algorithm": "rloo", "whiten_advantages": False}),
        (WHITENED, {"algorithm": "rloo"}),
        (SCALED, {"algorithm": "grpo"}),
        pytest.param(SCALED, {"algorithm": "grpo", "loss_type": "grpo"}, marks=pytest.mark.slow),
        (CENTRED, {"algorithm": "grpo", "loss_type": "dr_grpo"}),
    ],
    ids=["rloo", "rloo-whitened", "grpo-dapo", "grpo", "dr_grpo"],
)
def test_advantages_by_hand(
    by_hand: list[float],
    settings: dict[str, Any],
    watched: Callable[..., Seen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HFRewardModel, "score", lambda self, conversations: REWARDS[: len(conversations)])
    seen = watched(steps=1, eos_penalty=0.0, **settings)
    assert seen.rewards[0] == REWARDS
    assert seen.kl[0] == [0.0] * 8  # the policy is the reference, until it learns
    assert seen.advantages[0] == pytest.approx(by_hand, abs=1e-6)


# --- the reward model's own, with KL and the penalty for no EOS ---


def groups(values: list[float]) -> list[list[float]]:
    return [values[:4], values[4:]]


def left_out(rewards: list[float]) -> list[float]:
    return [r - (sum(group) - r) / 3 for group in groups(rewards) for r in group]


def deviation(values: list[float]) -> float:
    """With n - 1."""
    mean = sum(values) / len(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_advantages_of_a_training(algorithm: str, watched: Callable[..., Seen], tmp_path: Path) -> None:
    """RLOO takes 0.1 of the KL of a completion off its reward; GRPO has it in the loss, and not here."""
    seen = watched(algorithm=algorithm, samples_every=1)
    assert max(map(abs, seen.kl[1])) > 0.01  # it has learnt
    for rewards, kl, advantages in zip(seen.rewards, seen.kl, seen.advantages, strict=True):
        if algorithm == "rloo":
            plain = left_out([r - 0.1 * nats for r, nats in zip(rewards, kl, strict=True)])
            expected = [a / (deviation(plain) + EPSILON) for a in plain]
        else:
            expected = [(r - sum(group) / 4) / (deviation(group) + EPSILON) for group in groups(rewards) for r in group]
        assert advantages == pytest.approx(expected, abs=1e-6, rel=1e-6)
    # What TRL was given is what the log says, less the penalty.
    for step, rewards in enumerate(seen.rewards):
        first = [row for row in read_rows(tmp_path / "out" / "samples.jsonl") if row["step"] == step]
        given = [row["reward"] - (not row["ended"]) for row in first]
        assert rewards[: len(given)] == pytest.approx(given, abs=1e-6)
