"""What the README shows works: its example runs, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    yes, no = capsys.readouterr().out.split()
    assert float(yes) < 0 > float(no)


def test_every_command_and_option_exists() -> None:
    from almost_eval.cli import cli

    lines = re.findall(r"^almost-eval (.+)$", README, flags=re.MULTILINE)
    assert len(lines) >= 9
    for line in lines:
        name, *words = line.split("#")[0].split()
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, line


def test_every_file_and_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"`(benchmarks/[a-z_]+\.py)`", README):
        assert (ROOT / path).exists(), path
