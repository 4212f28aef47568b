"""A gradient that is NaN or infinite ends every trainer in one line. The last good checkpoint stays, to go on from.

RLOO and GRPO are in `rlsf/test_trl.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from almost_eval.errors import RunError
from almost_eval.files import read_rows
from almost_train.reward import run as reward
from almost_train.rlsf import loop
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
from almost_train.sft import run as sft

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN: dict[str, Any] = {"learning_rate": 1e-3, "device": "cpu", "batch_size": 4, "micro_batch_size": 4}
PPO = TRAIN | {"mini_batch_size": 4, "ppo_epochs": 1, "steps": 4, "max_new_tokens": 8, "guard_window": 0}
RANKS = [0, pytest.param(4, marks=pytest.mark.slow)]


def spoil(model: torch.nn.Module, is_time: Callable[[], bool], value: float) -> None:
    """From then on the gradient of a weight is that value."""
    trained = next(p for p in model.parameters() if p.requires_grad)
    trained.register_hook(lambda grad: torch.full_like(grad, value) if is_time() else grad)


def is_whole(folder: Path) -> bool:
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    return bool(tensors) and all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("stage", "value"), [("reward", math.inf), ("sft", math.nan)])
def test_reward_and_sft(
    stage: str, value: float, rank: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> Any:
        settings = TRAIN | {"lora_rank": rank, "save_every": 1, "epochs": 1}
        if stage == "sft":
            return sft.train_sft(sft.SFTSettings(**settings), data / "dialogues.jsonl", "nano/sft", tmp_path / "out")
        chosen = reward.RewardSettings(**settings, eval_share=0.0)
        return reward.train_reward(chosen, data / "pairs.jsonl", "nano/vanilla-small", tmp_path / "out")

    module = reward if stage == "reward" else sft
    made = module._trainer

    def spoilt(*arguments: Any) -> Any:
        trainer = made(*arguments)
        spoil(trainer.model, lambda: trainer.state.global_step == 2, value)
        return trainer

    monkeypatch.setattr(module, "_trainer", spoilt)
    for _ in range(2):  # and again from the checkpoint
        with pytest.raises(
            RunError, match=r"^the gradient is (inf|nan) at step 3; the last good checkpoint is \S+-2; "
        ):
            train()
    assert is_whole(tmp_path / "out" / ".work" / "checkpoint-2")
    assert not (tmp_path / "out" / "model").exists()
    monkeypatch.setattr(module, "_trainer", made)
    train()
    assert [row["step"] for row in read_rows(tmp_path / "out" / "log.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("rank", RANKS)
def test_ppo(rank: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = loop.update
    now = False

    def spoilt(models: Any, state: Any, rollout: Any) -> Any:
        nonlocal now
        if state.step == 0:
            spoil(models.trained_policy.plain, lambda: now, math.nan)
        now = state.step == 2
        return update(models, state, rollout)

    def train(output: str, **changes: Any) -> dict[str, Any]:
        settings = RLSFSettings(**(PPO | {"lora_rank": rank, "save_every": 1} | changes))
        return rlsf(settings, data / "prompts.jsonl", "nano/sft", "nano/reward", tmp_path / output)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", spoilt)
        line = r"step 2: 1 of 1 values of gradient are not finite; the last good checkpoint is \S+step-000002; "
        with pytest.raises(RunError, match=line):
            train("out")
        with pytest.raises(RunError, match="are not finite; no checkpoint was saved before it; going on"):
            train("without", save_every=20)
    assert is_whole(tmp_path / "out" / ".work" / "step-000002")
    assert not (tmp_path / "out" / "policy").exists()
    assert train("out")["metrics"]["steps"] == 4
