"""Question and answer files: the real ones, and what must be refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource, find_data
from almost_eval.errors import DataError, InputError
from almost_eval.judge.questions import (
    answer_line,
    find_questions,
    over_long,
    read_answers,
    read_questions,
    truncate_answers,
)
from almost_eval.judge.records import Answer, Question

ASKED = [Question("1", "Who?"), Question("2", "Why?"), Question("x", "How?")]


def jsonl(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def line(id: Any, text: Any = "So.", **more: Any) -> dict[str, Any]:
    return {"question_id": id, "text": text, "model_id": "m", **more}


def test_vicuna_questions(data_root: Path) -> None:
    questions, digest = find_questions(None, DataSource("hub", data_root))
    assert len(questions) == 80
    assert (questions[0].id, questions[0].category, questions[0].reference) == ("1", "generic", None)
    few, other = find_questions(None, DataSource("hub", data_root), limit=3)
    assert few == questions[:3]
    assert digest != other
    assert digest == find_questions(None, DataSource("hub", data_root))[1]


def test_nano_questions_are_known_to_the_oracle() -> None:
    from almost_eval.nano.oracle import score_text

    questions, _ = find_questions(None, find_data("nano", None))
    assert len(questions) == 80
    assert all(score_text(question.text, "") is not None for question in questions)


def test_mt_bench_and_alpaca_eval(data_root: Path) -> None:
    shared = data_root.parent
    if not (shared / "mt_bench").is_dir():
        pytest.skip(f"no MT-Bench questions under {shared}")
    questions = read_questions(shared / "mt_bench" / "question.jsonl")
    assert len(questions) == 80
    assert questions[0].text.startswith("Compose an engaging travel blog")
    assert sum(question.reference is not None for question in questions) > 0
    questions = read_questions(shared / "alpaca_eval" / "vicuna-7b.json")
    assert (len(questions), questions[0].id, questions[-1].id) == (805, "1", "805")
    assert questions[0].category == "helpful_base"
    name, answers = read_answers(shared / "alpaca_eval" / "text_davinci_003.json", questions)
    assert name == "text_davinci_003"
    assert list(answers) == [question.id for question in questions]
    assert sum(not answer.text for answer in answers.values()) == 2  # empty ones are answers
    with pytest.raises(DataError, match="no answer to 2 of 805 questions"):
        read_answers(shared / "alpaca_eval" / "text_davinci_001.json", questions)


def test_archived_answers(data_root: Path) -> None:
    questions, _ = find_questions(None, DataSource("hub", data_root))
    files = sorted((data_root.parent / "vicuna" / "answer").glob("*.jsonl"))
    if not files:
        pytest.skip(f"no archived answers beside {data_root}")
    names = {}
    for file in files:
        name, answers = read_answers(file, questions)
        assert len(answers) == 80
        names[name] = sum(not answer.text for answer in answers.values())
    assert len(names) == 6
    assert names["llama-13b:v1"] == 1
    with pytest.raises(DataError, match="answers questions that are not asked: 4, 5, 6, 7, 8"):
        read_answers(files[0], questions[:3])
    assert len(read_answers(files[0], questions[:3], subset=True)[1]) == 3


def test_written_lines_read_back(tmp_path: Path) -> None:
    answers = {q.id: Answer(q.id, f"A \u2028 {q.id}", "m", {"seed": 1}) for q in ASKED}
    lines = [answer_line(answers[question.id], question) for question in ASKED]
    assert [row["question_id"] for row in lines] == [1, 2, "x"]
    assert lines == [answer_line(answers[question.id], question) for question in ASKED]
    assert len({row["answer_id"] for row in lines}) == 3
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    assert read_answers(file, ASKED) == ("m", answers)


def test_first_turn_of_mt_bench_answers(tmp_path: Path) -> None:
    row = {"question_id": 1, "model_id": "m", "choices": [{"turns": ["One.", "Two."]}]}
    assert read_answers(jsonl(tmp_path / "a", row), ASKED[:1])[1]["1"].text == "One."


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([line(1), line(1)], "line 2: question 1 was answered before"),
        ([line(1), line(3)], "not asked: 3"),
        ([line(1)], "no answer to 2 of 3 questions: 2, x"),
        ([line(1), line(2), line("x", model_id="n")], r"several systems \(m, n\)"),
        ([line(1), line(None)], "line 2: question_id is None"),
        ([line(True)], "question_id is True"),
        ([line(1), {"question_id": 2}], "line 2: an answer needs a text"),
        ([line(1, text=["no"])], "line 1: an answer needs a text"),
        ([line(1), [2]], "line 2: not a JSON object"),
        ([line(1, text="\ud83d")], "half a character"),
        ([line(1, metadata={"score": math.nan})], "line 1: NaN or infinity"),
    ],
)
def test_malformed_answers(rows: list[Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem) as error:
        read_answers(jsonl(tmp_path / "a.jsonl", *rows), ASKED)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"question_id": 1, "text": "caf\xe9"}\n', "is not UTF-8"),
        (b'{"question_id": 1, "text": "A?"}\n{"question_id"', "line 2: "),
        (
            b'{"question_id": 1, "text": "A?"}\n{"question_id": 1, "text": "B?"}\n',
            "line 2: question id 1 was given before",
        ),
        (b'{"question_id": 1, "text": " "}\n', "line 1: no question in"),
        (b'[{"instruction": "A?"}, 3]', "row 2: not a JSON object"),
        (b'[{"instruction": "A?"}', "is no JSON array"),
        (b"\n", "holds no question"),
        (b'{"question_id": 1' + b"0" * 5000 + b', "text": "A?"}', "line 1"),
    ],
)
def test_malformed_questions(content: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=problem) as error:
        read_questions(file)
    assert "\n" not in str(error.value)


def test_absent_file_and_limit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="at least one question"):
        find_questions(tmp_path / "none.jsonl", DataSource("hub", None), limit=0)


def test_long_answers() -> None:
    answers = {"1": Answer("1", "abc", "m"), "2": Answer("2", "abcdef", "m", {"seed": 1})}
    assert over_long(answers, 3) == ["2"]
    cut, count = truncate_answers(answers, 3)
    assert count == 1
    assert cut["1"] is answers["1"]
    assert cut["2"] == Answer("2", "abc", "m", {"seed": 1, "cut_from_characters": 6})
