"""Question and answer files: FastChat's JSONL, MT-Bench's first turns, AlpacaEval's JSON arrays.

Questions: a line `{"question_id": 1, "text": ..., "category": ...}` (Vicuna, the nano world), `{"question_id": 81,
"turns": [...], "reference": [...]}` (MT-Bench, of which the first turn is taken), or an array of `{"instruction": ...}`
(AlpacaEval, which has no ids: the row counts, from 1). Answers: a line `{"question_id": 1, "text": ..., "model_id":
...}` (FastChat), the same with `choices` (MT-Bench), or an array with `instruction`, `output` and `generator`
(AlpacaEval), where the instruction says which question is answered.

The nano world's questions hold no key to its oracle: the text itself is the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from almost_eval.data.sources import DataSource, fingerprint
from almost_eval.errors import DataError, InputError
from almost_eval.files import Row, json_line, parse_lines
from almost_eval.judge.fastchat import fastchat_text
from almost_eval.judge.records import Answer, Question

VICUNA = "fastchat/eval/table/question.jsonl"
_SHOWN = 5
"""Ids that an error names."""


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        DataError: it cannot be read, is malformed (with the line), holds no question, or one id twice.
    """
    return _questions(_read_text(Path(path)), str(path))


def find_questions(
    file: str | Path | None, data: DataSource, *, limit: int | None = None
) -> tuple[list[Question], str]:
    """The questions, and the digest of their content.

    Args:
        file: a question file, or None for the Vicuna questions of the data source: the pinned file of FastChat, or
            the nano world's own eighty.
        data: where they come from.
        limit: the first so many only.

    Raises:
        DataError: they cannot be had, or the file is malformed.
        InputError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; ask at least one question")
    if file is not None:
        questions = read_questions(file)
    elif data.name == "nano":
        from almost_eval.nano.data import QUESTIONS

        assert data.root is not None
        questions = read_questions(data.root / QUESTIONS)
    else:
        questions = _questions(fastchat_text(VICUNA, data, instead="give --questions FILE"), VICUNA)
    questions = questions[:limit]
    return questions, fingerprint([dataclasses.asdict(question) for question in questions])


def _questions(text: str, path: str) -> list[Question]:
    questions: dict[str, Question] = {}
    for place, row in _rows(text, path):
        question = _question(row, place, f"{path}, {place}")
        if question.id in questions:
            raise DataError(f"{path}, {place}: question id {question.id} was given before; ids must be unique")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path} holds no question; give a file of FastChat's, MT-Bench's or AlpacaEval's shape")
    return list(questions.values())


def _question(row: Row, place: _Place, where: str) -> Question:
    if "instruction" in row:
        id, text, category = str(place.number), row["instruction"], row.get("dataset", "general")
    else:
        turns = row.get("turns")
        first = turns[0] if isinstance(turns, list) and turns else None
        id, text, category = _id(row, where), row.get("text", first), row.get("category", "general")
    reference = row.get("reference")
    if isinstance(reference, list):
        reference = reference[0] if reference else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"malformed data: {where}: no question in `text`, `turns` or `instruction`; mend the row")
    if not isinstance(category, str) or not isinstance(reference, str | None):
        raise DataError(f"malformed data: {where}: `category` and `reference` must be text; mend the row")
    _refuse_half_characters(where, text, category, reference or "")
    return Question(id, text, category, reference)


def read_answers(
    path: str | Path, questions: Sequence[Question], *, subset: bool = False, choice: int = 1
) -> tuple[str, dict[str, Answer]]:
    """The answers of one system, in the order of the questions.

    Args:
        path: FastChat's answer JSONL, or AlpacaEval's outputs.
        questions: each must be answered, once. An empty answer is an answer.
        subset: the questions are the first few of a file: answers to others are passed over.
        choice: which of several `choices` is taken, from 1; `metadata["choices"]` says how many there were.

    Returns:
        The system's name (`model_id` or `generator`; the file's name where there is none) and its answers by id.

    Raises:
        DataError: not UTF-8, a malformed line (with its number), duplicate, unknown or missing ids, several systems.
    """
    path = Path(path)
    known = {question.id for question in questions}
    # An instruction may stand twice: its first answer belongs to its first place. A blank at an end matters to nobody.
    by_text: dict[str, list[str]] = {}
    for question in questions:
        by_text.setdefault(question.text.strip(), []).append(question.id)
    answers: dict[str, Answer] = {}
    unknown: list[str] = []
    for place, row in _rows(_read_text(path), str(path)):
        answer = _answer(row, f"{path}, {place}", by_text, path.stem, choice)
        if answer.question_id not in known:
            unknown.append(answer.question_id)
        elif answer.question_id in answers:
            raise DataError(f"{path}, {place}: question {answer.question_id} was answered before; keep one answer")
        else:
            answers[answer.question_id] = answer
    if unknown and not subset:
        raise DataError(
            f"{path} answers questions that are not asked: {_some(unknown)}; give the --questions file it belongs to"
        )
    if missing := [question.id for question in questions if question.id not in answers]:
        raise DataError(f"{path} has no answer to {len(missing)} of {len(questions)} questions: {_some(missing)}")
    names = list(dict.fromkeys(answer.model for answer in answers.values()))
    if len(names) != 1:
        raise DataError(f"{path} holds answers of several systems ({_some(names)}); give one file for each")
    return names[0], {question.id: answers[question.id] for question in questions}


def _answer(row: Row, where: str, by_text: Mapping[str, list[str]], name: str, choice: int) -> Answer:
    metadata = row.get("metadata") or {}
    if "instruction" in row:
        text, model = row.get("output"), row.get("generator") or name
        ids = by_text.get(str(row["instruction"]).strip(), [])
        id = (ids.pop(0) if len(ids) > 1 else ids[0]) if ids else str(row["instruction"])[:40]
    else:
        text, model, id = row.get("text"), row.get("model_id", name), _id(row, where)
        choices = row.get("choices")
        if text is None and isinstance(choices, list) and choices:
            if choice > len(choices):
                raise DataError(
                    f"{where}: it has {len(choices)} answers, and no number {choice}; give another --choice"
                )
            try:
                text = choices[choice - 1]["turns"][0]
            except (LookupError, TypeError):
                text = None
            if len(choices) > 1 and isinstance(metadata, dict):
                metadata = {**metadata, "choices": len(choices)}
    if not isinstance(text, str) or not isinstance(model, str) or not isinstance(metadata, dict):
        raise DataError(f"malformed data: {where}: an answer needs a text `text` (or `output`); mend the row")
    _refuse_half_characters(where, text, model)
    try:
        json_line(metadata)
    except ValueError:
        raise DataError(
            f"malformed data: {where}: NaN or infinity in `metadata`, which JSON has not; mend the row"
        ) from None
    return Answer(id, text, model, metadata)


def answer_line(answer: Answer, question: Question) -> Row:
    """An answer as a line of FastChat's answer JSONL.

    `answer_id` follows from system, question and text: the same answer always has the same id.
    """
    named = json.dumps([answer.model, question.id, answer.text], ensure_ascii=False)
    return {
        "question_id": int(question.id) if question.id.isascii() and _is_int(question.id) else question.id,
        "text": answer.text,
        "answer_id": hashlib.sha256(named.encode()).hexdigest()[:22],
        "model_id": answer.model,
        "metadata": dict(answer.metadata),
    }


def over_long(answers: Mapping[str, Answer], limit: int) -> list[str]:
    """Ids of the questions whose answer has more than `limit` characters."""
    return [id for id, answer in answers.items() if len(answer.text) > limit]


def truncate_answers(answers: Mapping[str, Answer], limit: int) -> tuple[dict[str, Answer], int]:
    """The answers cut to `limit` characters, and how many were cut; their metadata say how long they were."""
    long = set(over_long(answers, limit))
    cut = {
        id: dataclasses.replace(
            answer, text=answer.text[:limit], metadata={**answer.metadata, "cut_from_characters": len(answer.text)}
        )
        if id in long
        else answer
        for id, answer in answers.items()
    }
    return cut, len(long)


# --- files


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a row stands in its file, from 1."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSONL or JSON file") from None


def _rows(text: str, path: str) -> Iterator[tuple[_Place, Row]]:
    """Rows of a JSON array or of JSON lines."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"malformed data: {path} is no JSON array ({error}); mend it") from None
        places = [(_Place("row", number), row) for number, row in enumerate(rows, 1)]
    else:
        places = [(_Place("line", number), row) for number, row in parse_lines(path, text, unit="line")]
    for place, row in places:
        if not isinstance(row, dict):
            raise DataError(f"malformed data: {path}, {place}: not a JSON object; mend it")
        yield place, row


def _id(row: Row, where: str) -> str:
    id = row.get("question_id")
    if isinstance(id, float) and id.is_integer():
        id = int(id)  # a table of numbers with a gap in it writes all of them as 81.0
    if isinstance(id, bool) or not isinstance(id, int | str) or id == "":
        raise DataError(f"malformed data: {where}: question_id is {id!r}, neither a number nor text; mend the row")
    return str(id)


def _refuse_half_characters(where: str, *texts: str) -> None:
    """JSON can write half of a surrogate pair, which no request and no file can hold."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise DataError(f"malformed data: {where}: half a character (a lone surrogate); mend the row") from None


def _is_int(id: str) -> bool:
    return id.isdigit() and len(id) < 19 and str(int(id)) == id


def _some(ids: Sequence[str]) -> str:
    more = f", ... ({len(ids)} in all)" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + more
