"""Errors quote data, and are read in a terminal."""

from __future__ import annotations

import json

import pytest

from almost_eval.errors import AlmostError, DataError, printable, problem_of


def test_control_bytes_are_escaped_and_runs_are_counted() -> None:
    assert printable("a\0b") == r"a\x00b"
    assert printable("a" + "\0" * 4096 + "b") == r"a\x00 (4096 times)b"
    assert printable("\x1b[31mred\x9b") == r"\x1b[31mred\x9b"
    assert printable("left\u202eright \ud800") == r"left\u202eright \ud800"
    assert printable("Grüße, 你好\n\tline") == "Grüße, 你好\n\tline"
    assert str(DataError("name '\0\0\0\0\0\0'")) == r"name '\x00 (6 times)'"
    assert str(AlmostError(r"the repr of b'\x00\x00\x00\x00\x00'")) == r"the repr of b'\x00 (5 times)'"


def test_what_an_exception_says_is_short() -> None:
    with pytest.raises(UnicodeDecodeError) as undecodable:
        (b"\xff" * 10_000).decode()
    assert problem_of(undecodable.value) == "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    with pytest.raises(ValueError, match="Expecting") as unparsable:
        json.loads("\0" * 10_000)
    assert problem_of(unparsable.value) == "Expecting value: line 1 column 1 (char 0)"
    assert problem_of(KeyError("score")) == "KeyError('score')"
    assert problem_of(ValueError("x" * 1000)).endswith("xxx...")
