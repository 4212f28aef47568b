"""The answers of `vicuna` in shards: joined and judged they are those of one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
VICUNA = ("vicuna", "--model", "nano/almost", "--baseline", "nano/sft", "--limit", 6, "--max-new-tokens", 24)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its own, and a commit that does not change while a test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("almost_eval.run.provenance.commit", lambda: "0")


def content(folder: Path) -> dict[str, Any]:
    """Name of a file -> its text, of results the JSON without times; what belongs to shards is left out."""
    files = {
        str(file.relative_to(folder)): file.read_text()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".") and "shard-" not in str(file.relative_to(folder))
    }
    results = json.loads(files["results.json"])
    return files | {"results.json": {key: value for key, value in results.items() if key != "timing"}}


def test_joined_answers_are_those_of_one_process(almost_eval: Command) -> None:
    for k in (1, 2):
        code, out, _ = almost_eval(*VICUNA, "--output", "run", "--shard", f"{k}/2")
        assert code == 0
        assert "almost-eval merge run" in out
    assert not list(Path("run").rglob("results.json"))  # nobody was judged
    code, _, err = almost_eval("report", "run/shard-1-of-2")
    assert code == 2
    assert "join the shards first" in err
    code, out, _ = almost_eval("merge", "run")
    assert code == 0
    assert "now the judge" in out
    assert almost_eval(*VICUNA, "--output", "run").code == 0
    joined = content(Path("run").rename("joined"))
    assert almost_eval(*VICUNA, "--output", "run").code == 0
    assert joined == content(Path("run"))
    assert almost_eval("verify", "joined").code == 0


def test_shards_write_one_date_and_answer_each_question_once(almost_eval: Command) -> None:
    Path("dated.jinja").write_text(
        '{{ strftime_now("%H:%M:%S") }}{% for m in messages %}\n\nHuman: {{ m.content }}{% endfor %}\n\nAssistant:'
    )
    dated = (*VICUNA, "--template", "dated.jinja", "--output", "run", "--shard")
    assert almost_eval(*dated, "1/2").code == 0
    began = time.time()
    while int(time.time()) == int(began):  # the next second, which is another date to a template
        time.sleep(0.05)
    assert almost_eval(*dated, "2/2").code == 0
    assert almost_eval("merge", "run").code == 0
    file = next(Path("run/shard-2-of-2/answers").iterdir())
    file.write_text(file.read_text() + file.read_text().splitlines(keepends=True)[0])
    code, _, err = almost_eval("merge", "run", "--output", "other")
    assert code == 2
    assert f"{file} does not answer the 3 questions of shard 2/2 once each" in err


def test_answer_files_have_no_shards(almost_eval: Command) -> None:
    lines = [{"question_id": 1, "text": "What is a cat?", "category": "generic"}]
    Path("questions.jsonl").write_text(json.dumps(lines[0]) + "\n")
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text(json.dumps({"question_id": 1, "text": "Hm.", "model_id": name}) + "\n")
    arguments = (
        "--questions",
        "questions.jsonl",
        "--answers",
        "a.jsonl",
        "--baseline",
        "b.jsonl",
        "--judge",
        "reward:nano/reward",
    )
    code, _, err = almost_eval("vicuna", *arguments, "--data", "hub", "--shard", "1/2")
    assert code == 2
    assert "here all are in files; leave it out" in err
