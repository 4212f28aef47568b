"""`list` shows what there is, and `completion` is a script that works."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.prompt_sets import PROMPT_SET_NAMES
from almost_eval.data.sources import DATA_NAMES
from almost_eval.engines.build import ENGINES
from almost_eval.models.chat import load_template
from almost_eval.models.stops import STOP_STRINGS
from almost_eval.nano import BUILT_IN, SHIPPED, shipped
from almost_eval.tasks.registry import TASKS

Command = Callable[..., Any]
PROGRAM = Path(sys.executable).with_name("almost-eval")


@pytest.fixture
def listed(almost_eval: Command) -> dict[str, Any]:
    done = almost_eval("list", "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_everything_that_there_is(listed: dict[str, Any]) -> None:
    names = {kind: [row["name"] for row in rows] for kind, rows in listed.items()}
    assert names["tasks"] == [*TASKS, "vicuna"]
    assert names["data"] == list(DATA_NAMES)
    assert names["prompt_sets"] == list(PROMPT_SET_NAMES)
    assert names["engines"] == list(ENGINES)
    assert names["models"] == list(BUILT_IN)
    files = Path(sys.modules["almost_eval.models.chat"].__file__ or "").parent / "templates"
    assert set(names["templates"]) == {file.stem for file in files.glob("*.jinja")} == set(STOP_STRINGS)
    for name in names["templates"]:
        assert load_template(name, None) is not None


def test_sizes_are_those_of_the_weights(listed: dict[str, Any]) -> None:
    from safetensors import safe_open

    rows = {row["name"]: row for row in listed["models"]}
    for name in SHIPPED:
        file = shipped(name) / "model.safetensors"
        with safe_open(file, framework="np") as weights:
            counted = sum(weights.get_tensor(key).size for key in weights.keys())  # noqa: SIM118
        assert (rows[name]["parameters"], rows[name]["bytes"]) == (counted, file.stat().st_size)


def test_tables_hold_the_same_names(listed: dict[str, Any], almost_eval: Command) -> None:
    out = almost_eval("list").out
    for rows in listed.values():
        for row in rows:
            assert row["name"] in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, almost_eval: Command) -> None:
    code, out, err = almost_eval("completion", shell)
    assert (code, err) == (0, "")
    assert f"_ALMOST_EVAL_COMPLETE={shell}_complete" in out
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=out, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")
    assert shell in almost_eval("completion", "--help").out


def test_unknown_shell(almost_eval: Command) -> None:
    code, _, err = almost_eval("completion", "bsh")
    assert (code, err) == (2, "error: there is no completion for the shell 'bsh'; did you mean 'bash'? known: bash, "
                              "fish, zsh\n")  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("almost-eval tru", "plain,truthfulqa"),
        ("almost-eval judge che", "plain,check"),
        ("almost-eval hhh --norm", "plain,--normalise"),
        ("almost-eval hhh --conf", "plain,--config"),
        ("almost-eval nosuch --x", ""),
    ],
)
def test_a_line_is_completed(typed: str, offered: str) -> None:
    """As the script of bash asks for it."""
    asked = {"_ALMOST_EVAL_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run([PROGRAM], env={**os.environ, **asked}, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (offered, "")
