"""A prompt's places filled with the texts of a case, so that no text can end its place in the frame.

See the head of `prompts.py` for the places, the fence and the markers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from almost_eval.judge.records import Pair, Subject

_PLACES = re.compile(r"\{(question|answer|answer_1|answer_2|reference|fence|nth)\}")
_BLOCK = re.compile(r"\{turns\}(.*?)\{/turns\}", re.S)
_NTH = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_MARKER = re.compile(r"(\[)([A-Z][^\[\]{}\n]*)(\])|(<\|)([A-Z][^|{}\n]*)(\|>)|(?m:^)(### )([A-Z][^{}\n]*)(:)")
"""A mark of the frame in an official prompt: three groups in each of three shapes."""
_QUOTED = "quoted: "

Texts = dict[str, str]
"""Place in a prompt -> what fills it."""


class FrameTexts(NamedTuple):
    """What fills the places of a prompt."""

    by_turn: list[Texts]
    """Of each turn up to the judged one."""
    n_quoted: int
    """Markers of the frame in the shown texts, which were turned into quotations."""


def texts_in(user: str, case: Subject) -> FrameTexts:
    """What fills the places of a prompt, of whose user message `user` is the template."""
    turns = [_texts_of_turn(case, turn) for turn in range(1, case.turn + 1)]
    if "{fence}" in user:
        code = _fence(turns)
        return FrameTexts([texts | {"fence": code} for texts in turns], 0)
    markers = _marker_pattern(user)
    if markers is None:
        return FrameTexts(turns, 0)
    counted = [{place: _quoted(markers, text) for place, text in texts.items()} for texts in turns]
    used = set(_PLACES.findall(user))
    shown = [counted[turn - 1] for turn in shown_turns(user, case)]
    n = sum(texts[place][1] for texts in shown for place in used & texts.keys())
    return FrameTexts([{place: text for place, (text, _) in texts.items()} for texts in counted], n)


def shown_turns(user: str, case: Subject) -> Sequence[int]:
    """The turns that a prompt shows: all up to the judged one where it has a block, else that one."""
    return range(1, case.turn + 1) if _BLOCK.search(user) else [case.turn]


def _texts_of_turn(case: Subject, turn: int) -> Texts:
    answers = [answer.turns[turn - 1] for answer in case.answers]
    places = ("answer_1", "answer_2") if isinstance(case, Pair) else ("answer",)
    texts = {"question": case.question.turns[turn - 1], "reference": case.question.references[turn - 1] or ""}
    return texts | dict(zip(places, answers, strict=True))


def filled(part: str, turns: list[Texts]) -> str:
    """A part of a prompt: its blocks once for each turn, everything else with the last one's texts."""
    nth = {"nth": _NTH[len(turns) - 1] if len(turns) <= len(_NTH) else f"{len(turns)}th"}

    def fill(text: str, texts: Texts) -> str:
        return _PLACES.sub(lambda match: (texts | nth).get(match[1], match[0]), text)

    pieces = _BLOCK.split(part)  # outside and inside of a block, in turn
    return "".join(
        "".join(fill(piece, texts) for texts in turns) if at % 2 else fill(piece, turns[-1])
        for at, piece in enumerate(pieces)
    )


def _fence(turns: list[Texts]) -> str:
    """A code that follows from the texts, so that the same case is the same request, and occurs in none of them."""
    whole = json.dumps(sorted(turns[0].items()) if len(turns) == 1 else [sorted(texts.items()) for texts in turns])
    for attempt in range(1000):
        code = hashlib.sha256(f"{attempt}{whole}".encode()).hexdigest()[:12]
        if not any(code in text for texts in turns for text in texts.values()):
            return code
    raise AssertionError("a text cannot hold a thousand of its own digests")


def _marker_pattern(user: str) -> re.Pattern[str] | None:
    """What would read as a marker of this frame, whatever its case, spaces and apostrophes.

    Of its three groups the first and the last are the signs around the marker's words.
    """
    shapes: dict[tuple[str, str], list[str]] = {}
    for groups in dict.fromkeys(_MARKER.findall(_BLOCK.sub(r"\1", user))):
        opened, inner, closed = next(groups[at : at + 3] for at in range(0, len(groups), 3) if groups[at])
        words = (re.escape(word).replace("'", "['\u2018\u2019]") for word in inner.split())
        shapes.setdefault((opened, closed), []).append(r"\s+".join(words))
    if not shapes:
        return None
    patterns = []
    for (opened, closed), markers in shapes.items():
        start = rf"(?m:^)[ \t]*{re.escape(opened.strip())}[ \t]*" if opened.startswith("#") else re.escape(opened)
        # With the mark of an earlier quotation, so that every change can be undone.
        inner = rf"\s*(?:{_QUOTED})*(?:{'|'.join(markers)})\s*"
        patterns.append(rf"({start})({inner})({re.escape(closed)})")
    return re.compile("|".join(patterns), re.I)


def _quoted(markers: re.Pattern[str], text: str) -> tuple[str, int]:
    """A text with its markers turned into quotations, and how many they were."""

    def quote(match: re.Match[str]) -> str:
        start, inner, end = (part for part in match.groups() if part is not None)
        return f"{start}{_QUOTED}{inner}{end}"

    return markers.subn(quote, text)
