"""What the README shows works: its example runs, its commands and files exist."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from shown_commands import ROOT, check_command, check_links, shown

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    metric, compared, counted, rewards = capsys.readouterr().out.splitlines()
    accuracy = ast.literal_eval(metric)
    assert counted == f"{accuracy['n']} samples"
    assert float(compared.split()[0]) > 0  # the aligned model against the vanilla one
    assert ast.literal_eval(rewards)[0] > 0


def test_every_command_and_option_exists() -> None:
    found = shown(README)
    for program, line in found:
        check_command(program, line)
    counts = Counter(program for program, _ in found)
    assert counts["almost-eval"] >= 9
    assert counts["almost-train"] >= 8
    assert counts["almost-serve"] >= 4


def test_every_file_and_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert f"\n{target}:" in makefile
    check_links(README, ROOT)
    for path in re.findall(r"`(benchmarks/[a-z_]+\.py)`", README):
        assert (ROOT / path).exists(), path
