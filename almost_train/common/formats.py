"""Preferences, demonstrations and prompts in the formats that people have, recognised by their columns.

A format is a row of a table below: which columns it needs and how a row is read. The first row of a file decides; two
formats that fit are refused, as is a later row of another format. Texts that hold several turns are in the form
`\\n\\nHuman: ...\\n\\nAssistant: ...` (hh-rlhf, ALMoST). Answers of text formats are stripped of the whitespace around
them, which separates them from their prompt there and says nothing in a chat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, cast

from almost_eval.errors import DataError
from almost_eval.files import Row
from almost_eval.models.chat import parse_dialogue
from almost_eval.types import Conversation, Message
from almost_train.common.records import EmptyAnswer, Preference, messages_of, refuse_half, with_system
from almost_train.common.tables import Table

T = TypeVar("T")

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MARKER = "Human:"
_NO_ANSWER = re.compile(r"\n\nAssistant:\s*$")


@dataclass(frozen=True, slots=True)
class Format(Generic[T]):
    """One way to write a row."""

    name: str
    columns: Mapping[str, type]
    """What a row must have, and of which type."""
    parse: Callable[[Row, str], T]
    """Row and what to call it in an error -> record. Raises DataError."""
    without: tuple[str, ...] = ()
    """Columns that a row of this format does not have."""
    marked: str = ""
    """A column whose text must begin with a turn's marker."""
    given: Callable[[Row, T], int] = lambda row, record: 0
    """Messages, from the first, that a demonstration gives and does not teach: those of a `prompt` that has its
    answer in a column of its own (TRL's `completion_only_loss`)."""

    def fits(self, row: Row) -> bool:
        """Whether a row is of this format, by its columns."""
        has = all(isinstance(row.get(name), kind) for name, kind in self.columns.items())
        begins = not self.marked or (has and row[self.marked].lstrip().startswith(_MARKER))
        return has and begins and not any(name in row for name in self.without)


@dataclass(frozen=True, slots=True)
class Records(Generic[T]):
    """What a file held."""

    format: str
    """Name of the format that fits."""
    records: list[T]
    """In the order of the file."""
    numbers: list[int]
    """The row of each, from 1."""
    empty: tuple[int, ...] = ()
    """Rows that were left out because an answer or the prompt is empty."""
    given: tuple[int, ...] = ()
    """See `Format.given`; one for each record."""


def read_preferences(table: Table, *, skip_empty: bool = False) -> Records[Preference]:
    """Pairs of answers, the better one named.

    Raises:
        DataError: no format fits, or two; a row that cannot be read; or one of which an answer or the prompt is empty,
            unless these are to be left out.
    """
    return _read(table, PREFERENCES, "comparisons", skip_empty=skip_empty)


def read_dialogues(table: Table) -> Records[Conversation]:
    """Dialogues to learn from; raises as `read_preferences` does."""
    return _headed(table, _read(table, DEMONSTRATIONS, "demonstrations"))


def _headed(table: Table, read: Records[Conversation]) -> Records[Conversation]:
    """The same with each row's column `system` as a message."""
    headed = [
        with_system(table.rows[number - 1], messages, table.where(number))
        for number, messages in zip(read.numbers, read.records, strict=True)
    ]
    given = [
        count + len(now) - len(before) for count, now, before in zip(read.given, headed, read.records, strict=True)
    ]
    return replace(read, records=headed, given=tuple(given))


def read_prompt_rows(table: Table) -> Records[tuple[str, Conversation]]:
    """(id, messages up to the answer) of each prompt; a file without ids is numbered from 1.

    Raises:
        DataError: as `read_preferences`; a prompt without words, one that does not end in a user's message, an id that
            is there twice.
    """
    prompts = _headed(table, _read(table, PROMPTS, "prompts"))
    ids: list[str] = []
    seen: set[str] = set()
    for number, (row, messages) in enumerate(zip(table.rows, prompts.records, strict=True), 1):
        given = row.get("id", row.get("prompt_id", number))
        where = f"malformed data: {table.name}, prompt {number}"
        if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
            raise DataError(f"{where}: the id must be a text or a whole number, and is {given!r:.40}")
        id = str(given)
        if id in seen:
            raise DataError(f"{where}: the id {id!r} is there twice")
        if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
            raise DataError(f"{where}: {'an empty prompt' if not messages else 'it must end in a user message'}")
        seen.add(id)
        ids.append(id)
    return Records(prompts.format, list(zip(ids, prompts.records, strict=True)), prompts.numbers)


def _read(table: Table, formats: tuple[Format[T], ...], what: str, *, skip_empty: bool = False) -> Records[T]:
    if not table.rows:
        raise DataError(f"{table.name} holds no {what}")
    first = table.rows[0]
    fitting = [one for one in formats if one.fits(first)]
    if not fitting:
        raise DataError(
            f"malformed data: {table.where(1)}: no format of {what} has its columns ({_kinds(first)}); known: "
            + "; ".join(f"{one.name} ({_columns(one)})" for one in formats)
            + _inside(first)
        )
    if len(fitting) > 1:
        names = " and ".join(f"{one.name} ({_columns(one)})" for one in fitting)
        raise DataError(
            f"{table.where(1)}: two formats of {what} fit its columns, {names}; leave the columns of one of them"
        )
    (chosen,) = fitting
    records: dict[int, T] = {}
    empty: dict[int, EmptyAnswer] = {}
    for number, row in enumerate(table.rows, 1):
        if not chosen.fits(row):
            raise DataError(
                f"malformed data: {table.where(number)}: not {chosen.name} ({_columns(chosen)}), as the first row is; "
                f"it has {_kinds(row)}"
            )
        for column in _UNREAD:
            if row.get(column):
                raise DataError(
                    f"malformed data: {table.where(number)}: has {column!r}, which is not read; leave the column out "
                    "if it says nothing, or write its turns as messages"
                )
        try:
            records[number] = chosen.parse(row, table.where(number))
        except EmptyAnswer as error:
            empty[number] = error
            continue
        _refuse_halves(records[number], table.where(number))
    if empty and not (skip_empty and records):
        refusal = next(iter(empty.values()))
        raise DataError(
            f"{refusal} ({len(empty)} of {len(table.rows)} rows have one); remove them, or leave them out with "
            "--skip-empty"
        )
    given = tuple(chosen.given(table.rows[number - 1], record) for number, record in records.items())
    return Records(chosen.name, list(records.values()), list(records), tuple(empty), given)


def _refuse_halves(record: object, where: str) -> None:
    parts = (record.prompt, record.chosen, record.rejected) if isinstance(record, Preference) else (record,)
    for message in (message for part in parts for message in cast(Conversation, part)):
        refuse_half(message.content, where)


_UNREAD = ("tools", "history", "chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio")
"""Columns that other programs show a model together with the text, or write into it."""


def _columns(one: Format[T]) -> str:
    return ", ".join(f"{name}: {'text' if kind is str else 'messages'}" for name, kind in one.columns.items())


def _kinds(row: Row) -> str:
    """The columns of a row, and what each holds."""
    return ", ".join(f"{name!r}: {_kind(value)}" for name, value in row.items()) or "none"


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "messages" if value and all(isinstance(item, dict) for item in value) else "a list"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _inside(row: Row) -> str:
    """Where the rows are, if the whole file is one object with a list of them in it."""
    lists = [name for name, value in row.items() if _kind(value) == "messages"]
    return f"; if {lists[0]!r} holds the rows, write these alone" if len(row) == len(lists) == 1 else ""


# --- preferences ---


def _conversational(row: Row, where: str) -> Preference:
    prompt, chosen, rejected = (messages_of(row[key], where) for key in ("prompt", "chosen", "rejected"))
    whole = [bool(prompt) and answer[:-1][: len(prompt)] == prompt for answer in (chosen, rejected)]
    if all(whole):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # whole dialogues beside their prompt
    elif any(whole):
        one, other = ("chosen", "rejected") if whole[0] else ("rejected", "chosen")
        raise DataError(f"malformed data: {where}: {one!r} begins with the prompt, and {other!r} does not")
    return Preference.of(row, prompt, chosen, rejected, where)


def _standard(row: Row, where: str) -> Preference:
    chosen, rejected = (_answer(row[key]) for key in ("chosen", "rejected"))
    return Preference.of(row, parse_dialogue(row["prompt"]), chosen, rejected, where)


def _whole(row: Row, where: str) -> Preference:
    return _implicit(row, messages_of(row["chosen"], where), messages_of(row["rejected"], where), where)


def _asked_twice(row: Row, where: str) -> Preference:
    """The text `prompt` must be in what a user says in the dialogues, or hold it: one of several turns, or all."""
    pair = _whole(row, where)
    asked = [" ".join(message.content.split()) for message in pair.prompt if message.role == "user"]
    prompt = " ".join(row["prompt"].split())
    if not any(text and (text in prompt or prompt in text) for text in asked):
        raise DataError(
            f"malformed data: {where}: 'prompt' is {row['prompt']!r:.40}, and the dialogues answer "
            f"{pair.prompt[-1].content!r:.40}; leave the column 'prompt' out if the dialogues are right"
        )
    return pair


def _whole_texts(row: Row, where: str) -> Preference:
    return _implicit(row, _with_last_answer(row["chosen"]), _with_last_answer(row["rejected"]), where)


def _with_last_answer(text: str) -> Conversation:
    """The dialogue of a text that ends in an answer, also where it is empty: elsewhere that would be a prompt."""
    messages = parse_dialogue(text)
    return (*messages, Message("assistant", "")) if _NO_ANSWER.search(text) else messages


def _implicit(row: Row, chosen: Conversation, rejected: Conversation, where: str) -> Preference:
    """What both dialogues begin with is the prompt; each keeps at least its last message."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return Preference.of(row, chosen[:shared], chosen[shared:], rejected[shared:], where)


def _answer(text: str) -> Conversation:
    return (Message("assistant", text.strip()),)


_PAIR: dict[str, type] = {"chosen": list, "rejected": list}
_TEXT_PAIR: dict[str, type] = {"chosen": str, "rejected": str}

PREFERENCES: tuple[Format[Preference], ...] = (
    Format("conversational preferences", {"prompt": list, **_PAIR}, _conversational),
    Format("preferences with the prompt in both dialogues", _PAIR, _whole, without=("prompt",)),
    Format("UltraFeedback's preferences", {"prompt": str, **_PAIR}, _asked_twice),
    Format("standard preferences", {"prompt": str, **_TEXT_PAIR}, _standard),
    Format("hh-rlhf's preferences", _TEXT_PAIR, _whole_texts, without=("prompt",), marked="chosen"),
)
"""TRL's explicit and implicit formats, conversational and standard, and two data sets that mix them. ALMoST's released
comparisons are standard ones."""


# --- demonstrations ---


def _messages(row: Row, where: str) -> Conversation:
    return messages_of(row["messages"], where)


def _sharegpt(row: Row, where: str) -> Conversation:
    items = row["conversations"]
    if items and isinstance(items[0], dict) and "role" in items[0]:
        return messages_of(items, where)
    messages = []
    for item in items:
        role, content = (item.get("from"), item.get("value")) if isinstance(item, dict) else (None, None)
        if role not in _SHAREGPT_ROLES or not isinstance(content, str):
            raise DataError(
                f"malformed data: {where}: a turn must be {{'from', 'value'}} of {', '.join(_SHAREGPT_ROLES)}, and is "
                f"{item!r:.60}"
            )
        messages.append(Message(_SHAREGPT_ROLES[role], content))
    return tuple(messages)


def _instruction(row: Row, where: str) -> Conversation:
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise DataError(f"malformed data: {where}: 'input' must be a text, and is {more!r:.40}")
    return (Message("user", f"{row['instruction']}\n\n{more}" if more.strip() else str(row["instruction"])),)


def _alpaca(row: Row, where: str) -> Conversation:
    return (*_instruction(row, where), *_answer(row["output"]))


def _completion(row: Row, where: str) -> Conversation:
    return messages_of(row["prompt"], where) + messages_of(row["completion"], where)


def _text_completion(row: Row, where: str) -> Conversation:
    return parse_dialogue(row["prompt"]) + _answer(row["completion"])


def _almost(row: Row, where: str) -> Conversation:
    return parse_dialogue(row["input"]) + _answer(row["output"])


def _dialogue_text(row: Row, where: str) -> Conversation:
    return parse_dialogue(row["text"])


def _all_but_completion(row: Row, dialogue: Conversation) -> int:
    return len(dialogue) - len(row["completion"])


def _all_but_last(_: Row, dialogue: Conversation) -> int:
    return len(dialogue) - 1


DEMONSTRATIONS: tuple[Format[Conversation], ...] = (
    Format("messages", {"messages": list}, _messages),
    Format("ShareGPT's conversations", {"conversations": list}, _sharegpt),
    Format("Alpaca's instructions", {"instruction": str, "output": str}, _alpaca),
    Format("prompts with completions", {"prompt": list, "completion": list}, _completion, given=_all_but_completion),
    Format("texts with completions", {"prompt": str, "completion": str}, _text_completion, given=_all_but_last),
    Format(
        "ALMoST's demonstrations",
        {"input": str, "output": str},
        _almost,
        without=("instruction",),
        given=_all_but_last,
    ),
    Format("dialogues as text", {"text": str}, _dialogue_text, marked="text"),
)


# --- prompts ---


def _user_text(row: Row, where: str) -> Conversation:
    text = str(row["prompt"])
    if text.lstrip().startswith(_MARKER):
        return parse_dialogue(text)
    return (Message("user", text.strip()),) if text.strip() else ()


PROMPTS: tuple[Format[Conversation], ...] = (
    Format("prompts", {"prompt": str}, _user_text),
    Format("conversational prompts", {"prompt": list}, lambda row, where: messages_of(row["prompt"], where)),
    Format("messages", {"messages": list}, _messages, without=("prompt",)),
    Format(
        "Alpaca's instructions",
        {"instruction": str},
        _instruction,
        without=("prompt",),
    ),
)
