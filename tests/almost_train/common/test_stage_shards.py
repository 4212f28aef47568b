"""Shards of `synthesize responses` and of `self-play`: joined they are the stage of one process, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def almost_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, one_thread: None
) -> Train:
    """`almost_train("self-play", ...)`: the command in this process, in a folder of its own."""
    from almost_train.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["almost-train", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    monkeypatch.chdir(tmp_path)
    return run


def content(folder: Path) -> dict[str, Any]:
    """Name of a file -> its text, of `result.json` the JSON without times; what belongs to shards is left out."""
    files: dict[str, Any] = {
        file.name: file.read_text() for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")
    }
    result = json.loads(files["result.json"])
    return files | {"result.json": {key: value for key, value in result.items() if key != "seconds"}}


def joined(almost_train: Train, n: int, *arguments: object) -> Path:
    """The folder of a stage whose `n` shards are joined."""
    for k in range(1, n + 1):
        code, out, err = almost_train(*arguments, "--output", "stage", "--shard", f"{k}/{n}")
        assert code == 0, err
        assert "almost-train merge-shards stage" in out
    code, _, err = almost_train("merge-shards", "stage")
    assert code == 0, err
    return Path("stage").rename("joined")


def write_prompts(n: int) -> None:
    rows = [{"id": f"p{i}", "prompt": f"What can you tell me about the river number {i}?"} for i in range(n)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_responses(almost_train: Train) -> None:
    write_prompts(7)
    configurations = [
        {"name": f"{size}-{shots}", "model": f"nano/vanilla-{size}", "demonstrations": "good", "shots": shots}
        for size, shots in (("small", 1), ("medium", 1), ("small", 0))
    ]
    Path("configurations.yaml").write_text(json.dumps(configurations))
    arguments: tuple[str, ...] = (
        "synthesize",
        "responses",
        "--prompts",
        "prompts.jsonl",
        "--configurations",
        "configurations.yaml",
    )
    arguments += ("--prompt-set", "nano", "--max-new-tokens", "16")
    whole = joined(almost_train, 3, *arguments)
    assert almost_train(*arguments, "--output", "stage")[0] == 0
    assert content(whole) == content(Path("stage"))
    # Of what cannot be joined.
    one, two = (whole / f"shard-{k}-of-3" for k in (1, 2))
    code, _, err = almost_train("merge-shards", one, two, "--output", "new")
    assert (code, err.count("\n")) == (2, 1)
    assert "shard 3 of 3 missing" in err
    kept = {file: file.read_bytes() for file in one.iterdir() if file.is_file()}
    code, _, err = almost_train("merge-shards", whole, "--output", one)
    assert (code, err.count("\n")) == (2, 1)
    assert "is a shard's own folder, which the joined run would replace" in err
    assert {file: file.read_bytes() for file in one.iterdir() if file.is_file()} == kept
    code, _, err = almost_train(*arguments, "--output", one)
    assert code == 2
    assert "is a shard's" in err
    code, _, err = almost_train(*arguments, "--output", "stage", "--shard", "1/9")
    assert code == 2
    assert "there are prompts for 7 shards only" in err


def test_self_play(almost_train: Train) -> None:
    write_prompts(20)  # two chunks of dialogues whose candidates are scored together
    arguments: tuple[str, ...] = (
        "self-play",
        "--prompts",
        "prompts.jsonl",
        "--reward-model",
        "nano/reward",
        "--prompt-set",
        "nano",
    )
    arguments += ("--assistant-demonstrations", "good", "--user-demonstrations", "good", "--shots", "1")
    arguments += ("--assistant-model", "nano/vanilla-small", "--user-model", "nano/vanilla-small")
    arguments += ("--candidates", "2", "--max-turns", "2", "--max-new-tokens", "16", "--user-max-new-tokens", "16")
    whole = joined(almost_train, 2, *arguments)
    assert almost_train(*arguments, "--output", "stage")[0] == 0
    assert content(whole) == content(Path("stage"))
    assert json.loads((whole / "result.json").read_text())["metrics"]["candidates"] >= 40
    code, _, err = almost_train(*arguments, "--output", "more", "--shard", "1/3")
    assert code == 2
    assert "there are chunks of 16 dialogues for 2 shards only" in err
