"""Self-play on workers: the dialogues of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from almost_train.nano.data import write_prompts


@pytest.mark.slow
def test_dialogues_are_those_of_one_process(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4, pool="train", seed=0)
    base = f"self-play --prompts {prompts} --assistant-model nano/vanilla-small --user-model nano/vanilla-small "
    base += "--unguided --prompt-set nano --assistant-demonstrations good --user-demonstrations good --device cpu "
    base += "--dtype float32 --max-turns 1 --output"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    for arguments in (f"{base} {tmp_path}/one", f"{base} {tmp_path}/two --workers 2"):
        command = [sys.executable, "-m", "almost_train.cli", *arguments.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (
        {f.name: sorted(f.read_text().splitlines()) for f in (tmp_path / n).glob("*.jsonl")} for n in ("one", "two")
    )
    assert one
    assert one == two
