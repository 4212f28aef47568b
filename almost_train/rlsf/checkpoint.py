"""Checkpoints of the PPO loop: weights and Adam's moments as safetensors, numbers as JSON, no pickle.

A folder `step-000020` is written under another name and then renamed, so a folder of that name was written to its end;
its seal (`common.sealed`) tells whether it was damaged since. Its tensors are whole, however many processes trained,
and are named after the parameters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from almost_eval.types import JSONObject
from almost_train.common.resume import replaced_folder
from almost_train.common.sealed import seal

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Parameter -> `weights`, and each of its optimizer's tensors."""
_WEIGHTS = "weights"


def stored(work: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first."""
    return sorted((int(folder.name.split("-")[1]), folder) for folder in work.glob("step-*"))


def folders(work: Path) -> list[Path]:
    """The folder of each checkpoint, oldest first."""
    return [folder for _, folder in stored(work)]


def save(
    work: Path, step: int, models: Mapping[str, Tensors], numbers: Mapping[str, object], oldest_wanted: int
) -> None:
    """Write a checkpoint, then remove older ones. Those after `oldest_wanted` stay, and the last one before it."""
    with replaced_folder(work / f"step-{step:06d}", work / ".scratch") as scratch:
        for name, tensors in models.items():
            save_file({key: state[_WEIGHTS] for key, state in tensors.items()}, scratch / f"{name}.safetensors")
            moments = {
                f"{parameter}/{key}": tensor
                for parameter, state in tensors.items()
                for key, tensor in state.items()
                if key != _WEIGHTS
            }
            save_file(moments, scratch / f"{name}-optimizer.safetensors")
        (scratch / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")
        seal(scratch)
    for _, old in [checkpoint for checkpoint in stored(work) if checkpoint[0] <= oldest_wanted][:-1]:
        shutil.rmtree(old)


def load(folder: Path, name: str, *, weights_alone: bool = False) -> Tensors:
    """A model's tensors of a checkpoint."""
    weights = load_file(folder / f"{name}.safetensors")
    tensors = {parameter: {_WEIGHTS: tensor} for parameter, tensor in weights.items()}
    if not weights_alone:
        for place, tensor in load_file(folder / f"{name}-optimizer.safetensors").items():
            parameter, _, key = place.rpartition("/")
            tensors[parameter][key] = tensor
    return tensors


def load_numbers(folder: Path) -> JSONObject:
    """The numbers of a checkpoint."""
    numbers: JSONObject = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    return numbers
