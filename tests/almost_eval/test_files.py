"""JSON Lines that survive a kill, and the digests that tell whether they changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from almost_eval.errors import DataError, StoreError
from almost_eval.files import (
    digest_path,
    iterate_rows,
    locked_folder,
    read_records,
    read_rows,
    repair_end,
    row_at,
    write_rows,
)


def test_rows_come_back(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"id": "b", "text": "line\u2028separator"}, {"id": "a", "text": "ünï"}]
    write_rows(file, rows)
    assert read_rows(file, {"id": str, "text": str}) == rows
    write_rows(file, rows, key=lambda row: row["id"])
    assert [row["id"] for row in read_rows(file)] == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a"}\n{"id": 1}\n', "row 2: 'id' must be str, and is int"),
        (b'{"id": "a"}\n\n{}\n', "row 3: 'id' must be str, and is nothing"),
        (b'{"id": "a"}\n{"id"', "row 2: not JSON"),
        (b"[1]\n", "row 1: not a JSON object"),
        (
            b'\n[\n{"id": "a"}]\n',
            "row 2: not a JSON object on one line, but the beginning of a JSON array; write one object a line",
        ),
        (b'{\n"id": "a"\n}\n', "row 1: not a JSON object on one line, but the beginning of a JSON object that goes on"),
        (b"\xff\n", "row 1 is not UTF-8"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(file, {"id": str})
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there; run the stage that writes it first"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "link.jsonl").symlink_to("none.jsonl")
    with pytest.raises(DataError, match=r"is a link to none\.jsonl, which is not there"):
        read_rows(tmp_path / "link.jsonl")


def test_digests_follow_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        (folder / "deep").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "deep" / "weights").write_bytes(b"\0\1")
    assert digest_path(tmp_path / "a") == digest_path(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("a card")
    (tmp_path / "b" / ".lock").write_text("")
    assert digest_path(tmp_path / "a") == digest_path(tmp_path / "b")
    (tmp_path / "b" / "deep" / "weights").write_bytes(b"\0\2")
    assert digest_path(tmp_path / "a") != digest_path(tmp_path / "b")
    assert digest_path(tmp_path / "a" / "config.json") == digest_path(tmp_path / "b" / "config.json")
    with pytest.raises(DataError, match="is not there"):
        digest_path(tmp_path / "c")


@pytest.mark.parametrize("whole", [b"", b'{"a": 1}\n', b'{"a": 1}\n' * 20_000])
@pytest.mark.parametrize("torn", [b"", b'{"a', b"x" * 65_536, b"x" * 200_000])
def test_a_torn_end_of_any_length_is_cut_off(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    (tmp_path / "log").write_bytes(whole + torn)
    repair_end(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == whole


def test_a_row_is_read_again_at_its_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\ufeff".encode() + '{"id": "ä"}\n\n{"id": "b"}\n{"id": "c"}'.encode())
    places = {row["id"]: place for place, row in iterate_rows(file)}
    with file.open("rb") as stream:
        assert [row_at(stream, places[id]) for id in "cbä"] == [{"id": "c"}, {"id": "b"}, {"id": "ä"}]
        with pytest.raises(DataError, match="was changed while it was read"):
            row_at(stream, places["b"] + 3)


def test_what_is_no_file_or_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be read \(Is a directory\)"):
        list(read_records(tmp_path, str, "a line"))
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with (
        pytest.raises(StoreError, match="link is a link to nowhere, which is not there; --output"),
        locked_folder(link, "run"),
    ):
        pass
