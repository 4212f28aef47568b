"""The walks of `docs/architecture.md` are the files that commands really enter, in that order; none climbs back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import ROOMS

from almost_eval.nano import shipped
from almost_eval.nano.data import data_root

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_ENTERED = 33
MOST_TO_READ = 23
"""Files that `almost-eval hhh` may enter, and those of them that the page does not call asides."""


def walk(*arguments: str) -> list[dict[str, str | None]]:
    """What `walked.py` prints, in a process of its own: nothing is imported or cached before."""
    command = [sys.executable, str(TESTS / "walked.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, str | None]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def section(heading: str) -> str:
    """What the page says under a heading."""
    return PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def listed(heading: str) -> list[str]:
    """The files of the table under a heading."""
    return re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", section(heading), flags=re.MULTILINE)


def climbs(rows: list[dict[str, str | None]]) -> list[tuple[str, str]]:
    """(caller, file) where a file is first entered from a room further down in the order of use."""
    upward = []
    for row in rows:
        caller, file = row["caller"], str(row["file"])
        if caller is None or caller.split("/")[0] != file.split("/")[0]:
            continue
        order = ROOMS[file.split("/")[0]]
        here, there = (path.split("/")[1].removesuffix(".py") for path in (caller, file))
        if "__init__" not in (here, there) and order.index(there) > order.index(here):
            upward.append((caller, file))
    return upward


def test_a_run_of_hhh_from_the_command_line_to_its_results(tmp_path: Path) -> None:
    checkpoint, output = str(shipped("nano/almost")), tmp_path / "run"
    rows = walk(
        *("almost-eval", "hhh", "--model", checkpoint, "--data-root", str(data_root()), "--prompt-set", "builtin"),
        *("--limit", "4", "--output", str(output)),
    )
    assert (output / "results.json").is_file()
    files = [row["file"] for row in rows]
    heading = "From the command line to results.json"
    assert len(files) <= MOST_ENTERED, files
    assert listed(heading) == files
    assert len(files) - section(heading).count("| *aside:* ") <= MOST_TO_READ
    assert climbs(rows) == []


@pytest.mark.slow
def test_a_pair_from_its_answers_to_the_loss(tmp_path: Path) -> None:
    answers = {"good": "The panther has a huge body.", "weak": "It is small."}
    (tmp_path / "responses").mkdir()
    for name, text in answers.items():
        rows = [
            {"id": f"p{i}", "prompt": f"How big is panther {i}?", "response": text, "rejected": None} for i in (1, 2, 3)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "responses" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "ranking.yaml").write_text("- good\n- weak\n", encoding="utf-8")
    made = walk(
        *("almost-train", "synthesize", "comparisons", "--responses", str(tmp_path / "responses")),
        *("--ranking", str(tmp_path / "ranking.yaml"), "--output", str(tmp_path / "comparisons")),
    )
    learnt = walk(
        *("almost-train", "reward", "--comparisons", str(tmp_path / "comparisons" / "comparisons.jsonl")),
        *("--model", str(shipped("nano/vanilla-small")), "--max-length", "64", "--batch-size", "2"),
        *("--output", str(tmp_path / "reward")),
    )
    entered = [str(row["file"]) for row in (*made, *learnt)]
    assert climbs(made) == climbs(learnt) == []
    page = listed("From answers to the loss of the reward model")
    assert page
    assert set(page) <= set(entered)
    stages = [
        [file for file in dict.fromkeys(str(row["file"]) for row in rows) if file in page] for rows in (made, learnt)
    ]
    assert page == list(dict.fromkeys([*stages[0], *stages[1]]))
