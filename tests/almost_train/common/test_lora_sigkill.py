"""Every trainer with an adapter, killed by SIGKILL and started again from the command line: the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from almost_eval.files import digest_path

pytestmark = pytest.mark.slow

LORA = "--lora-rank 4 --lora-dropout 0.1 --merge --save-every 2 --device cpu --learning-rate 1e-3"
TRAIN = f"{LORA} --batch-size 4 --micro-batch-size 4 --epochs 4"
RLSF = (
    "rlsf --prompts {data}/prompts.jsonl --policy nano/sft --reward-model nano/reward --steps 12 --batch-size 8 "
    f"--max-new-tokens 12 --kl-limit 1e9 --guard-window 0 {LORA} --algorithm"
)
COMMANDS = {
    "reward": f"reward --comparisons {{data}}/pairs.jsonl --model nano/vanilla-small {TRAIN}",
    "sft": f"sft --demonstrations {{data}}/dialogues.jsonl --model nano/vanilla-small {TRAIN}",
    "ppo": f"{RLSF} ppo --mini-batch-size 8 --ppo-epochs 2",
    "rloo": f"{RLSF} rloo",
    "grpo": f"{RLSF} grpo",
}
OUTPUTS = {"reward": ("adapter", "model"), "sft": ("adapter", "model")}


def start(trainer: str, data: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "almost_train.cli", *COMMANDS[trainer].format(data=data).split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--output", str(output)], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("trainer", COMMANDS)
def test_killed_and_started_again(trainer: str, data: Path, tmp_path: Path) -> None:
    assert start(trainer, data, tmp_path / "whole").wait(timeout=300) == 0
    process = start(trainer, data, tmp_path / "killed")
    try:
        deadline = time.monotonic() + 200
        while not list((tmp_path / "killed").glob(".work/*-*4")) and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    assert start(trainer, data, tmp_path / "killed").wait(timeout=300) == 0
    for name in OUTPUTS.get(trainer, ("adapter", "policy")):
        assert digest_path(tmp_path / "killed" / name) == digest_path(tmp_path / "whole" / name), name
