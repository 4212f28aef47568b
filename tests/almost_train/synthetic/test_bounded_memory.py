"""What the stages hold in memory at a middle size: each in a process of its own, whose peak the system counts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.scripted import ScriptedEngine
from almost_train.synthetic.prompts import PromptSettings, synthesize_prompts
from almost_train.synthetic.responses import Configuration, ResponseSettings, synthesize_responses

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
DATA = DataSource("hub", None)
MIB = 2**20


def peak(stage: str, size: int, folder: Path) -> int:
    """Bytes that a process held at most, which runs a function of this file."""
    code = f"import test_bounded_memory as t, pathlib; t.{stage}({size}, pathlib.Path({str(folder)!r}))"
    path = os.pathsep.join(map(str, [Path(__file__).parents[3], Path(__file__).parent]))
    command = [sys.executable, "-c", f"{code}; print(open('/proc/self/status').read())"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)[0])


def respond(size: int, folder: Path) -> None:
    """Answer so many prompts, each by 3,000 characters of its own."""
    folder.mkdir()
    with (folder / "prompts.jsonl").open("w") as stream:
        for i in range(size):
            stream.write(json.dumps({"id": f"p{i:05d}", "prompt": f"Why is number {i} odd?"}) + "\n")

    def complete(document: str) -> str:
        return f" {zlib.crc32(document.encode())}" * 300 + "."

    synthesize_responses(
        ResponseSettings(prompt_set="nano"),
        folder / "prompts.jsonl",
        [Configuration("one", "m", "good", 0)],
        folder / "out",
        data=DATA,
        engine_for=lambda _: ScriptedEngine(lambda *_: 0.0, complete=complete),
    )


def mine(size: int, folder: Path) -> None:
    """Judge so many candidates of 3,000 characters, which are too long; one in a thousand is kept."""
    said = 0

    def complete(_: str) -> str:
        nonlocal said
        said += 1
        own = "".join(f" {zlib.crc32(f'{said}/{i}'.encode())}" for i in range(6))
        return f" Why{own}?" if said % 1000 == 1 else own * 50

    settings = PromptSettings(
        count=size, prompt_set="nano", round_size=500, max_rounds=size // 500, accept_fewer=True, max_new_tokens=500
    )
    engine = ScriptedEngine(lambda *_: 0.0, complete=complete)
    result = synthesize_prompts(settings, "m", folder / "out", data=DATA, engine_for=lambda _: engine)
    assert result["metrics"]["rejected"]["too_long"] == size - size // 1000


@pytest.mark.parametrize("stage", ["respond", "mine"])
def test_long_texts_are_on_disk_alone(stage: str, tmp_path: Path) -> None:
    """10,000 more texts of 3,000 characters, 29 MiB, take less than 10 MiB more."""
    smaller, larger = (peak(stage, size, tmp_path / str(size)) for size in (2_000, 12_000))
    print(f"{stage}: {smaller / MIB:.1f} MiB, {larger / MIB:.1f} MiB")
    assert larger - smaller < 10 * MIB
