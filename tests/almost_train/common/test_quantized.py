"""Weights in 4 bits, where bitsandbytes is installed: on its CPU backend, with our check for a GPU passed by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from almost_eval.files import read_rows
from almost_train.reward import run as reward
from almost_train.rlsf import loop, trl
from almost_train.rlsf import run as stage
from almost_train.rlsf.job import RLSFSettings
from almost_train.sft import run as sft

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BITS: dict[str, Any] = {"lora_rank": 4, "quantize": "4bit", "device": "cpu", "learning_rate": 1e-3, "merge": True}
LINEAR = 14
"""Linear layers of nano's medium models: 2 blocks of 7."""


def held(model: torch.nn.Module) -> dict[str, Any]:
    """How many layers are in 4 bits, and the dtypes of what is trained and of the output layer."""
    import bitsandbytes

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert all(layer.weight.quant_state.quant_type == "nf4" for layer in layers)
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)
    heads = [m for name, m in model.named_modules() if name.endswith(("lm_head", "score.modules_to_save.default"))]
    assert not any(isinstance(head, bitsandbytes.nn.Linear4bit) for head in heads)
    return {"layers": len(layers), "trained": {p.dtype for p in model.parameters() if p.requires_grad}}


@pytest.mark.parametrize("trainer", ["reward", "sft", "ppo", "rloo", "grpo"])
def test_every_trainer(trainer: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'almost-toolkit[quantize]'")

    models: list[dict[str, Any]] = []
    for module in (reward, sft, stage):
        monkeypatch.setattr(module, "check_lora", lambda *_: None)

    def spy(module: Any, name: str = "_trainer") -> None:
        made = getattr(module, name)

        def watched(*arguments: Any) -> Any:
            result = made(*arguments)
            trainer = result[0] if isinstance(result, tuple) else result
            step = trainer.training_step

            def training_step(*inputs: Any, **rest: Any) -> Any:
                models.append(held(trainer.model))
                return step(*inputs, **rest)

            trainer.training_step = training_step
            return result

        monkeypatch.setattr(module, name, watched)

    out = tmp_path / "out"
    if trainer == "sft":
        spy(sft)
        settings = sft.SFTSettings(**BITS, batch_size=4, micro_batch_size=4)
        sft.train_sft(settings, tmp_path / "dialogues.jsonl", "nano/vanilla-medium", out)
    elif trainer == "reward":
        spy(reward)
        chosen = reward.RewardSettings(**BITS, batch_size=4, micro_batch_size=4, epochs=3)
        reward.train_reward(chosen, tmp_path / "pairs.jsonl", "nano/vanilla-medium", out)
    else:
        spy(trl, "make_trainer")
        update = loop.update

        def updated(trained: Any, *arguments: Any) -> Any:
            models.extend(held(model) for model in (trained.trained_policy.plain, trained.trained_value.plain.trunk))
            return update(trained, *arguments)

        monkeypatch.setattr(loop, "update", updated)
        own: dict[str, Any] = {"mini_batch_size": 8} if trainer == "ppo" else {}
        steps = RLSFSettings(**BITS, **own, algorithm=trainer, steps=2, batch_size=8, max_new_tokens=8)
        result = stage.rlsf(steps, tmp_path / "prompts.jsonl", "nano/sft", "nano/reward", out)
        assert result["metrics"].get("value_model") in (None, "reward model")
        assert read_rows(out / "log.jsonl")[0]["kl"] == 0.0
    assert models
    assert all(model == {"layers": LINEAR, "trained": {torch.float32}} for model in models)
    if trainer in ("sft", "reward"):
        losses = [row["loss"] for row in read_rows(out / "log.jsonl")]
        assert losses[-1] < losses[0]
    # The adapter belongs to the base as it is on disk, and the merged weights are whole ones.
    merged = json.loads((out / ("model" if trainer in ("sft", "reward") else "policy") / "config.json").read_text())
    assert "quantization_config" not in merged
