"""What the README shows works: its example runs, its commands and files exist."""

from __future__ import annotations

import re
from importlib import import_module
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


@pytest.mark.parametrize(("program", "least"), [("almost-eval", 9), ("almost-train", 8)])
def test_every_command_and_option_exists(program: str, least: int) -> None:
    cli = import_module(f"{program.replace('-', '_')}.cli").cli
    lines = re.findall(rf"^{program} (.+)$", README.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(lines) >= least
    for line in lines:
        words = line.split("#")[0].split()
        depth = 2 if words[0] in ("synthesize", "nano") else 1
        shown = CliRunner().invoke(cli, [*words[:depth], "--help"])
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, line


def test_every_file_and_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"`(benchmarks/[a-z_]+\.py)`", README):
        assert (ROOT / path).exists(), path
