"""What a review of one answer says: a mark from 1 to 10."""

from __future__ import annotations

import re

from almost_eval.judge.plain_text import plain_text, without_thoughts
from almost_eval.judge.records import Unparsed, Verdict
from almost_eval.judge.verdicts import HIGHEST, LOWEST

_RATING = re.compile(
    r"(?:(?<![A-Za-z0-9_])|(?<=rating)|(?<=score))\[\[ ?(\d+\.?\d*)(?: ?/ ?10)? ?\]\](?! ?/ ?(?!10\b)\d)", re.I
)
"""Not behind a name, where it is an index of R, and not of another scale."""
_RATING_BACKUP = re.compile(r"(?m:^)\W*\[(\d+\.?\d*)\]\W*(?m:$)")
_CALLED_RATING = re.compile(
    r"\b(?:scor(?:e[sd]?|ing)|rat(?:e[sd]?|ings?)|grad(?:e[sd]?|ing)|marks?|verdict)\b[^\n\[]{0,40}\[(\d+\.?\d*)\]",
    re.I,
)


def parse_rating(review: str, question_text: str = "") -> Verdict | Unparsed:
    """The mark of a review of one answer, 1 to 10: [[7]], or where there is none of these, [7] on a line of its own.

    The patterns are FastChat's, which takes the first match and knows no bounds. Here marks that differ are ambiguous,
    and one off the scale is out of range. A mark in double brackets that `question_text` holds, as the judge may have
    quoted it, is no mark unless it is the last thing the review says. Of several numbers in single brackets, which may
    be indices or footnotes, those count that a word such as rating or score stands before.

    Returns:
        A verdict without a winner, or why there is none: `empty`, `no_rating`, `ambiguous` or `out_of_range`.
    """
    spoken = without_thoughts(review)
    if isinstance(spoken, Unparsed):
        return spoken
    text = plain_text(spoken)
    if not text.strip():
        return Unparsed("empty")
    quoted = {float(match[1]) for match in _RATING.finditer(plain_text(question_text))}
    marks = []
    for match in _RATING.finditer(text):
        # In quotation marks within a sentence, the last thing said may be what the answer says of itself.
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        last = not re.search(r"\w", text[match.end() :]) and not re.search(r"\w.*[\"']\Z", before)
        if last or float(match[1]) not in quoted:
            marks.append(float(match[1]))
    if not marks:
        marks = [float(mark) for mark in _CALLED_RATING.findall(text) or _RATING_BACKUP.findall(text)]
    if not marks:
        return Unparsed("no_rating")
    if len(set(marks)) > 1:
        return Unparsed("ambiguous")
    return Verdict(None, marks[0]) if LOWEST <= marks[0] <= HIGHEST else Unparsed("out_of_range")
