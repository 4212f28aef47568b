"""Question and answer files: FastChat's JSONL of one turn and of several, AlpacaEval's JSON arrays.

Questions: a line `{"question_id": 1, "text": ..., "category": ...}` (Vicuna, the nano world), `{"question_id": 81,
"turns": [...], "reference": [...]}` (MT-Bench; any number of turns), or an array of `{"instruction": ...}`
(AlpacaEval, which has no ids: the row counts, from 1). Answers: a line `{"question_id": 1, "text": ..., "model_id":
...}` (FastChat), the same with `choices`, each of which holds `turns` (MT-Bench), or an array with `instruction`,
`output` and `generator` (AlpacaEval), where the instruction says which question is answered. FastChat's reference
answers are such a file of answers.

The nano world's questions hold no key to its oracle: the text itself is the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from almost_eval.data.sources import DataSource, fingerprint
from almost_eval.errors import DataError, InputError, printable
from almost_eval.files import Row, json_line, parse_lines
from almost_eval.judge.fastchat import CORRECTED, PUBLISHED, corrected, fastchat_text
from almost_eval.judge.records import Answer, AnswerTurn, Question, QuestionTurn

VICUNA = "fastchat/eval/table/question.jsonl"
MT_BENCH = "mt-bench"
"""What `--questions` names besides a file: FastChat's 80 questions of two turns each."""
LATER = "later_turns"
"""Key in the metadata of an answer's line under which those of the later turns stand."""
_MT_BENCH_FOLDER = "fastchat/llm_judge/data/mt_bench"
_SHOWN = 5
"""Ids that an error names."""
OTHERS = "metadata_of_other_choices"
"""In the metadata of an answer's line: a list, one object for each choice after the first."""


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        DataError: it cannot be read, is malformed (with the line), holds no question, or one id twice.
    """
    return _questions(_read_text(Path(path)), str(path))


def is_mt_bench(file: str | Path | None) -> bool:
    """Whether `--questions` means MT-Bench and no file of that name."""
    return str(file) == MT_BENCH and not Path(MT_BENCH).is_file()


def names_of(file: str | Path | None, reference: str | None) -> dict[str, str]:
    """What a run records of its questions and reference answers, where they have names: `questions`, `reference`."""
    named = {"questions": "MT-Bench"} if is_mt_bench(file) else {}
    if is_mt_bench(file) or reference in (PUBLISHED, CORRECTED):
        named["reference"] = (reference or PUBLISHED) if reference in (None, PUBLISHED, CORRECTED) else "file"
    return named


def find_questions(
    file: str | Path | None,
    data: DataSource,
    *,
    limit: int | None = None,
    turns: int | None = None,
    reference: str | None = None,
) -> tuple[list[Question], str]:
    """The questions, and the digest of their content.

    Args:
        file: a question file, or `mt-bench`, or None for the Vicuna questions of the data source: the pinned file of
            FastChat, or the nano world's own eighty.
        data: where they come from.
        limit: the first so many only.
        turns: of each question, the first so many only.
        reference: a file of reference answers, in the form of answers, which take the place of those in the question
            file; or `published` or `corrected`: FastChat's own for MT-Bench, those that are known to be wrong replaced
            or not. None is `published` for MT-Bench, and what the question file holds for any other.

    Raises:
        DataError: they cannot be had, or the file is malformed.
        InputError: a limit below 1, or a reference that does not fit the questions.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; ask at least one question")
    if is_mt_bench(file):
        text = fastchat_text(f"{_MT_BENCH_FOLDER}/question.jsonl", data, instead="give --questions FILE")
        questions = _questions(text, MT_BENCH)
        reference = reference or PUBLISHED
    elif file is not None:
        questions = read_questions(file)
    elif data.name == "nano":
        from almost_eval.nano.data import QUESTIONS

        assert data.root is not None
        questions = read_questions(data.root / QUESTIONS)
    else:
        questions = _questions(fastchat_text(VICUNA, data, instead="give --questions FILE"), VICUNA)
    questions = _with_references(questions, reference, data)[:limit]
    if turns is not None:
        questions = [dataclasses.replace(question, later=question.later[: turns - 1]) for question in questions]
    return questions, fingerprint([_content(question) for question in questions])


def _content(question: Question) -> Row:
    """What a question's digest is over. One turn: as it was before questions had several."""
    content = dataclasses.asdict(question)
    if not content.pop("later"):
        return content
    return content | {"turns": list(question.turns), "references": list(question.references)}


def _with_references(questions: list[Question], reference: str | None, data: DataSource) -> list[Question]:
    """The questions with the reference answers that `--reference` names; a question that has none keeps none."""
    if reference is None:
        return questions
    if reference in (PUBLISHED, CORRECTED):
        where = f"{_MT_BENCH_FOLDER}/reference_answer/gpt-4.jsonl"
        text = fastchat_text(where, data, instead="give --reference FILE")
    else:
        where, text = reference, _read_text(Path(reference))
    known = {question.id: question for question in questions}
    answers: dict[str, Answer] = {}
    for place, row in _rows(text, where):
        answer = _answer(row, f"{where}, {place}", {}, Path(where).stem, 1)
        if answer.question_id in known:
            answers[answer.question_id] = _of_as_many_turns(answer, known[answer.question_id], f"{where}, {place}")
    if not answers:
        raise InputError(f"--reference {reference} answers none of these questions; give the file that belongs to them")
    mended = [
        question.with_references(answers[question.id].turns if question.id in answers else [None] * len(question.turns))
        for question in questions
    ]
    return [corrected(question) for question in mended] if reference == CORRECTED else mended


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


def _question(row: Row, place: str, where: str) -> Question:
    later: list[object] = []
    if "instruction" in row:
        id, text, category = place.split()[1], row["instruction"], row.get("dataset", "general")
    else:
        turns = row.get("turns")
        first, *later = turns if isinstance(turns, list) and turns else (None,)
        if "text" in row:
            later = []
        id, text, category = _id(row, where), row.get("text", first), row.get("category", "general")
    stored = row.get("reference")
    reference, *others = (stored if isinstance(stored, list) else [stored]) or [None]
    others = [*others, *[None] * len(later)] if later else []
    if not all(isinstance(turn, str) and turn.strip() for turn in (text, *later)):
        raise DataError(f"malformed data: {where}: no question in `text`, `turns` or `instruction`; mend the row")
    if not isinstance(category, str) or not all(isinstance(r, str | None) for r in (reference, *others)):
        raise DataError(f"malformed data: {where}: `category` and `reference` must be text; mend the row")
    if any(others[len(later) :]):
        raise DataError(f"malformed data: {where}: more references than turns; mend the row")
    rest = [QuestionTurn(str(turn), other) for turn, other in zip(later, others, strict=False)]
    _check_texts(where, text, reference or "", *(t.text + (t.reference or "") for t in rest), names=(category, id))
    return Question(id, text, category, reference, tuple(rest))


def read_answers(
    path: str | Path, questions: Sequence[Question], *, subset: bool = False, choice: int | None = 1
) -> tuple[str, dict[str, Answer]]:
    """The answers of one system, in the order of the questions.

    Args:
        path: FastChat's answer JSONL, or AlpacaEval's outputs.
        questions: each must be answered, once. An empty answer is an answer.
        subset: the questions are the first few of a file: answers to others are passed over.
        choice: which of several `choices` is taken, from 1; `metadata["choices"]` says how many there were. None takes
            all: the first has the rest as its `others`.

    Returns:
        The system's name (`model_id` or `generator`; the file's name where there is none) and its answers by id.

    Raises:
        DataError: not UTF-8, a malformed line (with its number), duplicate, unknown or missing ids, several systems.
    """
    path = Path(path)
    asked = {question.id: question for question in questions}
    # An instruction may stand twice: its first answer belongs to its first place. A blank at an end matters to nobody.
    by_text: dict[str, list[str]] = {}
    for question in questions:
        by_text.setdefault(question.text.strip(), []).append(question.id)
    answers: dict[str, Answer] = {}
    unknown: list[str] = []
    for place, row in _rows(_read_text(path), str(path)):
        answer = _whole_answer(row, f"{path}, {place}", by_text, path.stem, choice)
        if answer.question_id not in asked:
            unknown.append(answer.question_id)
        elif answer.question_id in answers:
            raise DataError(f"{path}, {place}: question {answer.question_id} was answered before; keep one answer")
        else:
            answers[answer.question_id] = _of_as_many_turns(answer, asked[answer.question_id], f"{path}, {place}")
    if unknown and not subset:
        raise DataError(
            f"{path} answers questions that are not asked: {_some(unknown)}; give the --questions file it belongs to"
        )
    if missing := [question.id for question in questions if question.id not in answers]:
        others = f"; it answers {_some(list(map(repr, unknown)))}" if unknown and not answers else ""
        raise DataError(
            f"{path} has no answer to {len(missing)} of {len(questions)} questions: {_some(missing)}{others}"
        )
    names = list(dict.fromkeys(answer.model for answer in answers.values()))
    if len(names) != 1:
        raise DataError(f"{path} holds answers of several systems ({_some(names)}); give one file for each")
    return names[0], {question.id: answers[question.id] for question in questions}


def _of_as_many_turns(answer: Answer, question: Question, where: str) -> Answer:
    """The answer to those turns that are asked.

    Raises:
        DataError: it answers fewer.
    """
    n, answered = len(question.turns), len(answer.turns)
    if answered < n:
        raise DataError(
            f"{where}: question {question.id} has {n} turns, and {answered} of them answered; give a file that answers "
            f"all, or --turns {answered}"
        )
    others = tuple(_of_as_many_turns(other, question, where) for other in answer.others)
    return dataclasses.replace(answer, later=answer.later[: n - 1], others=others)


def _whole_answer(row: Row, where: str, by_text: Mapping[str, list[str]], name: str, choice: int | None) -> Answer:
    """The answer of a row; with all its choices where `choice` is None."""
    if choice is not None:
        return _answer(row, where, by_text, name, choice)
    choices = row.get("choices")
    n = len(choices) if row.get("text") is None and "instruction" not in row and isinstance(choices, list) else 1
    first, *others = (_answer(row, where, by_text, name, number) for number in range(1, max(n, 1) + 1))
    return dataclasses.replace(first, others=tuple(others))


def _answer(row: Row, where: str, by_text: Mapping[str, list[str]], name: str, choice: int) -> Answer:
    metadata = row.get("metadata") or {}
    later: list[object] = []
    if "instruction" in row:
        text, model = row.get("output"), row.get("generator") or name
        ids = by_text.get(str(row["instruction"]).strip(), [])
        id = (ids.pop(0) if len(ids) > 1 else ids[0]) if ids else str(row["instruction"])[:40]
    else:
        text, model, id = row.get("text"), row.get("model_id") or name, _id(row, where)
        choices = row.get("choices")
        if text is None and isinstance(choices, list) and choices:
            if choice > len(choices):
                raise DataError(
                    f"{where}: it has {len(choices)} answers, and no number {choice}; give another --choice"
                )
            chosen = choices[choice - 1]
            turns = chosen.get("turns") if isinstance(chosen, dict) else None
            text, *later = turns if isinstance(turns, list) and turns else (None,)
            if len(choices) > 1 and isinstance(metadata, dict):
                metadata = {**_metadata_of(metadata, choice), "choices": len(choices)}
    if not isinstance(text, str):
        raise DataError(f"malformed data: {where}: an answer needs a text `text` (or `output`); mend the row")
    if not isinstance(model, str) or not isinstance(metadata, dict):
        raise DataError(f"malformed data: {where}: `model_id` must be text, `metadata` an object; mend the row")
    if not all(isinstance(turn, str) for turn in later):
        raise DataError(f"malformed data: {where}: an answer to a later turn is no text; mend the row")
    _check_texts(where, text, *later, names=(model,))
    try:
        json_line(metadata)
    except ValueError:
        raise DataError(
            f"malformed data: {where}: NaN or infinity in `metadata`, which JSON has not; mend the row"
        ) from None
    stored = metadata.get(LATER)
    of_later = stored if later and isinstance(stored, list) and len(stored) == len(later) else [{} for _ in later]
    if of_later is stored:
        metadata = {key: value for key, value in metadata.items() if key != LATER}
    rest = [AnswerTurn(str(turn), dict(about)) for turn, about in zip(later, of_later, strict=True)]
    return Answer(id, text, model, metadata, tuple(rest))


def _metadata_of(metadata: Row, choice: int) -> Row:
    """What is said of one of several choices; of all the same, where the line does not tell them apart."""
    own = {key: value for key, value in metadata.items() if key != OTHERS}
    others = metadata.get(OTHERS)
    apart = (
        choice > 1 and isinstance(others, list) and len(others) >= choice - 1 and isinstance(others[choice - 2], dict)
    )
    return dict(others[choice - 2]) if apart and others else own


def answer_line(answer: Answer, question: Question) -> Row:
    """An answer as a line of FastChat's answer JSONL: that of Vicuna's for one turn, that of MT-Bench's for several.

    `answer_id` follows from system, question and text: the same answer always has the same id.
    """
    named = json.dumps([answer.model, question.id, *answer.turns], ensure_ascii=False)
    line: Row = {
        "question_id": int(question.id) if question.id.isascii() and _is_int(question.id) else question.id,
        "text": answer.text,
        "answer_id": hashlib.sha256(named.encode()).hexdigest()[:22],
        "model_id": answer.model,
        "metadata": dict(answer.metadata),
    }
    if answer.later or answer.others:
        del line["text"]
        line["choices"] = [{"index": i, "turns": list(one.turns)} for i, one in enumerate(answer.choices)]
        if any(turn.metadata for turn in answer.later):
            line["metadata"] |= {LATER: [dict(turn.metadata) for turn in answer.later]}
        if answer.others:
            line["metadata"] |= {OTHERS: [answer_line(other, question)["metadata"] for other in answer.others]}
    return line


def over_long(answers: Mapping[str, Answer], limit: int) -> list[str]:
    """Ids of the questions whose answer to a turn has more than `limit` characters."""
    return [id for id, a in answers.items() if any(len(turn) > limit for one in a.choices for turn in one.turns)]


def truncate_answers(answers: Mapping[str, Answer], limit: int) -> tuple[dict[str, Answer], int]:
    """The answers cut to `limit` characters a turn, and how many were cut; their metadata say how long they were."""
    long = set(over_long(answers, limit))
    return {id: _cut(answer, limit) if id in long else answer for id, answer in answers.items()}, len(long)


def _cut(answer: Answer, limit: int) -> Answer:
    turns = [
        AnswerTurn(t.text[:limit], {**t.metadata, "cut_from_characters": len(t.text)}) if len(t.text) > limit else t
        for t in answer.answered
    ]
    return dataclasses.replace(answer.of_turns(turns), others=tuple(_cut(other, limit) for other in answer.others))


# --- files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSONL or JSON file") from None


def _rows(text: str, path: str) -> Iterator[tuple[str, Row]]:
    """Place ("row 3", "line 3") and content of each row of a JSON array or of JSON lines."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"malformed data: {path} is no JSON array ({error}); mend it") from None
        places = [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    else:
        places = [(f"line {number}", row) for number, row in parse_lines(path, text, unit="line")]
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


def _check_texts(where: str, *texts: object, names: tuple[str, ...]) -> None:
    """JSON can write half of a surrogate pair, which no file can hold, and in a name what a terminal obeys."""
    try:
        "".join(map(str, (*texts, *names))).encode()
    except UnicodeEncodeError:
        raise DataError(f"malformed data: {where}: half a character (a lone surrogate); mend the row") from None
    if strange := next((name for name in names if printable(name) != name or "\n" in name), None):
        raise DataError(f"malformed data: {where}: control characters in the name {strange!r}; mend the row")


def _is_int(id: str) -> bool:
    return id.isdigit() and len(id) < 19 and str(int(id)) == id


def _some(ids: Sequence[str]) -> str:
    more = f", ... ({len(ids)} in all)" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + more
