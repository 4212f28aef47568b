"""Shards: joined they are the unsharded run in every byte but the times, and what cannot be joined is named."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import InputError
from almost_eval.run.shards import Shard, beginning, without_shard

Command = Callable[..., Any]
HHH = ("hhh", "--limit", 8, "--batch-tokens", 128)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its own, and a commit that does not change while a test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("almost_eval.run.provenance.commit", lambda: "0")


def sharded(almost_eval: Command, n: int, *arguments: object) -> Path:
    """The folder of a run whose `n` shards are joined."""
    for k in range(1, n + 1):
        code, out, err = almost_eval(*arguments, "--output", "run", "--shard", f"{k}/{n}")
        assert (code, err) == (0, ""), err
        assert f"shard {k}/{n} is done" in out
    code, _, err = almost_eval("merge", "run")
    assert (code, err) == (0, "")
    return Path("run").rename("sharded")


def content(folder: Path) -> dict[str, object]:
    """Name of a file -> its bytes, of results the JSON without times; what belongs to shards is left out."""
    files: dict[str, object] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if not file.relative_to(folder).parts[0].startswith("shard-"):
            files[str(file.relative_to(folder))] = file.read_bytes()
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("timing").keys() == {"seconds", "seconds_to_first_sample", "samples_computed_now"}
    return files | {"results.json": results}


CASES = [
    pytest.param((*HHH, "--protocol", "choice"), 3, id="hhh-choice"),
    pytest.param((*HHH, "--protocol", "likelihood"), 2, id="hhh-likelihood"),
    pytest.param((*HHH, "--protocol", "reward"), 2, id="hhh-reward"),
    pytest.param(("truthfulqa", "--limit", 24, "--batch-tokens", 256), 3, id="truthfulqa"),
    pytest.param(("harness", "--tasks", "truthfulqa_gen", "--limit", 6), 2, id="generation", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("arguments", "n"), CASES)
def test_joined_shards_are_the_unsharded_run(almost_eval: Command, arguments: tuple[object, ...], n: int) -> None:
    joined = content(sharded(almost_eval, n, *arguments))
    assert almost_eval(*arguments, "--output", "run").code == 0
    assert joined == content(Path("run"))
    assert almost_eval("verify", "sharded").code == 0


@pytest.fixture
def shards(almost_eval: Command) -> Path:
    """The folder of a run of three shards that are done and not joined."""
    for k in (1, 2, 3):
        assert almost_eval(*HHH, "--output", "run", "--shard", f"{k}/3").code == 0
    return Path("run")


def test_what_cannot_be_joined_is_named(almost_eval: Command, shards: Path) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = almost_eval(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return str(err)

    one, two, three = (shards / f"shard-{k}-of-3" for k in (1, 2, 3))
    # A shard is no run.
    for command in ("report", "verify"):
        assert "join the shards first: almost-eval merge run" in refused(command, one)
    assert "almost-eval merge run" in refused("compare", one, two)
    assert "join them first: almost-eval merge run" in refused("report", shards)
    assert "is a shard's; give its --shard" in refused(*HHH, "--output", one)
    # Missing, twice there, of another number, of another run.
    assert "shard 2 of 3 missing" in refused("merge", one, three)
    assert "shard 1/3 is there twice" in refused("merge", one, one, two, three)
    assert almost_eval(*HHH, "--output", "other", "--shard", "1/4").code == 0
    assert "other/shard-1-of-4 is shard 1/4, run/shard-1-of-3 is 1/3" in refused("merge", shards, "other")
    assert almost_eval(*HHH, "--seed", 1, "--output", "seed", "--shard", "3/3").code == 0
    assert "another run than run/shard-1-of-3: seed was 0, is 1" in refused("merge", one, two, "seed")
    assert "holds no shard" in refused("merge", "no-such-folder")
    # Overlapping samples, a lost line, a line of another shard, an unfinished shard.
    mark = json.loads((two / "shard.json").read_text())
    first = json.loads((one / "shard.json").read_text())
    both = sorted([first["places"][0], *mark["places"][1:]])
    (two / "shard.json").write_text(json.dumps({**mark, "places": both}))
    assert "overlap: both hold sample 1" in refused("merge", shards)
    (two / "shard.json").write_text(json.dumps({**mark, "finished": None}))
    assert "shard 2/3 in run/shard-2-of-3 is not finished" in refused("merge", shards)
    (two / "shard.json").write_text(json.dumps(mark))
    lines = (two / "samples.jsonl").read_text().splitlines(keepends=True)
    (two / "samples.jsonl").write_text("".join(lines[1:]))
    assert "lacks 1 of its samples" in refused("merge", shards)
    foreign = (one / "samples.jsonl").read_text().splitlines(keepends=True)[0]
    (two / "samples.jsonl").write_text("".join([*lines, foreign]))
    assert "which is another shard's" in refused("merge", shards)
    # Nothing was written by all this, and with the shard whole again they are joined.
    assert sorted(path.name for path in shards.iterdir()) == [".lock", one.name, two.name, three.name]
    (two / "samples.jsonl").write_text("".join(lines))
    assert almost_eval("merge", three, one, two, "--output", "elsewhere").code == 0
    assert almost_eval("verify", "elsewhere").code == 0


def test_a_damaged_shard_is_named(almost_eval: Command, shards: Path) -> None:
    """Whatever of a mark is changed, the end is one line, or the right run: no other order and no traceback."""
    one, two = shards / "shard-1-of-3", shards / "shard-2-of-3"
    mark = json.loads((one / "shard.json").read_text())
    places, ids, finished = mark["places"], mark["ids"], mark["finished"]
    damage: list[tuple[dict[str, object], str]] = [
        ({"places": places[::-1]}, "its places do not ascend"),
        ({"places": [*places[:-1], 9999]}, "its places are not among"),
        ({"places": [-1, *places[1:]]}, "its places are not among"),
        ({"places": None}, "its places are not among"),
        ({"places": places[:-1]}, "its ids are not those of its places"),
        ({"ids": [1] * len(ids)}, "its ids are not those of its places"),
        ({"of": 0}, "no numbers of one"),
        ({"total": True}, "no numbers of one"),
        ({"whole": None}, "its whole or finished is no object"),
        ({"finished": [1]}, "its whole or finished is no object"),
        ({"finished": {}}, "its finished is no report"),
        ({"finished": {**finished, "engine": None}}, "its finished is no report"),
        ({"finished": {**finished, "timing": {}}}, "its finished is no report"),
        ({"total": 99}, "another run than run/shard-1-of-3: total was 99, is 32"),
        ({"whole": {"allowed": {**mark["whole"]["allowed"], "missing": 1.0}}}, ": allowed.missing was 1.0, is 0.01"),
    ]
    for changed, problem in damage:
        (one / "shard.json").write_text(json.dumps({**mark, **changed}))
        code, out, err = almost_eval("merge", shards)
        assert (code, out, err.count("\n")) == (2, "", 1), changed
        assert problem in err
    (one / "shard.json").write_text(json.dumps(mark))
    prompts = (two / "prompts.jsonl").read_bytes()
    (two / "prompts.jsonl").write_bytes(prompts[: len(prompts) // 2])
    code, _, err = almost_eval("merge", shards)
    assert code == 2
    assert "error: run/shard-2-of-3/prompts.jsonl and run/shard-1-of-3/prompts.jsonl differ" in err
    assert not (shards / "spec.json").exists()
    (two / "prompts.jsonl").unlink()  # any shard's will do
    assert almost_eval("merge", shards).code == 0
    assert (shards / "prompts.jsonl").read_bytes() == prompts


def test_the_joined_run_goes_nowhere_by_chance(almost_eval: Command, shards: Path) -> None:
    """Not into a shard, whose lines it would replace, and not beside the first of several folders."""
    Path("copy").mkdir()
    moved = (shards / "shard-2-of-3").rename(Path("copy") / "shard-2-of-3")
    before = {file: file.read_bytes() for file in moved.iterdir()}
    code, _, err = almost_eval("merge", "copy", shards)
    assert code == 2
    assert "error: there are shards in run and in copy: say with --output where the run goes" in err
    code, _, err = almost_eval("merge", "copy", shards, "--output", moved)
    assert code == 2
    assert "copy/shard-2-of-3 is a shard's own folder" in err
    assert {file: file.read_bytes() for file in moved.iterdir()} == before
    assert almost_eval("merge", "copy", shards, "--output", "joined").code == 0
    first = content(Path("joined"))
    assert almost_eval("merge", "copy", shards, "--output", "joined").code == 0  # once more is the same
    assert content(Path("joined")) == first


def test_a_killed_shard_goes_on(almost_eval: Command, shards: Path) -> None:
    two = shards / "shard-2-of-3"
    lines = (two / "samples.jsonl").read_bytes()
    # As a kill leaves it: some lines, the last of them torn, and a mark without an end.
    mark = json.loads((two / "shard.json").read_text())
    (two / "shard.json").write_text(json.dumps({**mark, "finished": None}))
    (two / "samples.jsonl").write_bytes(lines[: len(lines) // 2])
    assert almost_eval(*HHH, "--output", "run", "--shard", "2/3").code == 0
    assert (two / "samples.jsonl").read_bytes() == lines
    assert almost_eval("merge", "run").code == 0
    shutil.move("run", "joined")
    assert almost_eval(*HHH, "--output", "run").code == 0
    assert content(Path("joined")) == content(Path("run"))


def test_what_is_no_shard_is_refused(almost_eval: Command) -> None:
    for text in ("3", "0/4", "5/4", "a/b", "1/0"):
        code, _, err = almost_eval("hhh", "--shard", text)
        assert (code, err.count("\n")) == (2, 1)
        assert "write 3/8 for the third of eight" in err
    code, _, err = almost_eval("hhh", "--limit", 1, "--shard", "9/9")
    assert code == 2
    assert "there are samples for 4 shards only" in err
    code, _, err = almost_eval("hhh", "--limit", 1, "--shard", "1/2", "--log-to", "jsonl")
    assert code == 2
    assert "give it to almost-eval merge" in err


def test_the_plan_says_how_shards_are_balanced(almost_eval: Command) -> None:
    code, out, _ = almost_eval(*HHH, "--shard", "2/3", "--dry-run")
    assert code == 0
    assert "shard: 2/3: " in out
    assert "tokens of each shard: " in out
    assert "% more tokens than one process computes" in out


def test_the_command_of_a_shard_is_that_of_the_run() -> None:
    command = ["almost-eval", "hhh", "--shard", "3/8", "--limit", "2"]
    assert without_shard(command) == ["almost-eval", "hhh", "--limit", "2"]
    assert without_shard(["almost-eval", "hhh", "--shard=3/8"]) == ["almost-eval", "hhh"]
    assert Shard.parse("3/8") == Shard(3, 8)
    with pytest.raises(InputError, match="K/N"):
        Shard.parse("9/8")


def test_of_shards_that_start_together_one_is_the_first() -> None:
    whole, first, second = Path("run"), Shard(1, 2), Shard(2, 2)
    seen: list[Path | None] = []

    def begin() -> None:
        with beginning(whole, second) as begun:
            seen.append(begun)

    with beginning(whole, first) as begun:
        assert begun is None
        other = threading.Thread(target=begin)
        other.start()
        other.join(0.3)  # it waits: what both have in common is about to be written
        first.folder(whole).mkdir()
        (first.folder(whole) / "spec.json").write_text("{}")
    other.join()
    assert seen == [first.folder(whole)]
