"""`--log-to` in training: what the log says is what a tracker gets, each step once, killed or not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopping import StopAfter, Stopped
from tracked import tensorboard_scalars, wandb_rows

from almost_eval.compare.tax.training import as_checkpoint, read_training
from almost_eval.files import read_rows, write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.run.trackers import JSONL, logging_to
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def same_as_the_log(folder: Path, steps: list[int]) -> None:
    logged = read_rows(folder / "log.jsonl")
    assert [row["step"] for row in logged] == steps
    tracked = read_rows(folder / JSONL)
    assert tracked == [numbers(row) for row in logged]
    assert all(len(row) > 3 for row in tracked)


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "The cat sat on the mat."}]
    write_rows(tmp_path / "demonstrations.jsonl", [{"messages": turns}] * 12)
    return tmp_path / "demonstrations.jsonl"


@pytest.mark.slow
def test_a_killed_sft_logs_each_step_once(
    demonstrations: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, output = str(tiny_checkpoint("llama-gqa")), tmp_path / "sft"
    settings = SFTSettings(epochs=3, batch_size=6, micro_batch_size=6, save_every=2, device="cpu")
    with logging_to(["jsonl"]):
        with pytest.raises(Stopped):
            train_sft(settings, demonstrations, model, output, progress=StopAfter(4))
        assert [row["step"] for row in read_rows(output / JSONL)] == [1, 2, 3]
        train_sft(settings, demonstrations, model, output)
    same_as_the_log(output, [1, 2, 3, 4, 5, 6])


def test_a_killed_rlsf_logs_each_step_once_and_the_tax_can_read_it(tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "rlsf"
    write_rows(prompts, [{"id": f"p{i}", "prompt": f"What colour is the otter {i}?"} for i in range(4)])
    small = {"batch_size": 4, "mini_batch_size": 4, "micro_batch_size": 4, "max_new_tokens": 12, "ppo_epochs": 1}
    settings = RLSFSettings(steps=4, save_every=2, device="cpu", **small)  # type: ignore[arg-type]
    with logging_to(["jsonl"]):
        with pytest.raises(Stopped):
            rlsf(settings, prompts, "nano/sft", "nano/reward", output, progress=StopAfter(4))
        assert [row["step"] for row in read_rows(output / JSONL)] == [0, 1, 2, 3]
        found = read_training(output)
        assert [step for step, _ in found.checkpoints] == [2]
        assert [row.step for row in found.rows] == [0, 1, 2, 3]
        whole = as_checkpoint(found.checkpoints[0][1], find_checkpoint("nano/sft"), tmp_path / "step-2")
        rlsf(settings, prompts, "nano/sft", "nano/reward", output)
    same_as_the_log(output, [0, 1, 2, 3, 4])
    assert [step for step, _ in read_training(output).checkpoints] == [4]
    # What was put together from PPO's weights is the policy of step 2, which has learnt: near the SFT policy, not it.
    from almost_eval.engines.hf import HFEngine
    from almost_eval.types import LoglikelihoodRequest

    asked = [LoglikelihoodRequest("Human: What colour is the otter?\n\nAssistant:", (" The otter is brown.",))]
    begun, learnt = (HFEngine(str(m)).loglikelihood(asked)[0][0].logprob for m in ("nano/sft", whole))
    assert learnt != begun
    assert learnt == pytest.approx(begun, abs=0.5)


def test_nothing_is_logged_unasked(
    demonstrations: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = SFTSettings(epochs=1, batch_size=6, micro_batch_size=6, device="cpu")
    train_sft(settings, demonstrations, str(tiny_checkpoint("llama-gqa")), tmp_path / "sft")
    assert not (tmp_path / "sft" / JSONL).exists()


# --- the command line ---


def almost_train(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "almost_train.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_flag_reaches_the_trainer(
    demonstrations: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "sft"
    made = almost_train(
        *("sft", "--demonstrations", demonstrations, "--model", tiny_checkpoint("llama-gqa"), "--output", output),
        *("--epochs", 1, "--batch-size", 6, "--device", "cpu", "--log-to", "jsonl,tensorboard,wandb", "--json"),
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["stage"] == "sft"  # whatever a tracker has to say is not on stdout
    same_as_the_log(output, [1, 2])
    logged = [numbers(row) for row in read_rows(output / "log.jsonl")]
    assert wandb_rows(output) == logged
    loss = [(row["step"], pytest.approx(row["loss"])) for row in logged]  # TensorBoard stores single precision
    assert tensorboard_scalars(output)["loss"] == loss


@pytest.mark.parametrize("command", ["reward", "sft", "rlsf", "run nano"])
def test_a_tracker_is_refused_before_anything_is_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from almost_eval.errors import AlmostError
    from almost_train.cli.main import cli

    nowhere = {
        "reward": ("--comparisons", "no.jsonl", "--model", "nowhere"),
        "sft": ("--demonstrations", "no.jsonl", "--model", "nowhere"),
        "rlsf": ("--prompts", "no.jsonl", "--policy", "nowhere", "--reward-model", "nowhere"),
        "run nano": (),
    }[command]
    arguments = [*command.split(), *nowhere, "--output", str(tmp_path / "out"), "--log-to"]
    with pytest.raises(AlmostError, match="--log-to: unknown tracker 'mlflow'") as refused:
        cli.main([*arguments, "jsonl,mlflow"], standalone_mode=False)
    assert refused.value.exit_code == 2
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(AlmostError, match=f"pip install {package}$"):
            cli.main([*arguments, package], standalone_mode=False)
    assert not (tmp_path / "out").exists()
