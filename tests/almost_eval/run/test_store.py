"""A run folder: what is kept, what is repaired, what is refused."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import RunError, StoreError
from almost_eval.run.store import (
    RunStore,
    digest_records,
    read_json,
    read_results,
    read_samples,
    read_spec,
    record_from_dict,
    record_to_dict,
    write_json,
)
from almost_eval.types import Sample, SampleRecord, Score

SPEC = {"task": "t", "engine": {"dtype": "float32", "batch_size": None}, "command": ["a"], "shots": (1, 2)}


def record(id: str, value: float | None = 1.0) -> SampleRecord:
    sample = Sample(id, (), (), 0, cluster=f"context of {id}", group="group", metadata={"lengths": [1, 2]})
    outputs = {"loglikelihoods": [[-0.1, -1e-300]]}
    return SampleRecord(sample, outputs, Score(value, None if value is not None else "non_finite", {"accuracy": value}))


def filled(folder: Path, *ids: str) -> Path:
    """A run folder with these lines; its samples.jsonl is returned."""
    with RunStore(folder, SPEC) as store:
        for id in ids:
            store.append(record(id))
    return folder / "samples.jsonl"


def test_a_line_comes_back_as_it_was(tmp_path: Path) -> None:
    before = record("ünï/\u2028 1", 0.1 + 0.2)
    with RunStore(tmp_path, SPEC) as store:
        store.append(before)
    (after,) = read_samples(tmp_path)
    assert after == before
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    assert list(line) == ["id", "score", "reason", "metrics", "outputs", "prompt_tokens_truncated", "sample"]
    assert list(line["sample"]) == ["gold", "cluster", "group", "metadata"]
    assert record_to_dict(record_from_dict(line)) == line


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with RunStore(tmp_path, SPEC) as store:
        store.append(record("1"))
        assert [r.sample.id for r in read_samples(tmp_path)] == ["1"]


def test_goes_on_from_what_is_there(tmp_path: Path) -> None:
    filled(tmp_path, "1", "2")
    with RunStore(tmp_path, SPEC | {"command": ["b"]}) as store:
        assert store.done.keys() == {"1", "2"}
        assert store.spec["command"] == ["a"]  # what began the run
        store.append(record("3"))
    assert [r.sample.id for r in read_samples(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize("half", [b'{"id": "3", "sco', b'{"id": "\xc3', b"\x00\x00", b"{}", b" "])
def test_a_half_written_last_line_is_repaired(half: bytes, tmp_path: Path) -> None:
    file = filled(tmp_path, "1", "2")
    whole = file.read_bytes()
    file.write_bytes(whole + half)
    assert [r.sample.id for r in read_samples(tmp_path)] == ["1", "2"]
    with RunStore(tmp_path, SPEC) as store:
        assert store.done.keys() == {"1", "2"}
        assert file.read_bytes() == whole
        store.append(record("3"))
    assert [r.sample.id for r in read_samples(tmp_path)] == ["1", "2", "3"]


def test_only_half_a_line(tmp_path: Path) -> None:
    file = filled(tmp_path)
    file.write_bytes(b'{"id": "1')
    with RunStore(tmp_path, SPEC) as store:
        assert store.done == {}
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        "oops",
        "{}",
        "[1]",
        "null",
        "",
        '"\xff"',
        json.dumps(record_to_dict(record("9")) | {"score": "1.0"}),
        json.dumps(record_to_dict(record("9")) | {"score": float("nan")}),
        json.dumps(record_to_dict(record("9")) | {"id": 9}),
        json.dumps(record_to_dict(record("9")) | {"sample": None}),
        json.dumps(record_to_dict(record("9")) | {"outputs": [1]}),
    ],
)
def test_a_malformed_line_is_named(line: str, tmp_path: Path) -> None:
    file = filled(tmp_path, "1", "2", "3")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + line.encode("latin-1") + b"\n" + lines[2])
    with (
        pytest.raises(StoreError, match=r"samples.jsonl, line 2 is not a sample \(.*\); remove the line"),
        _open(tmp_path),
    ):
        pass


def test_a_second_line_for_a_sample_is_named(tmp_path: Path) -> None:
    file = filled(tmp_path, "1", "2")
    file.write_text(file.read_text() * 2)
    with pytest.raises(StoreError, match=r"line 3: a second line for sample '1'; remove one"), _open(tmp_path):
        pass


def _open(folder: Path, spec: dict[str, Any] | None = None) -> RunStore:
    return RunStore(folder, spec or SPEC)


def test_another_spec_is_refused_by_name(tmp_path: Path) -> None:
    filled(tmp_path, "1")
    other = {"weight_digest": "f" * 64} | SPEC | {"engine": {"dtype": "bfloat16", "batch_size": 8}}
    said = r'holds another run: engine.dtype was "float32", is "bfloat16"; engine.batch_size was null, is 8; weight_dig'
    with pytest.raises(StoreError, match=said), _open(tmp_path, other):
        pass
    said = r'task was "t", is "u"; engine.dtype was "float32", is null; shots was \[1, 2\], is null; choose another'
    with pytest.raises(StoreError, match=said), _open(tmp_path, {"task": "u"}):
        pass
    assert json.loads((tmp_path / "spec.json").read_text()) == json.loads(json.dumps(SPEC))


@pytest.mark.parametrize("name", ["samples.jsonl", "results.json"])
def test_a_folder_without_a_spec_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(StoreError, match=f"has a {name} but no spec.json, so what made it is unknown"), _open(tmp_path):
        pass
    assert not (tmp_path / "spec.json").exists()


def test_a_broken_spec_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text('{"task": ')
    with pytest.raises(StoreError, match=r"spec.json cannot be read as JSON"), _open(tmp_path):
        pass


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with RunStore(tmp_path, SPEC):
        with pytest.raises(StoreError, match="in use by another process"), _open(tmp_path):
            pass
        with pytest.raises(StoreError, match="in use by another process"), _open(tmp_path):  # and still locked
            pass
    with _open(tmp_path):
        pass


def test_a_refused_folder_is_let_go(tmp_path: Path) -> None:
    filled(tmp_path, "1")
    with pytest.raises(StoreError, match="another run"), _open(tmp_path, {"task": "u"}):
        pass
    with _open(tmp_path):
        pass


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match="file is a file; --output names the folder of a run"),
        _open(tmp_path / "file"),
    ):
        pass
    with (
        pytest.raises(StoreError, match=r"cannot write to .*file/run \(Not a directory\)"),
        _open(tmp_path / "file/run"),
    ):
        pass
    (tmp_path / "run/samples.jsonl").mkdir(parents=True)
    write_json(tmp_path / "run/spec.json", SPEC)
    with pytest.raises(StoreError, match=r"cannot write to .*run \(Is a directory\)"), _open(tmp_path / "run"):
        pass


def test_a_full_disk_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = _Full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    said = r"cannot write to .* \(No space left on device\); what was scored is kept"
    with RunStore(tmp_path, SPEC) as store:
        store.append(record("1"))
        monkeypatch.setattr(store._lines, "_stream", full)
        with pytest.raises(RunError, match=said):
            store.append(record("2"))
    with _open(tmp_path) as store:
        monkeypatch.setattr("almost_eval.run.store.write_json", full.write)
        with pytest.raises(RunError, match=said):
            store.finish({})
    assert [r.sample.id for r in read_samples(tmp_path)] == ["1"]
    assert not (tmp_path / "results.json").exists()


class _Full:
    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, *_: object) -> None:
        raise self.error

    def close(self) -> None:
        raise self.error


def test_results_are_whole_or_absent(tmp_path: Path) -> None:
    with RunStore(tmp_path, SPEC) as store:
        assert store.results() is None
        with pytest.raises(ValueError, match="Out of range"):  # NaN is not JSON
            store.finish({"value": float("nan")})
        assert store.results() is None
        store.finish({"value": 1.0})
        assert store.results() == {"value": 1.0}
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} == {"spec.json", "samples.jsonl", "results.json"}


def test_the_digest_is_of_the_records_in_any_order() -> None:
    assert digest_records([record("1"), record("2")]) == digest_records([record("2"), record("1")])
    assert digest_records([record("1"), record("2")]) != digest_records([record("1"), record("2", 0.0)])
    assert digest_records([record_from_dict(record_to_dict(record("1")))]) == digest_records([record("1")])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x.json is not there; give the folder of a run"):
        read_json(tmp_path / "x.json")
    filled(tmp_path, "1")
    with pytest.raises(StoreError, match="is not finished; run its command again, and it goes on"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(StoreError, match="is not a run's: it lacks a JSON object"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"task": 1}')
    with pytest.raises(StoreError, match="it lacks metrics, headline"):
        read_results(tmp_path)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "nul": lambda content: b"\0" * len(content),
    "half nul": lambda content: content[:20] + b"\0" * 4096,
    "garbage": lambda content: bytes(range(128, 256)) * 40,
    "another value": lambda content: b"null",
    "nested": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", TORN)
def test_torn_results_say_that_their_file_may_go(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, "1")
    results = json.dumps(dict.fromkeys(("task", "metrics", "headline", "validity", "engine", "timing"), 1)).encode()
    (tmp_path / "results.json").write_bytes(TORN[damage](results))
    advice = "remove that file: the samples are kept, and the run's command writes it anew"
    for read in (lambda: read_results(tmp_path), lambda: _results_of(tmp_path)):
        with pytest.raises(StoreError) as error:
            read()
        assert advice in str(error.value)
        _is_readable(str(error.value))
        assert error.value.exit_code == 2


def _results_of(folder: Path) -> object:
    with _open(folder) as store:
        return store.results("engine", "timing")


@pytest.mark.parametrize("damage", TORN)
def test_a_torn_spec_says_what_to_do(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, "1")
    spec = tmp_path / "spec.json"
    spec.write_bytes(TORN[damage](spec.read_bytes()))
    for read in (lambda: read_spec(tmp_path), lambda: _results_of(tmp_path)):
        with pytest.raises(StoreError, match=r"put back a whole copy of the file, or choose another --output") as error:
            read()
        _is_readable(str(error.value))


@pytest.mark.parametrize("line", [b"\0" * 4096, b"\xff\xfe" * 2000, b'{"id": "' + b"\\u0000" * 500, b"\x1b[31m" * 100])
def test_damaged_bytes_are_never_printed(tmp_path: Path, line: bytes) -> None:
    file = filled(tmp_path, "1", "2")
    file.write_bytes(line + b"\n" + file.read_bytes())
    with pytest.raises(StoreError, match=r"line 1 is not a sample") as error, _open(tmp_path):
        pass
    _is_readable(str(error.value))


def _is_readable(text: str) -> None:
    assert text.isprintable()
    assert r"\x00\x00" not in text
    assert len(text) < 600
