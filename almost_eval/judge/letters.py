"""What a review says that names the better of two answers by a letter: [[A]], [[B]], or [[C]] for a tie."""

from __future__ import annotations

import re

from almost_eval.judge.asides import asserted, is_last_word
from almost_eval.judge.plain_text import plain_text
from almost_eval.judge.records import Unparsed, Verdict
from almost_eval.judge.structured import WINNERS

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
