"""Rows that say two things, or more than a model is shown: refused, where one of them was taken in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from almost_eval.errors import DataError
from almost_train.common.formats import read_dialogues, read_preferences
from almost_train.common.tables import Table, read_any

ROW = '{"prompt": "a\u2028?", "chosen": "yes", "rejected": "no"}'
TWICE = '{"prompt": "b?", "chosen": "yes", "chosen": "no", "rejected": "maybe"}'
NESTED = '{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "yes", "content": "no"}]}'


@pytest.mark.parametrize(
    ("content", "row", "key"),
    [
        (f"{ROW}\n\n{TWICE}\n", 2, "chosen"),
        (f"\ufeff{TWICE}\r\n{ROW}\r\n", 1, "chosen"),
        (NESTED, 1, "content"),
        (f"[{ROW},\n {ROW},\n {TWICE}]", 3, "chosen"),
        (f"[{NESTED}]", 1, "content"),
    ],
)
def test_a_key_that_an_object_has_twice_is_refused(content: str, row: int, key: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"data.jsonl, row {row}: '{key}' is there twice in one object; keep one"):
        read_any(file)


def test_one_key_in_several_objects_is_none(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "{b} [c]"}], "n": [{}, {}]}
    for content in (f"{json.dumps(row)}\n" * 2, json.dumps([row, row], indent=1)):
        file.write_text(content, encoding="utf-8")
        assert read_any(file).rows == [row, row]


@pytest.mark.parametrize("column", ["images", "image", "videos", "audio"])
def test_what_is_shown_beside_the_text_is_refused(column: str) -> None:
    row = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    table = Table("f", [row | {column: []}, row | {column: ["x.png"]}], Path("f"))
    with pytest.raises(DataError, match=f"f, row 2: has '{column}', which is not read"):
        read_dialogues(table)


def pair(prompt: str, *asked: str) -> Table:
    turns = [{"role": "user", "content": text} for text in asked]
    sides = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    return Table("f", [{"prompt": prompt, **sides}], Path("f"))


def test_a_prompt_that_the_dialogues_do_not_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1: 'prompt' is 'How big is it.', and .* answer 'Who are you.'"):
        read_preferences(pair("How big is it?", "Who are you?"))


@pytest.mark.parametrize(
    "prompt", ["Who are  you?\n", "And now?", "Human: Who are you? Human: And now?", "Who are you"]
)
def test_one_of_the_turns_or_all_of_them_may_be_the_prompt(prompt: str) -> None:
    (record,) = read_preferences(pair(prompt, "Who are you?", "And now?")).records
    assert [message.content for message in record.prompt] == ["Who are you?", "And now?"]
