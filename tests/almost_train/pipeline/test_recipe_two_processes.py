"""`accelerate launch -m almost_train.cli run RECIPE`: a whole recipe in two processes, against one.

The nano recipe in its small form, every stage of the paper and the evaluation. What samples is done by the main process
alone, while the other one waits for it without a time limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import almost_train
from almost_eval.files import read_json

CONFIG = Path(almost_train.__file__).parent / "accelerate" / "ddp_cpu.yaml"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
LAUNCH = [*ACCELERATE, "--config_file", str(CONFIG)]
RUN = ["run", "nano", "--scale", "tiny", "--scale-model", "nano/vanilla-medium"]
STAGES = [
    *("prompts", "responses", "votes", "as_is_reward", "comparisons"),
    *("reward", "self_play", "sft", "rlsf", "evaluation"),
]
TRAINED = {"as_is_reward": "model", "reward": "model", "sft": "model", "rlsf": "policy"}

# The command, with torch's own limit of a wait at SECONDS and a main process that takes three times as long before it
# begins to sample. Without `WAIT` (an argument says so) what waits is under torch's limit.
IMPATIENT = """
import sys, time
from contextlib import contextmanager
from datetime import timedelta
import torch.distributed.distributed_c10d as c10d
from almost_train.cli.main import main
from almost_train.common import processes
from almost_train.pipeline import run

SECONDS = 4
c10d.default_pg_timeout = timedelta(seconds=SECONDS)
kind, *arguments = sys.argv[1:]
if kind == "limited":
    processes.WAIT = timedelta(seconds=SECONDS)
alone = run.alone

@contextmanager
def slow():
    time.sleep(3 * SECONDS)
    with alone():
        yield

run.alone = slow
sys.argv = ["almost-train", *arguments]
main()
"""


def execute(command: list[str], timeout: float = 500) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(almost_train.__file__).parents[1]),
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=timeout)


def figures(folder: Path, stage: str) -> Any:
    """The stage's metrics, but for how it was made, as one flat mapping."""
    metrics = read_json(folder / stage / "result.json")["metrics"]
    flat: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}/{key}")
        elif isinstance(value, list):
            for at, inner in enumerate(value):
                walk(inner, f"{name}/{at}")
        else:
            flat[name] = value

    walk({name: value for name, value in metrics.items() if name != "processes"}, stage)
    return {name: value for name, value in flat.items() if "per_second" not in name and "seconds" not in name}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_recipe_in_two_processes_is_that_in_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = execute([sys.executable, "-m", "almost_train.cli", *RUN, "--json", "--output", str(one)])
    assert alone.returncode == 0, alone.stderr[-3000:]
    together = execute([*LAUNCH, "-m", "almost_train.cli", *RUN, "--json", "--output", str(two)])
    assert together.returncode == 0, together.stderr[-3000:]
    # 1. Printed once, every stage.
    assert list(json.loads(together.stdout)) == list(json.loads(alone.stdout)) == STAGES
    # 2. The same figures, to the evaluation's of the last policy.
    for stage in STAGES:
        mine, theirs = figures(one, stage), figures(two, stage)
        assert mine.keys() == theirs.keys(), stage
        for name, value in mine.items():
            expected = pytest.approx(value, abs=1e-5, rel=1e-5) if isinstance(value, float) else value
            assert theirs[name] == expected, name
        assert read_json(two / stage / "result.json")["metrics"].get("processes") == (2 if stage in TRAINED else None)
    # 3. The same weights, and the same texts.
    for stage, model in TRAINED.items():
        weights = [load_file(folder / stage / model / "model.safetensors") for folder in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5, stage
    texts = ("prompts/prompts.jsonl", "comparisons/comparisons.jsonl", "self_play/demonstrations.jsonl")
    for file in texts:
        assert (one / file).read_text(encoding="utf-8") == (two / file).read_text(encoding="utf-8"), file
    # 4. Done: the same command does nothing.
    before = {stage: (two / stage / "result.json").stat().st_mtime_ns for stage in STAGES}
    assert execute([*LAUNCH, "-m", "almost_train.cli", *RUN, "--output", str(two)]).returncode == 0
    assert before == {stage: (two / stage / "result.json").stat().st_mtime_ns for stage in STAGES}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["as shipped", "limited"])
def test_no_process_tires_of_waiting_for_the_one_that_samples(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT, encoding="utf-8")
    command = [*LAUNCH, str(script), kind, *RUN, "--until", "prompts", "--output", str(tmp_path / "out")]
    done = execute(command, timeout=280)
    if kind == "limited":  # so the pause is one that an ordinary wait would not outlast
        assert done.returncode != 0
        assert "imed out" in done.stderr or "imeout" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / "out" / "prompts" / "result.json").exists()
