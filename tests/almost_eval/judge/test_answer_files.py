"""Answer files as people have them: other line ends and encodings, odd characters, ids of other types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from almost_eval.errors import DataError
from almost_eval.judge.questions import read_answers, read_questions
from almost_eval.judge.records import Question

QUESTIONS = [Question("1", "Why?"), Question("2", "How?")]


def _file(folder: Path, text: str = "Because.", *, encoding: str = "utf-8", end: str = "\n", **ids: object) -> Path:
    rows = [{"question_id": ids.get("first", 1), "text": text, "model_id": "m"}, {"question_id": 2, "text": "So."}]
    rows[1]["model_id"] = "m"
    file = folder / "answers.jsonl"
    file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode(encoding))
    return file


@pytest.mark.parametrize("end", ["\r\n", "\n\n", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_line_ends_and_a_byte_order_mark(tmp_path: Path, end: str, encoding: str) -> None:
    name, answers = read_answers(_file(tmp_path, "Café.", encoding=encoding, end=end), QUESTIONS)
    assert (name, [answer.text for answer in answers.values()]) == ("m", ["Café.", "So."])


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252"])
def test_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match=r"is not UTF-8 .*; convert it"):
        read_answers(_file(tmp_path, "Café.", encoding=encoding), QUESTIONS)


@pytest.mark.parametrize("text", ["one\u2028two\u0085three", "one\x0btwo\x1cthree", "one\0two", "🙂", ""])
def test_what_only_looks_like_a_line_end_is_text(tmp_path: Path, text: str) -> None:
    assert read_answers(_file(tmp_path, text), QUESTIONS)[1]["1"].text == text


@pytest.mark.parametrize("first", ["1", 1, 1.0])
def test_an_id_is_the_same_as_text_and_as_a_number(tmp_path: Path, first: object) -> None:
    assert read_answers(_file(tmp_path, first=first), QUESTIONS)[1].keys() == {"1", "2"}


def test_a_line_that_was_cut_is_named(tmp_path: Path) -> None:
    file = _file(tmp_path)
    file.write_bytes(file.read_bytes() + b"\n\n{")
    with pytest.raises(DataError, match="line 5: not JSON"):
        read_answers(file, QUESTIONS)


def _rows(folder: Path, *rows: object) -> Path:
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_turns_that_are_one_text_are_refused_and_not_read_letter_by_letter(tmp_path: Path) -> None:
    file = _rows(tmp_path, {"question_id": 1, "choices": [{"turns": "Because."}]})
    with pytest.raises(DataError, match="line 1: an answer needs a text"):
        read_answers(file, QUESTIONS[:1])


@pytest.mark.parametrize("name", [None, ""])
def test_a_system_without_a_name_is_called_as_its_file(tmp_path: Path, name: str | None) -> None:
    file = _rows(tmp_path, {"question_id": 1, "text": "Because.", "model_id": name})
    assert read_answers(file, QUESTIONS[:1])[0] == "answers"


def test_what_is_wrong_beside_the_text_is_said(tmp_path: Path) -> None:
    file = _rows(tmp_path, {"question_id": 1, "text": "Because.", "model_id": 5})
    with pytest.raises(DataError, match="`model_id` must be text"):
        read_answers(file, QUESTIONS[:1])


def test_ids_that_only_look_the_same_are_shown(tmp_path: Path) -> None:
    file = _rows(tmp_path, {"question_id": "01", "text": "Because."}, {"question_id": " 2", "text": "So."})
    with pytest.raises(DataError, match=r"no answer to 2 of 2 questions: 1, 2; it answers '01', ' 2'"):
        read_answers(file, QUESTIONS, subset=True)


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\u202eturned"])
def test_a_name_that_a_terminal_would_obey_is_refused(tmp_path: Path, name: str) -> None:
    file = _rows(tmp_path, {"question_id": 1, "text": "Because \x1b[31m.", "model_id": name})
    with pytest.raises(DataError, match="line 1: control characters in the name"):
        read_answers(file, QUESTIONS[:1])
    file = _rows(tmp_path, {"question_id": 1, "text": "Why \x1b[31m?", "category": name})
    with pytest.raises(DataError, match="line 1: control characters in the name"):
        read_questions(file)
