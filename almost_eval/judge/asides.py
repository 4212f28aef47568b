"""What a review says without meaning it as its verdict: what would be, what is not, what others say.

"If it were complete, I would give 9 and 4" states two scores and gives none. Such marks are struck out before a review
is read, so that they neither stand for a verdict nor contradict the real one. Four kinds of statements are known:

1. a condition: "if", "unless", "had it been", "were it", "with more detail it would be", "would have received";
2. a denial: "not 9 and 4", "does not deserve a score of 9", "9 and 4 would be too harsh", "9 and 4?";
3. another's: "one could give", "other reviewers gave", "Assistant 1 rates itself", "the answer says", "for example";
4. a first impression: "at first sight", "my first impression was".

"I would give 8 and 9" and "if I have to choose, 8 and 9" are verdicts. A statement ends at a full stop, a semicolon,
the end of the line, and before ", but" and ", so". Where it is unclear what is meant, more is struck out rather than
less: a review without a verdict is counted, a wrong verdict is not seen.
"""

from __future__ import annotations

import re

from almost_eval.judge.plain_text import plain_text, without_thoughts
from almost_eval.judge.records import Unparsed
from almost_eval.judge.structured import NAME

STRUCK = "\u25a1"
"""Stands for each digit, or letter of a verdict, that is no verdict of the review."""

_LABEL = rf"\b{NAME}s? ?[#_-]?(?:[12ab]\b(?:,? (?:and|&|or) [12ab]\b)?)"
_NUMBER = r"(?<![\w.,-])\d{1,3}(?:[.,]\d{1,2})?(?: ?/ ?10| out of 10)?(?![\w%])"
_MARK = rf"(?:\[ ?\[ ?(?:[abc]|{_NUMBER}) ?\] ?\]|[(\[]?{_NUMBER}[)\]]?)"
_MARKS = rf"[\"'(]?{_MARK}(?:(?:,? (?:and|to|or)|,|-| -)? ?{_MARK})?"
"""A mark or two in a row, or verdicts in double brackets."""
_RECEIVES = r"(?:gets|receives|earns|deserves|i|my|is|are|so|but|because|as|since)\b"
_GAP = rf"(?:{_LABEL}|(?! - |\b{_RECEIVES})[^\d.,;:?\n])"
"""Between a word and the mark it speaks of: the names of the assistants are no marks, and no other statement begins."""

_STATEMENT = re.compile(
    r"\n|(?<=[.!?;])[\"')\]]* |,? but\b|, ?(?:so|hence|thus|therefore|yet|still)\b|\b(?:as it (?:is|stands))\b", re.I
)
_OWN_CONDITION = r"(?! (?:(?:i|we|you) (?:had to|have to|must|were to|ask|look|compare|weigh)|forced|asked|any|needed))"
_CONDITION = re.compile(
    rf"\W*(?:(?:and|however|then|also|now|only|overall),? )?"
    rf"(?:if{_OWN_CONDITION}|unless|suppos(?:e|ing)|assuming|imagine|in case|for (?:example|instance)|e\.g\."
    rf"|(?:had|were|should) (?:it|they|the|this|that|either|both|{_LABEL})"
    rf"|(?:with|without|under|but for) (?!th(?:is|at|ese|ose)\b|all\b|both\b)[^.;\n]{{1,80}}?"
    rf" (?:would|could|might))[ ,]",
    re.I,
)
"""How a statement begins of which nothing is meant."""
_OTHERWISE = re.compile(r"\W*(?:otherwise|if not|else)\b", re.I)
_TO_ITS_END = re.compile(
    rf"\b(?:would|could|might|should|may|'d)(?: not|n't| then| well| easily)? have (?:been )?{_GAP}{{0,60}}{_MARKS}"
    rf"|(?:\b(?:would|could|might)|'d)\b[^.;\n]{{0,80}}?{_MARKS}(?!\d)"
    rf"(?:(?!\b(?:as|because|since|for|which|even)\b)[^.,;\n]){{0,30}}\b(?:if|unless)\b"
    rf"|\b(?:at first (?:sight|glance)|initially|(?:first|initial) (?:impression|instinct|guess))\b",
    re.I,
)
"""From here on a statement is none of the verdict."""
_OTHERS = (
    r"(?:one|some(?:one)?|others|people|(?:an?|the|other|another|some|many|most|any) (?:[a-z-]+ )?"
    r"(?:reader|user|reviewer|judge|person|rater|expert|grader)s?)\b(?: who [a-z ]{1,30})?"
    r"(?: (?:would|could|might|may|can|has|have))?(?: well| also| even| easily)?"
    r" (?:give|rate|score|argue|say|prefer|choose|assign|grade|gave|rated|scored|assigned|graded|given)"
)
_CLAIMS = (
    rf"(?:{_LABEL}(?:'s)?|\b(?:it|the {NAME})\b)(?: {NAME})? (?:(?:rates?|scores?|grades?|gives?|awards?|votes? for) "
    r"itself|claims?|says?|states?|asks?(?: for)?|writes?|wants?|demands?|quotes?|votes?|suggests?)"
    r"|\bself-?(?:rating|score|assessment|evaluation)"
)
_AIMED = re.compile(
    rf"(?:\b(?:not|never|cannot|neither|nor)|n't|\b(?:rather|other) than|\binstead of){_GAP}{{0,40}}(?<![\w.]){_MARKS}"
    rf"|\b(?:scores?|ratings?|verdict|grade)\b{_GAP}{{0,20}}\bif\b{_GAP}{{0,40}}{_MARKS}"
    rf"|{_OTHERS}{_GAP}{{0,40}}{_MARKS}"
    rf"|(?:{_CLAIMS}):?(?:{_GAP}{{0,40}}:)?{_GAP}{{0,40}}{_MARKS}"
    rf"|{_MARKS}[\"')]* ?(?:\?|of itself\b|for itself\b|"
    r"(?:would|is|are|seems?|might|may|could)(?: be)?"
    r"(?:(?: not|n't)(?: be)? (?:my|the right|right|fair|justified|deserved|warranted|correct"
    rf"|(?:better than|as good as) {_MARKS})"
    r"| (?:too|wrong|unfair|unjust|excessive)\b))",
    re.I,
)
"""A mark or two with the words that take them back."""
_SAID = re.compile(rf"(?:{_CLAIMS}|example|e\.g\.|the format|such as)[^\n\"]{{0,40}}\"[^\n\"]*\"", re.I)
"""A quotation of what an answer says, or of an example."""
_WORD = re.compile(r"\w")
_MEANT = re.compile(r"\d|(?<=\[)[abc](?= ?\])|(?<=\[ )[abc](?= ?\])", re.I)


def asserted(review: str) -> str | Unparsed:
    """What a review says for itself, as plain text; or why that is nothing: `empty`, or that of `without_thoughts`."""
    spoken = without_thoughts(review)
    if isinstance(spoken, Unparsed):
        return spoken
    text = without_asides(plain_text(spoken))
    return text if text.strip() else Unparsed("empty")


def line_before(match: re.Match[str]) -> str:
    """The line of a match up to it."""
    return match.string[match.string.rfind("\n", 0, match.start()) + 1 : match.start()]


def is_last_word(match: re.Match[str]) -> bool:
    """Whether a match is the last thing that a review says.

    In quotation marks within a sentence, it may be what an answer says of itself.
    """
    return _WORD.search(match.string, match.end()) is None and not re.search(r"\w.*[\"']\Z", line_before(match))


def without_asides(text: str) -> str:
    """The review, as `plain_text` leaves it, with every mark struck out that it states and does not give."""
    text = _SAID.sub(_struck, text)
    parts, at, was_condition = [], 0, False
    # Step 1: statements; 2: of those that mean nothing, every mark; 3: of the others, what their words take back.
    for end in [*(match.start() for match in _STATEMENT.finditer(text)), len(text)]:
        statement, at = text[at:end], end
        is_condition = bool(_CONDITION.match(statement)) or (was_condition and bool(_OTHERWISE.match(statement)))
        if is_condition:
            statement = _MEANT.sub(STRUCK, statement)
        elif dead := _TO_ITS_END.search(statement):
            statement = _AIMED.sub(_struck, statement[: dead.start()]) + _MEANT.sub(STRUCK, statement[dead.start() :])
        else:
            statement = _AIMED.sub(_struck, statement)
        was_condition = is_condition or (was_condition and not statement.strip())
        parts.append(statement)
    return "".join(parts)


def _struck(match: re.Match[str]) -> str:
    return _MEANT.sub(STRUCK, match[0])
