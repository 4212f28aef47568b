"""Models whose weights are not finite: one line that says so, and not a lower learning rate, in every trainer."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from almost_eval.errors import InputError, RunError
from almost_eval.nano import shipped
from almost_train.common.config import settings_from
from almost_train.dpo.run import DPOSettings, train_dpo
from almost_train.reward.run import RewardSettings
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft


@pytest.fixture
def policy(tmp_path: Path) -> str:
    folder = tmp_path / "policy"
    shutil.copytree(shipped("nano/sft"), folder)
    weights = load_file(folder / "model.safetensors")
    next(tensor for name, tensor in weights.items() if "mlp" in name).view(-1)[0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_rlsf(algorithm: str, policy: str, data: Path, tmp_path: Path) -> None:
    settings = RLSFSettings(algorithm=algorithm, steps=2, batch_size=8, max_new_tokens=4)
    if algorithm == "ppo":
        settings = RLSFSettings(steps=2, batch_size=8, mini_batch_size=8, max_new_tokens=4)
    with pytest.raises(RunError, match=r"step 0: .* of KL are not finite; nothing was learned before: weights of the"):
        rlsf(settings, data / "prompts.jsonl", policy, "nano/reward", tmp_path / "out")


def test_sft_and_dpo(policy: str, data: Path, tmp_path: Path) -> None:
    line = "^the loss is nan at step 1, before anything was learned: weights of the model are not finite"
    with pytest.raises(RunError, match=line):
        train_sft(SFTSettings(batch_size=4), data / "dialogues.jsonl", policy, tmp_path / "sft")
    with pytest.raises(RunError, match=line):
        train_dpo(DPOSettings(batch_size=4), data / "pairs.jsonl", policy, tmp_path / "dpo")


@pytest.mark.parametrize("cls", [RewardSettings, SFTSettings, DPOSettings, RLSFSettings])
def test_a_rate_that_float32_does_not_hold_is_refused(cls: type) -> None:
    with pytest.raises(InputError, match=r"recipe: learning_rate is 1e\+38; it must be at most 1e\+30"):
        settings_from(cls, {"learning_rate": 1e38}, "recipe")
