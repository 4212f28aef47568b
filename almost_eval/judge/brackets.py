"""Reviews that end in double brackets: [[A]], [[B]] or [[C]] says who is better, [[7]] is the mark of one answer."""

from __future__ import annotations

import re

from almost_eval.judge.asides import asserted, is_last_word, line_before
from almost_eval.judge.plain_text import plain_text
from almost_eval.judge.records import Unparsed, Verdict
from almost_eval.judge.structured import HIGHEST, LOWEST, WINNERS

_LETTER = re.compile(r"(?:(?<![A-Za-z0-9_])|(?<=verdict))\[ ?\[ ?([abc]) ?\] ?\]", re.I)
"""Behind a name it is an index of R: `x[[a]]`."""
_OWN = re.compile(
    r"(?:\b(?:(?:my|the) )?(?:final )?(?:verdict|decision|judge?ment|choice)(?: is)?[: ]{1,3}[\"']?)?"
    r"(?P<letter>\[ ?\[ ?[abc] ?\] ?\])"
    r"(?: is my (?:final )?(?:verdict|decision|judge?ment|choice)\b)?",
    re.I,
)
"""A letter that the judge calls its own verdict, before it or behind it; without such words the letter alone."""
_INSTRUCTION = re.compile(
    r"[\"']? ?(?:if|for|when|means|indicates)\b[^.,;\n]*"
    r"\b(?:assistants?|answers?|responses?|models?|ties?|tied|draw|better|good|equal\w*|a|b|both|they|neither)\b",
    re.I,
)


def parse_letters(review: str, question_text: str = "") -> Verdict | Unparsed:
    """The winner that a review names: [[A]] is Assistant 1, [[B]] Assistant 2, [[C]] a tie.

    Named several times, it must be the same each time. A letter that is followed by its explanation ("[[A]]" if
    assistant A is better) is the prompt's own format, repeated: no verdict. Nor is one that `question_text` holds, as
    the judge may have quoted it, unless it is the last thing the review says.

    Returns:
        A verdict without scores, or why there is none: `empty`, `no_verdict` or `ambiguous`.
    """
    text = asserted(review)
    if isinstance(text, Unparsed):
        return text
    material = plain_text(question_text)
    quoted = {match[1].upper() for match in _LETTER.finditer(material)}
    claims = [match for match in _OWN.finditer(text) if match[0] != match["letter"]]
    owned = {match.start("letter") for match in claims if match[0].casefold() not in material.casefold()}
    named = []
    for match in _LETTER.finditer(text):
        is_own = is_last_word(match) or match.start() in owned or match[1].upper() not in quoted
        if is_own and not _INSTRUCTION.match(text, match.end()):
            named.append(match[1].upper())
    if not named:
        return Unparsed("no_verdict")
    return Verdict(WINNERS[named[0]]) if len(set(named)) == 1 else Unparsed("ambiguous")


# --- a mark


_RATING = re.compile(
    r"(?:(?<![A-Za-z0-9_])|(?<=rating)|(?<=score))\[\[ ?(\d+\.?\d*)(?: ?/ ?10)? ?\]\](?!\(| ?/ ?(?!10\b)\d)", re.I
)
"""Not behind a name, where it is an index of R, not before an address, where it is a link, and not of another scale."""
_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
_CALLED = re.compile(
    r"\b(?:scor(?:e[sd]?|ing)|rat(?:e[sd]?|ings?)|grad(?:e[sd]?|ing)|marks?|verdict|overall|i(?:'d| would| will)?"
    r" (?:give|gave|assign|award|say|settle on|go with)|thought"
    r"|(?:answer|response|assistant|it) (?:deserves|merits|earns|receives|gets))"
    r"(?:[ :=,()\"'|-]|\b(?:is|of|an?|as|at|be|to|for|with|would|it|this|the|my|then|and|or|answer|response|assistant"
    r"|final|overall|score|rating|mark|grade|verdict)\b|\[\[[^\[\]\n]{0,8}\]\]){0,25}\Z",
    re.I,
)
"""The words that make the number behind them a mark."""
_CALLED_BEHIND = re.compile(r" ?(?:is|as) (?:my|the) (?:\w+ )?(?:rating|score|grade|mark|verdict)\b", re.I)
_SOURCE = re.compile(r"\b(?:sources?|references?|see|notes?|citations?):? ?\Z", re.I)

_WORD = re.compile(r"\w")


def parse_rating(review: str, question_text: str = "") -> Verdict | Unparsed:
    """The mark of a review of one answer, 1 to 10: [[7]], or where there is none of these, [7] on a line of its own.

    The patterns are FastChat's, which takes the first match and knows no bounds. Here marks that differ are ambiguous,
    and one off the scale is out of range. A number within a sentence may be a citation: "as [[3]] shows". So those
    count that the review calls a rating, a score or the like; where it calls none so, those in double brackets that are
    a sentence of their own, and those in single brackets that are a line of their own. A mark in double brackets that
    `question_text` holds, as the judge may have quoted it, is no mark unless it is the last thing the review says.

    Returns:
        A verdict without a winner, or why there is none: `empty`, `no_rating`, `ambiguous` or `out_of_range`.
    """
    text = asserted(review)
    if isinstance(text, Unparsed):
        return text
    quoted = {float(match[1]) for match in _RATING.finditer(plain_text(question_text))}
    matches = [m for m in _RATING.finditer(text) if is_last_word(m) or float(m[1]) not in quoted]
    marks = [match for match in matches if _is_called(match)] or [match for match in matches if _stands_alone(match)]
    if not matches:
        single = list(_BACKUP.finditer(text))
        marks = [match for match in single if _is_called(match)] or [match for match in single if _is_line(match)]
    if not marks:
        return Unparsed("no_rating")
    if len({float(match[1]) for match in marks}) > 1:
        return Unparsed("ambiguous")
    mark = float(marks[0][1])
    return Verdict(None, mark) if LOWEST <= mark <= HIGHEST else Unparsed("out_of_range")


def _after(match: re.Match[str]) -> str:
    """The line of a match from its end on."""
    end = match.string.find("\n", match.end())
    return match.string[match.end() : end if end >= 0 else None]


def _is_called(match: re.Match[str]) -> bool:
    return bool(_CALLED.search(line_before(match)[-120:]) or _CALLED_BEHIND.match(_after(match)))


def _stands_alone(match: re.Match[str]) -> bool:
    """Whether a mark is the first thing in the review, or a sentence or line of its own, or ends the last sentence."""
    before, after = line_before(match), _after(match)
    if _SOURCE.search(before):
        return False
    if not _WORD.search(match.string, 0, match.start()):
        return True
    begins = re.search(r"(?:\A|[.!?:;|-])\W*\Z", before) and re.match(r"\W*\Z|[.!]", after)
    is_end = _WORD.search(match.string, match.end()) is None
    return bool(begins or (is_end and re.search(r"\b(?:is|be|an?|with|at|as|but),? [\"']?\Z", before)))


def _is_line(match: re.Match[str]) -> bool:
    return _WORD.search(line_before(match) + _after(match)) is None
