"""Comparisons, demonstrations and prompts in the formats that people have."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from almost_eval.errors import DataError
from almost_eval.types import Message
from almost_train.common.formats import read_dialogues, read_preferences, read_prompt_rows
from almost_train.common.records import Preference
from almost_train.common.tables import Table, read_any

ASK, GOOD, BAD = "How big is the otter?", "It is of medium size.", "no idea"
USER, ANSWER, WRONG = Message("user", ASK), Message("assistant", GOOD), Message("assistant", BAD)
user, answer, wrong = (message.to_dict() for message in (USER, ANSWER, WRONG))


def table(*rows: dict[str, Any]) -> Table:
    return Table("file.jsonl", list(rows), Path("file.jsonl"))


PREFERENCES: dict[str, dict[str, Any]] = {
    "conversational preferences": {"prompt": [user], "chosen": [answer], "rejected": [wrong]},
    "preferences with the prompt in both dialogues": {"chosen": [user, answer], "rejected": [user, wrong]},
    "UltraFeedback's preferences": {
        "prompt": ASK,
        "chosen": [user, answer],
        "rejected": [user, wrong],
        "score_chosen": 8.0,
        "messages": [user, answer],
    },
    "standard preferences": {"prompt": ASK, "chosen": f" {GOOD}", "rejected": BAD, "meta": "a-vs-b"},
    "hh-rlhf's preferences": {
        "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}",
    },
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_format_of_preferences_is_the_same_pair(name: str) -> None:
    records = read_preferences(table(PREFERENCES[name]))
    (pair,) = records.records
    assert records.format == name
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (ANSWER,), (WRONG,))
    assert pair.prompt_id == Preference.from_row(PREFERENCES["conversational preferences"], "").prompt_id


def test_whole_dialogues_beside_their_prompt_lose_it() -> None:
    row = {"prompt": [user], "chosen": [user, answer], "rejected": [user, wrong]}
    assert read_preferences(table(row)).records[0].chosen == (ANSWER,)


def test_dialogues_that_part_early_keep_several_messages() -> None:
    thanks = {"role": "user", "content": "Thanks"}
    row = {"chosen": [user, answer, thanks, answer], "rejected": [user, wrong, thanks, answer]}
    pair = read_preferences(table(row)).records[0]
    assert pair.prompt == (USER,)
    assert [message.content for message in pair.rejected] == [BAD, "Thanks", GOOD]


def test_a_prompt_of_several_turns_in_a_text() -> None:
    prompt = f"\n\nHuman: {ASK}\n\nAssistant: {BAD}\n\nHuman: Really?\n\nAssistant:"
    pair = read_preferences(table({"prompt": prompt, "chosen": GOOD, "rejected": BAD})).records[0]
    assert pair.prompt == (USER, WRONG, Message("user", "Really?"))


DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [user, answer], "prompt": ASK},
    "ShareGPT's conversations": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]},
    "Alpaca's instructions": {"instruction": ASK, "input": "", "output": GOOD, "text": "Below is an instruction"},
    "prompts with completions": {"prompt": [user], "completion": [answer]},
    "texts with completions": {"prompt": ASK, "completion": f" {GOOD}"},
    "ALMoST's demonstrations": {"input": f"\n\nHuman: {ASK}\n\nAssistant:", "output": f" {GOOD}"},
    "dialogues as text": {"text": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}"},
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_every_format_of_demonstrations_is_the_same_dialogue(name: str) -> None:
    records = read_dialogues(table(DEMONSTRATIONS[name]))
    assert (records.format, records.records) == (name, [(USER, ANSWER)])


def test_alpacas_input_follows_the_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Otter", "output": "Loutre"}
    assert read_dialogues(table(row)).records[0][0].content == "Translate.\n\nOtter"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user, wrong, user], "completion": [answer]},
        {"prompt": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}\n\nHuman: {ASK}\n\nAssistant:", "completion": GOOD},
        {"input": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}\n\nHuman: {ASK}\n\nAssistant:", "output": GOOD},
    ],
)
def test_of_a_prompt_with_its_completion_the_completion_alone_is_learned(row: dict[str, Any]) -> None:
    records = read_dialogues(table(row))
    assert records.records == [(USER, WRONG, USER, ANSWER)]
    assert records.given == (3,)
    assert read_dialogues(table(row | {"system": "Be terse."})).given == (4,)
    assert read_dialogues(table({"messages": [user, wrong, user, answer]})).given == (0,)


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_a_system_column_is_a_message(name: str) -> None:
    ((first, *rest),) = read_dialogues(table(DEMONSTRATIONS[name] | {"system": "Be terse."})).records
    assert (first, rest) == (Message("system", "Be terse."), [USER, ANSWER])


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_system_column_is_a_message_of_a_pairs_prompt(name: str) -> None:
    (pair,) = read_preferences(table(PREFERENCES[name] | {"system": "Be terse."})).records
    assert pair.prompt == (Message("system", "Be terse."), USER)


def test_two_system_messages_are_refused() -> None:
    row = {"messages": [{"role": "system", "content": "Be long."}, user, answer], "system": "Be terse."}
    with pytest.raises(DataError, match="row 1: the column 'system' and the first message are two system messages"):
        read_dialogues(table(row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user, answer], "tools": [{"name": "f"}]}, "row 1: has 'tools', which is not read"),
        ({"instruction": ASK, "output": GOOD, "history": [["Hi", "Hello"]]}, "row 1: has 'history', which is not read"),
        ({"instruction": ASK, "output": GOOD, "input": 5}, "row 1: 'input' must be a text, and is 5"),
        ({"messages": [user, {**answer, "reasoning_content": "Hm."}]}, "row 1: a message has 'reasoning_content'"),
        ({"messages": [user, {**answer, "weight": 0}]}, "row 1: a message has the weight 0"),
        ({"prompt": "Why \ud83d", "completion": GOOD}, "row 1: half of a surrogate pair"),
        ({"messages": [{**user, "role": "User"}, answer]}, "row 1: a message has the role 'User'; did you mean 'user'"),
        ({"messages": [user, {**answer, "role": "bot"}]}, "row 1: a message has the role 'bot'; known: assistant, "),
        ({"messages": [user, answer], "system": 3}, "row 1: 'system' must be a text, and is 3"),
        ({"messages": [user, answer], "system": ["Be brief."]}, "row 1: 'system' must be a text, and is "),
    ],
)
def test_what_a_text_would_lack_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dialogues(table(row))


PROMPTS: list[dict[str, Any]] = [
    {"prompt": f" {ASK} "},
    {"prompt": [user]},
    {"messages": [user]},
    {"instruction": ASK, "input": "", "output": GOOD},
    {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:"},
]


@pytest.mark.parametrize("row", PROMPTS)
def test_every_format_of_prompts_is_the_same_turn(row: dict[str, Any]) -> None:
    assert read_prompt_rows(table(row)).records == [("1", (USER,))]
    assert read_prompt_rows(table(row | {"id": "p7"})).records == [("p7", (USER,))]


def test_a_prompt_may_have_a_system_message_and_earlier_turns() -> None:
    system = {"role": "system", "content": "Be terse."}
    ((_, messages),) = read_prompt_rows(table({"prompt": [system, user, answer, user]})).records
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no prompts"),
        ([{"prompt": "  "}], "prompt 1: an empty prompt"),
        ([{"prompt": [answer]}], "prompt 1: it must end in a user message"),
        ([{"id": "a", "prompt": ASK}, {"id": "a", "prompt": BAD}], "prompt 2: the id 'a' is there twice"),
        ([{"id": ["a"], "prompt": ASK}], "prompt 1: the id must be a text or a whole number, and is "),
        ([{"id": " ", "prompt": ASK}], "prompt 1: the id must be a text or a whole number, and is ' '"),
        ([{"id": True, "prompt": ASK}], "prompt 1: the id must be a text or a whole number, and is True"),
        (
            [{"prompt": ASK}, {"prompt": [user]}],
            "row 2: not prompts .prompt: text., as the first row is; it has 'prompt': messages",
        ),
        ([{"question": ASK}], "no format of prompts has its columns .'question': text.; known: prompts"),
        ([{"id": 1, "prompt": 5}], "has its columns .'id': a number, 'prompt': a number."),
        ([{"data": [{"prompt": ASK}]}], "if 'data' holds the rows, write these alone"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompt_rows(table(*rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ASK, "chosen": GOOD}, "no format of comparisons has its columns"),
        ({"chosen": GOOD, "rejected": BAD}, "no format of comparisons has its columns"),  # where is the prompt?
        ({"chosen": [answer], "rejected": [wrong]}, "needs a prompt"),
        ({"prompt": [{**user, "content": " "}], "chosen": [answer], "rejected": [wrong]}, "row 1: the prompt is empty"),
        (
            {"prompt": [{"role": "system", "content": "Hi."}], "chosen": [answer], "rejected": [wrong]},
            "prompt is empty",
        ),
        (
            {"prompt": [user], "chosen": [user, answer], "rejected": [wrong]},
            "row 1: 'chosen' begins with the prompt, and 'rejected' does not",
        ),
        ({"prompt": [user], "chosen": [user], "rejected": [wrong]}, "end in an assistant's message"),
        (PREFERENCES["standard preferences"] | {"margin": "much"}, "'margin' must be a number, and is 'much'"),
        (PREFERENCES["standard preferences"] | {"margin": 10**400}, "'margin' must be a number, and is 1000"),
        (PREFERENCES["standard preferences"] | {"margin": float("nan")}, "'margin' must be a number, and is nan"),
        (PREFERENCES["standard preferences"] | {"margin": "Infinity"}, "'margin' must be a number, and is 'Infinity'"),
        (PREFERENCES["standard preferences"] | {"margin": True}, "'margin' must be a number, and is True"),
        (PREFERENCES["standard preferences"] | {"margin": [1.0]}, r"'margin' must be a number, and is \[1.0\]"),
        (PREFERENCES["standard preferences"] | {"margin": 1e300}, "'margin' is 1e.300, which float32 does not hold"),
        (PREFERENCES["standard preferences"] | {"margin": -0.5}, "'margin' is -0.5, and must not be below 0"),
        (PREFERENCES["standard preferences"] | {"margin": "-2"}, "'margin' is -2, and must not be below 0"),
    ],
)
def test_pairs_that_cannot_be_used_are_one_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_preferences(table(row))


def test_columns_of_two_formats_are_refused() -> None:
    row = DEMONSTRATIONS["ShareGPT's conversations"] | {"messages": [user, answer]}
    with pytest.raises(DataError, match=r"two formats of demonstrations fit its columns, messages .* and ShareGPT"):
        read_dialogues(table(row))


def test_calls_of_tools_are_named_as_such() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    with pytest.raises(DataError, match="row 1: a message calls tools"):
        read_dialogues(table({"messages": [user, call, answer]}))


def test_a_margin_travels() -> None:
    pair = read_preferences(table(PREFERENCES["standard preferences"] | {"margin": "1.5"})).records[0]
    assert pair.margin == 1.5
    assert Preference.from_row(pair.to_row(), "") == pair


# --- files ---

ROWS = [
    {"prompt": 'A "word", or\ntwo?', "chosen": "é\u2028x", "rejected": BAD},
    {"prompt": ASK, "chosen": GOOD, "rejected": "-"},
]


def write(folder: Path, suffix: str, bom: str = "") -> Path:
    file = folder / f"pairs{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "meta": None} for row in ROWS]), file)
    elif suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as stream:
            stream.write(bom)
            lines = csv.DictWriter(stream, ROWS[0])
            lines.writeheader()
            lines.writerows(ROWS)
    else:
        text = json.dumps(ROWS) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in ROWS)
        file.write_text(bom + text, encoding="utf-8")
    return file


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_has_the_same_rows(suffix: str, bom: str, tmp_path: Path) -> None:
    file = write(tmp_path, suffix, bom)
    assert read_any(file) == Table(str(file), ROWS, file)


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl").rename(tmp_path / "pairs.json")
    assert read_any(file).rows == ROWS


def test_a_data_set_is_found_under_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "me" / "pairs" / "data"
    folder.mkdir(parents=True)
    write(folder, ".parquet").rename(folder / "train-00000-of-00001.parquet")
    monkeypatch.setenv("ALMOST_DATA_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    found = read_any("me/pairs")
    assert found.rows == ROWS
    assert isinstance(found.input, str)
    assert found.input.startswith("me/pairs:@train ")  # and the digest of the rows: other rows are another input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"hello", r"a.txt is no table; give .jsonl, .json, .csv, .parquet"),
        ("a.json", b"[1]", "row 1: not a JSON object"),
        ("a.json", b'[{"a": 1},', "is not JSON"),
        ("a.csv", b"a,b\n1,2,3\n", "row 1 has 3 cells and the header 2; quote cells"),
        ("a.csv", b'a,b\n"1,2\n', "not CSV"),
        ("a.csv", b"\xff\xfe", "is not UTF-8 .*; it is UTF-16: save it as UTF-8"),
        ("a.csv", b"prompt;chosen;rejected\n", "cells are separated by ';'; separate them by commas"),
        ("a.csv", b"prompt\tchosen\n", "cells are separated by .*t'; separate them"),
        ("a.csv", b'{"prompt": "a", "chosen": "b"}\n', "holds JSON and not CSV; name it .jsonl"),
        ("a.jsonl", b"\x1f\x8b\x08\n", "is not UTF-8 .*; it is packed .gzip.: unpack it"),
        ("a.jsonl", b'{"a": "\xe9"}\n', "is not UTF-8 .*; save the file as UTF-8"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("absent.csv", None, "is not there"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_any(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
@pytest.mark.parametrize("content", [b'\xef\xbb\xbf\n[{"a": 1},\n{"a": 2}]', b'{"a": 1}\n{"a": 2}\n'])
def test_json_and_json_lines_are_told_apart_by_their_content(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_any(tmp_path / name).rows == [{"a": 1}, {"a": 2}]


def test_a_data_set_that_is_nowhere_is_one_line() -> None:
    with pytest.raises(DataError, match=r"nobody/nothing@test is no file, and as a data set: .* see ALMOST_DATA_ROOT"):
        read_any("nobody/nothing@test")


MESSAGES_IN_TEXTS = {key: json.dumps(value) for key, value in PREFERENCES["conversational preferences"].items()}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_messages_as_json_in_a_text_are_messages(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"pairs{suffix}"
    if suffix == ".csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([MESSAGES_IN_TEXTS, MESSAGES_IN_TEXTS.values()])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([MESSAGES_IN_TEXTS]), file)
    records = read_preferences(read_any(file))
    assert records.format == "conversational preferences"
    assert records.records[0].chosen == (ANSWER,)


def test_messages_as_python_prints_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'messages\n"{[user, answer]!r}"\n')
    with pytest.raises(DataError, match="looks like messages and is not JSON"):
        read_any(tmp_path / "a.csv")


def test_csv_with_long_cells_and_a_column_twice(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").write_text(f"prompt,chosen,rejected\nWhy?,{'x' * 200_000},No.\n")
    assert len(read_preferences(read_any(tmp_path / "a.CSV")).records[0].chosen[0].content) == 200_000
    (tmp_path / "a.CSV").write_text("prompt,chosen,rejected,chosen\na,b,c,d\n")
    with pytest.raises(DataError, match="the header has 'chosen' twice"):
        read_any(tmp_path / "a.CSV")
