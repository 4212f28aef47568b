"""`--slurm`: the script is valid, asks for what it should, and gives the run of one process when it is really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from almost_eval.cli.main import cli
from almost_eval.errors import InputError

FAKE = """#!/bin/bash
# Runs what it is handed at once: each task of an array, or a job that depends on one.
script=$(mktemp) && cat > "$script"
echo "sbatch $*" >> "$SUBMITTED"
if tasks=$(grep -oP '(?<=--array=1-)\\d+' "$script"); then
  for task in $(seq "$tasks"); do
    SLURM_ARRAY_TASK_ID=$task bash "$script" >> "$SUBMITTED.log" 2>&1 || echo failed >&2
  done
  echo "1234;cluster"
else
  bash "$script" >> "$SUBMITTED.log" 2>&1
fi
"""
HHH = ("hhh", "--model", "nano/almost", "--limit", "8", "--device", "cpu")


def almost_eval(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "almost_eval.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((*HHH, "--slurm", 2), "--slurm: name the folder of the run with --output"),
        ((*HHH, "--output", "x", "--slurm", 2, "--shard", "1/2"), "--slurm makes the shards itself; leave out --shard"),
        ((*HHH, "--output", "x", "--slurm=2", "--dry-run"), "--slurm takes no --dry-run"),
        ((*HHH, "--slurm", 2, "--output", "x", "--seed", "y"), "Invalid value for '--seed'"),
    ],
)
def test_what_is_wrong_is_said_now_and_not_by_each_job(
    arguments: tuple[object, ...], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["almost-eval", *words])
    with pytest.raises((InputError, click.UsageError)) as caught:
        cli.main(words, prog_name="almost-eval", standalone_mode=False)
    message = caught.value.format_message() if isinstance(caught.value, click.UsageError) else str(caught.value)
    assert message.startswith(problem)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_script_is_run_and_its_run_is_that_of_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "options.yaml").write_text("seed: 3\n")
    printed = almost_eval(*HHH, "--config", "options.yaml", "--output", "runs/it's", "--slurm", 3, cwd=folder)
    assert printed.returncode == 0, printed.stderr
    assert "--slurm" not in printed.stdout
    assert list(folder.iterdir()) == [folder / "options.yaml"]  # nothing ran
    checked = subprocess.run(["bash", "-n"], input=printed.stdout, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")

    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(FAKE)
    (tools / "sbatch").chmod(0o700)
    submitted = tmp_path / "submitted"
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
        "SUBMITTED": str(submitted),
    }
    done = subprocess.run(
        ["bash", "-s", "--", "--partition=gpu"],
        input=printed.stdout,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    log = Path(f"{submitted}.log").read_text()
    assert (done.returncode, done.stderr) == (0, ""), log
    assert submitted.read_text().splitlines() == [
        "sbatch --parsable --partition=gpu",
        "sbatch --dependency=afterany:1234 --partition=gpu",
    ]
    alone = almost_eval(*HHH, "--seed", 3, "--output", tmp_path / "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    merged = folder / "runs" / "it's"
    assert (merged / "samples.jsonl").read_text().splitlines() == sorted(
        (tmp_path / "alone" / "samples.jsonl").read_text().splitlines(),
        key=(merged / "samples.jsonl").read_text().splitlines().index,
    )
    results = [json.loads((run / "results.json").read_text()) for run in (merged, tmp_path / "alone")]
    for result in results:
        del result["timing"], result["provenance"]["command"]
    assert results[0] == results[1]
