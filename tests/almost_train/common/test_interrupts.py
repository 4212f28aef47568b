"""A training that is told to end saves, and goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from almost_eval.errors import RunError
from almost_eval.files import digest_path, read_rows, write_rows
from almost_train.common.interrupts import SaveRequests, save_requests

ANIMALS = "otter panther owl fox bear wolf hare lynx".split()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    ask = [{"role": "user", "content": "How big is the otter?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("It is of medium size.", "no idea"))
    write_rows(tmp_path / "dialogues.jsonl", [{"messages": ask + good}] * 12)
    pairs = [{"prompt": [{"role": "user", "content": f"How big is the {name}?"}]} for name in ANIMALS]
    write_rows(tmp_path / "pairs.jsonl", [pair | {"chosen": good, "rejected": bad} for pair in pairs])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": pair["prompt"]} for pair in pairs])
    return tmp_path


def command(stage: str, data: Path) -> list[str]:
    common = ["--device", "cpu", "--save-every", "1000", "--save-minutes", "0"]
    own = {
        "sft": f"sft --demonstrations {data}/dialogues.jsonl --model nano/vanilla-small --epochs 60 --batch-size 4",
        "reward": f"reward --comparisons {data}/pairs.jsonl --model nano/vanilla-small --epochs 80 --batch-size 4",
        **{
            algorithm: f"rlsf --algorithm {algorithm} --prompts {data}/prompts.jsonl --policy nano/sft --reward-model "
            "nano/reward --steps 40 --batch-size 8 --max-new-tokens 12 --learning-rate 1e-5"
            + (" --mini-batch-size 8" if algorithm == "ppo" else "")
            for algorithm in ("ppo", "grpo")
        },
    }
    return [sys.executable, "-m", "almost_train.cli", *own[stage].split(), *common]


def run(arguments: list[str], output: Path, stop: signal.Signals | None = None, after: int = 6) -> tuple[int, str]:
    """(exit code, stderr); with `stop`, the signal is sent when so many steps are in the log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*arguments, "--output", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    log = output / "log.jsonl"
    while stop and process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= after:
            process.send_signal(stop)
            break
        time.sleep(0.01)
    _, error = process.communicate(timeout=300)
    return process.returncode, error


@pytest.mark.parametrize(
    ("stage", "stop"),
    [
        ("sft", signal.SIGTERM),
        pytest.param("ppo", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("reward", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("grpo", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bytes(
    stage: str, stop: signal.Signals, data: Path
) -> None:
    output, whole = data / "stopped", data / "whole"
    code, error = run(command(stage, data), output, stop)
    assert code == 1
    assert f"{stop.name}: saves after this step and ends" in error
    assert "it is saved, and the same command goes on from there" in error
    assert "Traceback" not in error
    steps = len(read_rows(output / "log.jsonl"))
    saved = [folder.name for folder in (output / ".work").iterdir()]
    assert any(name.rpartition("-")[2].lstrip("0") == str(steps) for name in saved), (steps, saved)
    assert run(command(stage, data), output)[0] == 0
    assert run(command(stage, data), whole)[0] == 0
    model = "policy" if stage in ("ppo", "grpo") else "model"
    assert digest_path(output / model) == digest_path(whole / model)
    assert len(read_rows(output / "log.jsonl")) == len(read_rows(whole / "log.jsonl"))


def test_a_second_signal_ends_at_once() -> None:
    with save_requests(0) as requests:
        signal.raise_signal(signal.SIGTERM)
        assert requests.now() == (True, True)
        with pytest.raises(RunError, match="ended at once"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is not requests.handle


def test_the_clock_asks_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    requests = SaveRequests(10)
    now[0] = 599.0
    assert requests.now() == (False, False)
    now[0] = 600.0
    assert requests.now() == (True, False)
    requests.saved()
    assert requests.now() == (False, False)
