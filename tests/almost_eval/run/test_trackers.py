"""`--log-to`: what reaches a tracker, that no step is logged twice, and what is said where a package is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracked import tensorboard_scalars, wandb_rows

from almost_eval.errors import InputError, MissingDependencyError, RunError
from almost_eval.files import read_json
from almost_eval.run.store import read_results
from almost_eval.run.trackers import JSONL, Trackers, check_trackers, logging_to


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JSONL).read_text(encoding="utf-8").splitlines()]


def test_only_finite_numbers_are_logged(tmp_path: Path) -> None:
    with Trackers(tmp_path, names=["jsonl"]) as trackers:
        trackers.log({"step": 3, "loss": 0.5, "kl": None, "why": "text", "ratio": float("nan"), "n": 2})
    assert rows_of(tmp_path) == [{"step": 3, "loss": 0.5, "n": 2}]


def test_a_resumed_run_logs_no_step_twice(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(6)]
    with Trackers(tmp_path, names=["jsonl"]) as trackers:
        for row in rows[:5]:  # killed after step 4, whose checkpoint is of step 3
            trackers.log(row)
    with Trackers(tmp_path, rows[:3], names=["jsonl"]) as trackers:
        for row in rows[3:]:
            trackers.log(row)
    assert rows_of(tmp_path) == rows


def test_a_tracker_that_is_asked_for_late_gets_the_earlier_steps(tmp_path: Path) -> None:
    with Trackers(tmp_path, [{"step": 0, "loss": 1.0}], names=["jsonl"]) as trackers:
        trackers.log({"step": 1, "loss": 0.5})
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1]


def test_what_is_logged_is_on_disk_at_once(tmp_path: Path) -> None:
    with Trackers(tmp_path, names=["jsonl"]) as trackers:
        trackers.log({"step": 0, "loss": 1.0})
        assert len(rows_of(tmp_path)) == 1


def test_nothing_is_written_unasked_or_by_another_process(tmp_path: Path) -> None:
    with Trackers(tmp_path) as trackers:
        trackers.log({"step": 0, "loss": 1.0})
    with logging_to(["jsonl"]), Trackers(tmp_path, active=False) as trackers:
        trackers.log({"step": 0, "loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_the_names_of_a_block_hold_inside_it_alone(tmp_path: Path) -> None:
    with logging_to(["jsonl"]), Trackers(tmp_path / "inside"):
        pass
    with Trackers(tmp_path / "outside"):
        pass
    assert (tmp_path / "inside" / JSONL).exists()
    assert not (tmp_path / "outside").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--log-to jsonl: cannot write"), Trackers(tmp_path / "file", names=["jsonl"]):
        pass


def test_an_unknown_tracker_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_with_its_install_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(MissingDependencyError, match=f"--log-to {name} needs .* pip install {name}$"):
        check_trackers(["jsonl", name])


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(6)]
    with Trackers(tmp_path, names=["tensorboard"]) as trackers:
        for row in rows[:5]:
            trackers.log(row)
    with Trackers(tmp_path, rows[:3], names=["tensorboard"]) as trackers:
        for row in rows[3:]:
            trackers.log(row)
    assert tensorboard_scalars(tmp_path) == {"loss": [(step, float(step)) for step in range(6)]}


def test_wandb_keeps_its_id_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    rows = [{"step": step, "loss": 1.0 / (step + 1), "reward/mean": 2.0} for step in range(4)]
    for part in (rows[:2], rows[2:]):
        with Trackers(tmp_path, names=["wandb"]) as trackers:
            for row in part:
                trackers.log(row)
    assert wandb_rows(tmp_path) == rows
    id = read_json(tmp_path / ".wandb.json")["id"]
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    # Of two runs that begin in the same second, W&B numbers the second one.
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{id}(-\d+)?", run.name) for run in runs), runs
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"0123456789" * 4 not in written


def test_wandb_without_a_key_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    nowhere = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    environment = {**os.environ, **nowhere}
    environment.pop("WANDB_API_KEY", None)
    command = [sys.executable, "-m", "almost_eval.cli", "hhh", "--limit", "1", "--output", str(tmp_path)]
    command += ["--log-to", "wandb"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # W&B reads it once
    assert told.returncode == 1
    assert re.fullmatch(r"error: --log-to wandb: no run could be opened .*WANDB_MODE=offline\n", told.stderr)
    assert read_results(tmp_path)["metrics"]


# --- the command line ---


def test_an_evaluation_logs_its_metrics_once(
    almost_eval: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = ("hhh", "--limit", 2, "--output", tmp_path, "--log-to", "jsonl,tensorboard,wandb")
    assert almost_eval(*command).code == 0
    assert almost_eval(*command).code == 0  # goes on with nothing to do
    metrics = read_results(tmp_path)["metrics"]
    (row,) = rows_of(tmp_path)
    assert row["step"] == 0
    assert row["hhh/choice/accuracy"] == metrics["accuracy"]["value"]
    assert row["hhh/choice/accuracy (stderr)"] == metrics["accuracy"]["stderr"]
    assert wandb_rows(tmp_path) == [row]
    curves = tensorboard_scalars(tmp_path)
    assert [len(points) for points in curves.values()] == [1] * (len(row) - 1)


def test_a_tracker_is_refused_before_the_model_is_looked_for(
    almost_eval: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = ("--model", tmp_path / "nowhere", "--output", tmp_path / "run")
    unknown = almost_eval("hhh", *nowhere, "--log-to", "jsonl,tracker")
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err.count("\n") == 1
    assert "unknown tracker 'tracker'" in unknown.err
    monkeypatch.setitem(sys.modules, "wandb", None)
    missing = almost_eval("hhh", *nowhere, "--log-to", "wandb")
    assert missing.code == 2
    assert missing.err.endswith("install it with: pip install wandb\n")
    assert not (tmp_path / "run").exists()
