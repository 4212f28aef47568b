"""What the README shows works: its example runs, its commands and files exist."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest
from shown_commands import ROOT, check_command, check_links, shown

from almost_eval import __version__

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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_and_make_target_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", text, flags=re.MULTILINE):
        assert f"\n{''.join(target)}:" in makefile
    check_links(text, ROOT)
    for path in re.findall(r"`((?:benchmarks|tests|almost_eval)/[a-z_/]+\.py)`", text):
        assert (ROOT / path).exists() or page == "CHANGELOG.md", path


def test_the_readme_is_short() -> None:
    assert len(README.encode()) < 12_000


def test_the_changelog_has_dates_and_the_usual_heads() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert first == "[Unreleased]"
    assert f"[{__version__}] - " in released[0]
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in released)
    assert set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }


def test_the_licence_is_the_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
