"""Checkpoints of the PPO loop: weights and Adam's moments as safetensors, numbers as JSON, no pickle.

A folder `step-000020` is written under another name and renamed, so one that is there is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A model in training."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    """Whose state is a tensor for each name of each parameter, as AdamW's."""


def found(work: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first."""
    return sorted((int(folder.name.split("-")[1]), folder) for folder in work.glob("step-*"))


def save(work: Path, step: int, parts: Sequence[Part], numbers: Mapping[str, Any], oldest_wanted: int) -> None:
    """Write a checkpoint, then remove the older ones, but for those after `oldest_wanted` and the last before it."""
    scratch, folder = work / ".scratch", work / f"step-{step:06d}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for part in parts:
        # Parameters, not the state dict: tied weights come once.
        weights = {name: parameter.detach().contiguous() for name, parameter in part.model.named_parameters()}
        save_file(weights, scratch / f"{part.name}.safetensors")
        entries = part.optimizer.state_dict()["state"]
        flat = {f"{i}.{name}": tensor.contiguous() for i, entry in entries.items() for name, tensor in entry.items()}
        save_file(flat, scratch / f"{part.name}-optimizer.safetensors")
    (scratch / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
    for _, old in [file for file in found(work) if file[0] <= oldest_wanted][:-1]:
        shutil.rmtree(old)


def load(folder: Path, parts: Sequence[Part]) -> dict[str, Any]:
    """Put a checkpoint into the models and optimizers; returns its numbers."""
    for part in parts:
        load_weights(part.model, folder / f"{part.name}.safetensors")
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / f"{part.name}-optimizer.safetensors").items():
            index, _, name = key.partition(".")
            entries.setdefault(int(index), {})[name] = tensor
        groups = part.optimizer.state_dict()["param_groups"]
        part.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    numbers: dict[str, Any] = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    return numbers


@torch.no_grad()
def load_weights(model: Any, file: Path) -> None:
    """Put the stored parameters into a model."""
    stored = load_file(file)
    for name, parameter in model.named_parameters():
        parameter.copy_(stored[name])
