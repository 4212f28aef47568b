"""A training that is told to end saves, and goes on to the same bytes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import ALMOST_TRAIN, Forks, forks

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
        "sft": f"sft --demonstrations {data}/dialogues.jsonl --model nano/vanilla-small --epochs 20 --batch-size 4",
        "reward": f"reward --comparisons {data}/pairs.jsonl --model nano/vanilla-small --epochs 80 --batch-size 4",
        **{
            algorithm: f"rlsf --algorithm {algorithm} --prompts {data}/prompts.jsonl --policy nano/sft --reward-model "
            "nano/reward --steps 40 --batch-size 8 --max-new-tokens 12 --learning-rate 1e-5"
            + (" --mini-batch-size 8" if algorithm == "ppo" else "")
            for algorithm in ("ppo", "grpo")
        },
    }
    return [*own[stage].split(), *common]


@pytest.fixture(scope="module")
def start() -> Iterator[Forks]:
    modules = "almost_train.cli.main almost_train.sft.run almost_train.common.fit trl.trainer.sft_trainer"
    with forks(*modules.split(), "transformers.models.llama.modeling_llama") as started:
        yield started


def run(
    start: Forks, arguments: list[str], output: Path, stop: signal.Signals | None = None, after: int = 6
) -> tuple[int, str]:
    """(exit code, stderr); with `stop`, the signal is sent when so many steps are in the log."""
    process = start(*arguments, "--output", output, cwd=output.parent, code=ALMOST_TRAIN)
    if stop and process.until_lines(output / "log.jsonl", after):
        process.send(stop)
    return process.wait(), process.err.read_text()


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
    start: Forks, stage: str, stop: signal.Signals, data: Path
) -> None:
    output, whole = data / "stopped", data / "whole"
    code, error = run(start, command(stage, data), output, stop)
    assert code == 1
    assert f"{stop.name}: saves after this step and ends" in error
    assert "it is saved, and the same command goes on from there" in error
    assert "Traceback" not in error
    steps = len(read_rows(output / "log.jsonl"))
    saved = [folder.name for folder in (output / ".work").iterdir()]
    assert any(name.rpartition("-")[2].lstrip("0") == str(steps) for name in saved), (steps, saved)
    assert run(start, command(stage, data), output)[0] == 0
    assert run(start, command(stage, data), whole)[0] == 0
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
