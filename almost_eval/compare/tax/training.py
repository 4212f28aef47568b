"""A training run as the alignment tax reads it: the stage folder that `almost-train rlsf` writes, by its files alone.

- `log.jsonl`: a row a step, of the policy *before* that step's update: `step`, `reward` (mean raw logit over the step's
  completions), `kl` (nats a completion, to the policy that training began with), `length` (tokens a completion).
- `stage.json`: `inputs`, which models training read: a digest of `policy` and of `reward_model`, or a name on the hub.
- `policy/` and `result.json`: the policy at the end, and `metrics.policy_step`.
- `policies/step-000020/`, ...: with `--keep-every`, the policies on the way there, as `policy/`; those after a guard's
  stop are there too.
- `.work/`: while training goes on, checkpoints to resume from: `step-000020/policy.safetensors` (PPO: weights alone) or
  `checkpoint-20/` (RLOO, GRPO: whole folders).

In the folder of a whole recipe the stage is `rlsf/`, and beside it stand the policy that training began with
(`sft/model`), the reward model (`reward/model`) and the held-out prompts (`evaluation-prompts.jsonl`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from almost_eval.errors import DataError, InputError
from almost_eval.files import digest_path, read_json, read_records, whole_folder
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.nano import SHIPPED, shipped
from almost_eval.types import JSONObject

LOGGED = ("reward", "kl", "length")
"""What a row of the log has, beside its step."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "README.md", ".*")


@dataclass(frozen=True, slots=True)
class LogRow:
    """One step of training."""

    step: int
    reward: float
    """Mean raw logit over the step's completions."""
    kl: float
    """Nats a completion, to the policy that training began with."""
    length: float
    """Tokens a completion."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What a stage folder holds."""

    folder: Path
    rows: list[LogRow]
    checkpoints: list[tuple[int, Path]]
    """(step, checkpoint folder or PPO's folder of weights), oldest first."""
    before: Path | None
    """The policy that training began with, where it stands beside the stage."""
    reward_model: Path | None
    prompts: Path | None
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Of `stage.json`."""

    def read(self, name: str, model: str) -> bool:
        """Whether training is known to have read this model as its `policy` or its `reward_model`."""
        made_with = self.inputs.get(name)
        if made_with is None:
            return model == str({"policy": self.before, "reward_model": self.reward_model}[name])
        folder = shipped(model) if model in SHIPPED else Path(model)
        return made_with == (digest_path(folder) if folder.is_dir() else model)  # as a stage writes it


def read_training(folder: Path) -> TrainingRun:
    """Open a stage's folder, or a recipe's.

    Raises:
        InputError: no such folder, or one without a log or without a checkpoint.
        DataError: a log that is malformed.
    """
    stage = folder / "rlsf" if (folder / "rlsf" / "log.jsonl").exists() else folder
    if not (stage / "log.jsonl").exists():
        raise InputError(f"--run {folder} holds no log.jsonl; give the folder that almost-train rlsf (or run) wrote")
    checkpoints = _in_work(stage / ".work") | _kept(stage / "policies")
    if (stage / "policy" / "config.json").exists() and (stage / "result.json").exists():
        step = read_json(stage / "result.json", "metrics")["metrics"].get("policy_step")
        checkpoints[int(step) if isinstance(step, int) else _rows(stage / "log.jsonl")[-1].step] = stage / "policy"
    if not checkpoints:
        raise InputError(
            f"--run {folder} holds no checkpoint yet; it comes with training's --save-every, or at its end"
        )

    def beside(name: str) -> Path | None:
        path = stage.parent / name
        return path if path.exists() else None

    return TrainingRun(
        stage,
        _rows(stage / "log.jsonl"),
        sorted(checkpoints.items()),
        beside("sft/model"),
        beside("reward/model"),
        beside("evaluation-prompts.jsonl"),
        read_json(stage / "stage.json", "inputs")["inputs"] if (stage / "stage.json").exists() else {},
    )


def as_checkpoint(folder: Path, like: Checkpoint, target: Path) -> Path:
    """A folder that can be loaded: `folder` itself, or its weights with the configuration and tokenizer of `like`.

    Args:
        folder: a checkpoint, or PPO's folder with `policy.safetensors` in it.
        like: the policy that training began with.
        target: where to put the second kind together; made once.
    """
    weights = folder / "policy.safetensors"
    if not weights.exists():
        return folder
    if not target.exists():
        with whole_folder(target) as scratch:
            shutil.copytree(like.path, scratch, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
            shutil.copyfile(weights, scratch / "model.safetensors")  # a copy: training removes old checkpoints
    find_checkpoint(str(target))  # refuses weights that were cut short
    return target


def _in_work(work: Path) -> dict[int, Path]:
    folders = {}
    for folder in work.glob("*-*"):
        name = re.fullmatch(r"(step|checkpoint)-(\d+)", folder.name)
        # The last file that the trainer writes: without it, the checkpoint is half one.
        last = {"step": "numbers.json", "checkpoint": "trainer_state.json"}
        if name and (folder / last[name[1]]).exists() and int(name[2]) > 0:
            folders[int(name[2])] = folder
    return folders


def _kept(policies: Path) -> dict[int, Path]:
    names = {folder: re.fullmatch(r"step-(\d+)", folder.name) for folder in policies.glob("step-*")}
    return {int(name[1]): folder for folder, name in names.items() if name}


def _rows(file: Path) -> list[LogRow]:
    def parse(row: JSONObject) -> LogRow:
        return LogRow(int(row["step"]), *(float(row[name]) for name in LOGGED))

    rows = [row for _, row in read_records(file, parse, "a step of RLSF", mend="run the stage again")]
    if not rows:
        raise DataError(f"{file} holds no steps yet")
    return rows
