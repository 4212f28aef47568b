"""Checkpoints of the PPO loop: weights and Adam's moments as safetensors, numbers as JSON, no pickle.

A folder `step-000020` is written under another name and then renamed, so a folder of that name is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from almost_eval.files import replaced_folder
from almost_eval.types import JSONObject


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model in training."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    """Whose state is a tensor for each name of each parameter, as AdamW's."""


def stored(work: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first."""
    return sorted((int(folder.name.split("-")[1]), folder) for folder in work.glob("step-*"))


def folders(work: Path) -> list[Path]:
    """The folder of each checkpoint, oldest first."""
    return [folder for _, folder in stored(work)]


def save(
    work: Path, step: int, models: Sequence[TrainedModel], numbers: Mapping[str, object], oldest_wanted: int
) -> None:
    """Write a checkpoint, then remove older ones. Those after `oldest_wanted` stay, and the last one before it."""
    with replaced_folder(work / f"step-{step:06d}", work / ".scratch") as scratch:
        for trained in models:
            # Parameters, not the state dict: tied weights come once. Frozen ones (of a LoRA's base) are not changed.
            weights = {
                name: parameter.detach().contiguous()
                for name, parameter in trained.model.named_parameters()
                if parameter.requires_grad
            }
            save_file(weights, scratch / f"{trained.name}.safetensors")
            moments = {
                f"{index}.{name}": tensor.contiguous()
                for index, entry in trained.optimizer.state_dict()["state"].items()
                for name, tensor in entry.items()
            }
            save_file(moments, scratch / f"{trained.name}-optimizer.safetensors")
        (scratch / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")
    for _, old in [checkpoint for checkpoint in stored(work) if checkpoint[0] <= oldest_wanted][:-1]:
        shutil.rmtree(old)


def load(folder: Path, models: Sequence[TrainedModel]) -> JSONObject:
    """Put a checkpoint into the models and optimizers; returns its numbers."""
    for trained in models:
        load_weights(trained.model, folder / f"{trained.name}.safetensors")
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / f"{trained.name}-optimizer.safetensors").items():
            index, _, name = key.partition(".")
            entries.setdefault(int(index), {})[name] = tensor
        groups = trained.optimizer.state_dict()["param_groups"]
        trained.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    numbers: JSONObject = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    return numbers


@torch.no_grad()
def load_weights(model: nn.Module, file: Path) -> None:
    """Put the stored parameters into a model: all that are trained."""
    weights = load_file(file)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(weights[name])
