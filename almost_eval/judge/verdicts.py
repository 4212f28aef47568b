"""What a review says: two scores, the letter of the winner, or one mark. One parser for each form of review.

The official parser reads the first line and nothing else; a math review ends with its scores. Here a review may state
its scores in four ways, each a *reading*:

1. `line`: a line of two scores and nothing else ("8 9", "(8, 9)", "Scores: 8 and 9"), the first line or the last ones;
2. `tuple`: "(8, 9)" beside a word such as score, rating, tuple or output; the last such tuple of the review counts;
3. `labelled`: a score for each assistant by name ("Assistant 1: 8/10 ... Assistant 2: 9/10") where a word says that
   these are scores; without such a word only as the first or last thing of the review;
4. `prose`: "Assistant 1 receives a score of 8 ...", where 1 to 3 see nothing.

Readings that disagree make the review ambiguous: no verdict is better than a wrong one. Numbers that the review quotes
from the question (three words or more in a row) are struck out first. Nothing else is a score: no equation, no count of
mistakes, no range.

A score of 0 is off the scale of 1 to 10 that the prompt gives. It is taken only where the scores are the first line and
the explanation says in words that it is meant ("a score of 0", "provided no answer"): archived reviews of empty answers
do. Anywhere else it is out of range.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from almost_eval.judge.records import Side, Unparsed, Verdict

LOWEST, HIGHEST = 1.0, 10.0
"""The scale that the prompts state."""

Scores = tuple[float, float]

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201b\u2032\uff07", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f\u3000\t", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\r`", None),  # invisible, or markdown's code
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "\uff1a": ":",
        "\uff0c": ",",
        "\u3001": ",",
        "\uff08": "(",
        "\uff09": ")",
        "\uff0f": "/",
        "\u2044": "/",
    }
)
"""Typography that means the same as plain text."""
_EMPHASIS = re.compile(
    r"(?<!\d)\*\*+|\*\*+(?!\d)|(?<![^\s(])\*(?=\S)|(?<=\S)\*(?![^\s.,;:)])|(?<![A-Za-z0-9_])_+|_+(?![A-Za-z0-9_])"
)
"""Markdown's stars and underscores, but not those of 2*3, 2**3, 5 * 8 and a_1."""

_NUMBER = r"(\d{1,4}(?:\.\d{1,3})?)(?: ?/ ?(\d{1,3})(?![\d/])| out of (\d{1,3}))?(?: ?points?\b)?"
_BEFORE, _AFTER = r"(?<![\w.,/$-])", r"(?![\w%]|[.,]\d| ?[/^])"
_N = _BEFORE + _NUMBER + _AFTER
"""A number and the scale it names, if any. Three groups."""
_BETWEEN = r" ?[\])]* ?(?:,? and |, ?|; ?|\| ?|& ?|vs\.? |- | )[\[(]* ?"
_PAIR = rf"[\[(]* ?{_BEFORE}{_NUMBER}{_BETWEEN}{_NUMBER}{_AFTER} ?[\])]*"
"""Two numbers. Six groups. A bare hyphen or slash between them is a range or a fraction, and no pair."""
_WORD = r"(?:scor|rating|rated?\b|grad|mark|verdict|evaluation result)"
_NAME = r"(?:assistant|answer|response|model|chatbot|ai)"
_LABEL = rf"\b{_NAME}(?: ?[#_-]?| number | no\.? )(1|2|a|b|one|two)\b(?!-)"
_LABELLED = _LABEL.replace("(1|2", "(?:1|2")
_BOTH = rf"(?:{_NAME}s? ?)?#?\b(?:1|a)\b (?:and|&) (?:{_NAME} ?)?#?\b(?:2|b)\b"
_FINAL = re.compile(r"\b(?:final|overall|total|conclusion|output|in summary)", re.I)

_LINE = re.compile(
    rf"(?:(?:here (?:are|is) )?(?:the |my |final |overall )*(?:{_WORD}\w*|output|result|answer)"
    rf"[^.\d\n:=()-]{{0,60}}(?:\([^()\n]{{0,40}}\) ?)?[:=-] ?)?{_PAIR} ?[.,;]?",
    re.I,
)
_FIRST_THEN_TEXT = re.compile(rf"{_PAIR}(?: ?[.:;,(-] ?(?=[A-Za-z]{{2}})| (?=[A-Z][a-z]))")
_SINGLE = re.compile(rf"{_N}[.,;]?")
_TUPLE = re.compile(rf"[\[(] ?{_NUMBER} ?, ?{_NUMBER} ?,? ?[\])](?! ?[\^*/+=])")
_TUPLE_WORD = re.compile(rf"{_WORD}|tuple|\boutput", re.I)
_STATED_PAIR = re.compile(rf"\b{_WORD}\w*\b(?P<between>[^.\d\n]{{0,80}}?){_PAIR}", re.I)
_RANGE = re.compile(r"\b(?:between|from|scale|range|ranging)\b", re.I)
_ENTRY = re.compile(
    rf"(?P<word>(?:\b{_WORD}\w*|points)(?: (?:for|of|to))?:? ?[(\[]? ?(?:the )?)?"
    rf"{_LABEL}[\"'\])]*(?:'?s)?(?: ?\([^()\d\n]*\))?"
    rf" ?(?P<word2>(?:final |overall |total )?(?:{_WORD}\w*)(?: is| would be| of)?)?[\"']?"
    rf" ?(?::|=|->|\u2192|\||-(?= )|\((?=\d)|(?<=[a-z] is)|(?<=be)|(?<=of))"
    rf"(?: *[\"'\[(]? ?{_N}| *\n+ *{_N}(?= *(?:\n|$)))",
    re.I,
)
_TAIL = re.compile(
    r" ?(?:$|\n|[.,;:|()\[\]\"'}]|-(?! ?\d)|(?:and|while|whereas|because|as|for|vs|assistant|answer)\b)", re.I
)
"""What may follow a labelled score: a word that is counted ("3 errors") may not."""
_CLAUSE = re.compile(r"[;\n]|\.(?= |$)|,? (?:and|while|whereas|but)(?= )|, ", re.I)
_GIVEN = re.compile(
    rf"\b(?:(?:score|rating|grade) ?(?:is|of|:|=|would be)? ?(?:a |an )?{_N}"
    rf"|(?:(?:scored|gets?|got|receives?|received|earns?|earned|deserves?)(?: an?)?|{_LABELLED} an?) {_N}(?=\W*$))",
    re.I,
)
_ECHO_WORD = re.compile(r"\w+")
_NO_ANSWER = r"(?:no|not|n't|fail\w*|without|empty)\b[^.]{0,40}\b(?:answer|response|respond|content|text|output)"
_FENCE = re.compile(r" *(?:python|json|text|plaintext)? *", re.I)
"""What is left of the first line of a code block."""
_NEAR_END = 6
"""Lines from the end within which a tuple that stands alone needs no word to be the scores."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One statement of both scores."""

    scores: Scores
    scale: bool = True
    """False where it names a scale other than 10."""
    final: bool = False
    """Called final, overall, the output or the conclusion."""
    first: bool = False
    """It is the first line."""


def parse_scores(review: str, question_text: str = "") -> Verdict | Unparsed:
    """The two scores of a review, 1 to 10.

    Args:
        review: what the judge wrote.
        question_text: what it may have quoted: no score is taken from there.

    Returns:
        A verdict with scores, or why there is none: `empty`, `no_scores`, `ambiguous` or `out_of_range`.
    """
    text = _plain(review)
    if not text.strip():
        return Unparsed("empty")
    if (stated := _json(review)) is not None:
        return _verdict_of([stated], text)
    text = _without_quotes(text, _plain(question_text))
    readings = _lines(text) + _tuples(text) + _stated_pairs(text) + _labelled(text)
    return _verdict_of(readings or _prose(text), text)


def _verdict_of(readings: list[_Reading], text: str) -> Verdict | Unparsed:
    """What readings of a review say together."""
    if not readings:
        return Unparsed("no_scores")
    decisive = [r for r in readings if r.first or r.final] if any(r.final for r in readings) else readings
    if len({(r.scores, r.scale) for r in decisive}) > 1:
        return Unparsed("ambiguous")
    reading = decisive[0]
    if not reading.scale or not all(_in_range(side, reading, text) for side in (0, 1)):
        return Unparsed("out_of_range")
    first, second = reading.scores
    winner: Side = "tie" if first == second else "1" if first > second else "2"
    return Verdict(winner, first, second)


def _plain(text: str) -> str:
    text = re.sub(r"\\([()\[\]_*])", r"\1", text.translate(_PLAIN).replace("\u2028", "\n").replace("\u2029", "\n"))
    text = _EMPHASIS.sub("", text)
    # Less the signs of headings, quotes, lists, tables and code blocks.
    lines = (re.sub(r"^[ >#|~\u2022]+|^ *[-+*] +(?=\S)|[ |#]+$", "", line) for line in text.split("\n"))
    return "\n".join("" if _FENCE.fullmatch(line) else re.sub(r" {2,}", " ", line) for line in lines)


def _without_quotes(text: str, quoted: str) -> str:
    """The review with the digits struck out of every run of three or more words that `quoted` holds as well."""
    words = [word.casefold() for word in _ECHO_WORD.findall(quoted)]
    if not words or not any(c.isdigit() for c in quoted):
        return text
    n = min(3, len(words))
    runs = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    spoken = list(_ECHO_WORD.finditer(text))
    heard = [match[0].casefold() for match in spoken]
    struck = {j for i in range(len(heard) - n + 1) if tuple(heard[i : i + n]) in runs for j in range(i, i + n)}
    if not struck:
        return text
    letters = list(text)
    for j in struck:
        if any(c.isdigit() for c in heard[j]):
            letters[spoken[j].start() : spoken[j].end()] = "\u25a1" * len(spoken[j][0])
    return "".join(letters)


# --- readings


def _json(review: str) -> _Reading | None:
    """The scores of a review that is one JSON object, by the names of its fields; None for any other review."""
    content = re.sub(r"\A\s*```\w*\s*|\s*```\s*\Z", "", review)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    both = fields.get("scores")
    if isinstance(both, dict):
        fields, both = fields | both, None
    sides: dict[int, object] = dict(enumerate(both)) if isinstance(both, list) and len(both) == 2 else {}
    for name, value in fields.items():
        if match := _FIELD.fullmatch(name.strip()):
            sides[_SIDES[(match[1] or match[2]).lower()]] = value.get("score") if isinstance(value, dict) else value
    one, two = sides.get(0), sides.get(1)
    if (
        isinstance(one, bool)
        or isinstance(two, bool)
        or not (isinstance(one, int | float) and isinstance(two, int | float))
    ):
        return None
    return _Reading((float(one), float(two)))


def _lines(text: str) -> list[_Reading]:
    """Two scores and nothing else on a line: among the first three lines that are not empty, or the last two."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    places = [(i, line) for i, line in enumerate(lines) if i < 3 or i >= len(lines) - 2]
    readings = []
    for i, line in places:
        stated = re.sub(_BOTH, "both", line, flags=re.I)
        if match := _LINE.fullmatch(stated) or (_FIRST_THEN_TEXT.match(stated) if i == 0 else None):
            readings.append(_reading(match.groups(), final=bool(_FINAL.search(stated)), first=i == 0))
    alone = [match for line in lines[:2] if (match := _SINGLE.fullmatch(line))]
    if not readings and len(alone) == 2:  # one below the other
        readings.append(_reading(alone[0].groups() + alone[1].groups(), first=True))
    return readings


def _tuples(text: str) -> list[_Reading]:
    """The last tuple that its line or the heading above calls scores, or that stands alone near the end."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for i in reversed(range(len(lines))):
        near_end, bare = len(lines) - i <= _NEAR_END, lines[i].strip(" .")
        for match in reversed(list(_TUPLE.finditer(lines[i]))):
            alone = near_end and bare == match[0]
            clause = re.split(r"[.!?] ", lines[i][max(0, match.start() - 200) : match.start()])[-1]
            if not match.start() and i and lines[i - 1].endswith(":"):
                clause = lines[i - 1]
            if (alone or _TUPLE_WORD.search(clause)) and not _RANGE.search(clause):
                return [_reading(match.groups(), final=bool(_FINAL.search(clause)))]
    return []


def _stated_pairs(text: str) -> list[_Reading]:
    """Both in a row after a word for scores: "I would give scores of 8 and 9"."""
    text = re.sub(_BOTH, lambda match: "both".ljust(len(match[0])), text, flags=re.I)
    readings = []
    for match in _STATED_PAIR.finditer(text):
        clause = text[text.rfind("\n", 0, match.start()) + 1 : match.end()]
        after = text[match.end() : match.end() + 20]
        if not _RANGE.search(match["between"]) and re.match(r" ?(?:$|[.,;:)\n]|to\b|for\b|out\b|respectively)", after):
            readings.append(_reading(match.groups()[1:], final=bool(_FINAL.search(clause))))
    return readings


def _labelled(text: str) -> list[_Reading]:
    """A score for each assistant by name."""
    entries = [match for match in _ENTRY.finditer(text) if _TAIL.match(text, match.end())]
    readings = []
    for one, two in itertools.pairwise(entries):
        sides = [_side(one), _side(two)]
        if sorted(sides) != [0, 1] or two.start() - one.end() > 600:
            continue
        numbers = [_numbers(entry) for entry in (one, two)]
        above = "\n".join(text[max(0, one.start() - 160) : one.start()].rstrip().split("\n")[-2:])
        told = any(entry["word"] or entry["word2"] for entry in (one, two)) or any(any(n[1:]) for n in numbers)
        ends = not text[: one.start()].strip() or "\n" not in text[two.end() :].strip()
        if told or _TUPLE_WORD.search(above) or (ends and _plausible(numbers)):
            ordered = numbers if sides == [0, 1] else numbers[::-1]
            spoken = above.split("\n")[-1] + one[0]
            readings.append(_reading((*ordered[0], *ordered[1]), final=bool(_FINAL.search(spoken))))
    return readings


def _prose(text: str) -> list[_Reading]:
    """One score for each assistant, each in a clause, or a paragraph, that speaks of that assistant alone."""
    stated: dict[int, set[tuple[str | None, ...]]] = {0: set(), 1: set()}
    for paragraph in re.split(r"\n\s*\n", text):
        header = re.match(rf"\s*{_LABEL}(?:'s \w+)? ?[:\n]", paragraph, re.I)
        others = {m[1].lower() for m in re.finditer(_LABEL, paragraph, re.I)}
        for clause in _CLAUSE.split(paragraph):
            labels = {_SIDES[m[1].lower()] for m in re.finditer(_LABEL, clause, re.I)}
            numbers = [_three(match.groups()) for match in _GIVEN.finditer(clause)]
            if not numbers and labels:  # "... and Assistant 2 a 9", "8 for Assistant 1"
                match = re.search(rf"(?:\ba|\ban)? ?{_N} (?:to|for) {_LABEL}", clause, re.I)
                numbers = [_three(match.groups()[:3])] if match else []
            if not labels and header and len(others) == 1:
                labels = {_SIDES[header[1].lower()]}
            if len(labels) == 1 and len(numbers) == 1:
                stated[labels.pop()].add(numbers[0])
    if not all(stated.values()):
        return []
    return [_reading((*one, *two)) for one in stated[0] for two in stated[1]]


_FIELD = re.compile(rf"{_NAME}[ _#-]?(1|2|a|b)(?:[ _]?(?:score|rating))?|(?:score|rating)[ _](1|2|a|b)", re.I)
"""A field of a JSON object that holds the score of one side."""
_SIDES = {"1": 0, "a": 0, "one": 0, "2": 1, "b": 1, "two": 1}


def _side(entry: re.Match[str]) -> int:
    return _SIDES[entry[2].lower()]


def _numbers(entry: re.Match[str]) -> tuple[str | None, ...]:
    return _three(entry.groups()[3:])  # the first three are the words and the label


def _three(groups: Sequence[str | None]) -> tuple[str | None, ...]:
    """The number and its scale out of a pattern's alternatives, of which one has matched."""
    return next(tuple(groups[i : i + 3]) for i in range(0, len(groups), 3) if groups[i] is not None)


def _plausible(numbers: Sequence[tuple[str | None, ...]]) -> bool:
    return all(LOWEST <= float(number[0] or 0) <= HIGHEST for number in numbers)


def _reading(groups: Sequence[str | None], *, final: bool = False, first: bool = False) -> _Reading:
    """From six groups: number, scale, scale, twice."""
    one, *scale_1, two, scale_2, scale_3 = groups
    scales = {float(scale) for scale in (*scale_1, scale_2, scale_3) if scale is not None}
    return _Reading((float(one or 0), float(two or 0)), scales <= {HIGHEST}, final, first)


def _in_range(side: int, reading: _Reading, text: str) -> bool:
    score = reading.scores[side]
    return LOWEST <= score <= HIGHEST or (score == 0.0 and reading.first and _meant(side, text))


def _meant(side: int, text: str) -> bool:
    """Whether the review says in words that 0 is meant, or that this assistant gave no answer."""
    silent = rf"\b{_NAME} {('(?:1|a)', '(?:2|b)')[side]}\b[^.]{{0,80}}{_NO_ANSWER}"
    return bool(re.search(rf"{silent}|\b(?:scores?|rating) of (?:0|zero)\b", text, re.I))


# --- letters

_LETTER = re.compile(r"\[ ?\[ ?([abc]) ?\] ?\]", re.I)
_INSTRUCTION = re.compile(r"[\"']? ?(?:if|for|when|means|indicates)\b", re.I)
_WINNERS: dict[str, Side] = {"A": "1", "B": "2", "C": "tie"}


def parse_letters(review: str, question_text: str = "") -> Verdict | Unparsed:
    """The winner that a review names: [[A]] is Assistant 1, [[B]] Assistant 2, [[C]] a tie.

    Named several times, it must be the same each time. A letter that is followed by its explanation ("[[A]]" if
    assistant A is better) is the prompt's own format, repeated: no verdict. Nor is one that `question_text` holds, as
    the judge may have quoted it, unless it is the last thing the review says.

    Returns:
        A verdict without scores, or why there is none: `empty`, `no_verdict` or `ambiguous`.
    """
    text = _plain(review)
    if not text.strip():
        return Unparsed("empty")
    quoted = {match[1].upper() for match in _LETTER.finditer(_plain(question_text))}
    named = []
    for match in _LETTER.finditer(text):
        last = not re.search(r"\w", text[match.end() :])
        if not _INSTRUCTION.match(text, match.end()) and (last or match[1].upper() not in quoted):
            named.append(match[1].upper())
    if not named:
        return Unparsed("no_verdict")
    return Verdict(_WINNERS[named[0]]) if len(set(named)) == 1 else Unparsed("ambiguous")


# --- one mark

_RATING = re.compile(r"\[\[ ?(\d+\.?\d*) ?\]\]")
_RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
_CALLED_RATING = re.compile(rf"\b{_WORD}\w*\b[^\n\[]{{0,40}}\[(\d+\.?\d*)\]", re.I)


def parse_rating(review: str, question_text: str = "") -> Verdict | Unparsed:
    """The mark of a review of one answer, 1 to 10: [[7]], or where there is none of these, [7].

    The patterns are FastChat's, which takes the first match and knows no bounds. Here marks that differ are ambiguous,
    and one off the scale is out of range. A mark in double brackets that `question_text` holds, as the judge may have
    quoted it, is no mark unless it is the last thing the review says. Of several numbers in single brackets, which may
    be indices or footnotes, those count that a word such as rating or score stands before.

    Returns:
        A verdict without a winner, or why there is none: `empty`, `no_rating`, `ambiguous` or `out_of_range`.
    """
    text = _plain(review)
    if not text.strip():
        return Unparsed("empty")
    quoted = {float(match[1]) for match in _RATING.finditer(_plain(question_text))}
    marks = []
    for match in _RATING.finditer(text):
        last = not re.search(r"\w", text[match.end() :])
        if last or float(match[1]) not in quoted:
            marks.append(float(match[1]))
    if not marks:
        marks = [float(mark) for mark in _CALLED_RATING.findall(text) or _RATING_BACKUP.findall(text)]
    if not marks:
        return Unparsed("no_rating")
    if len(set(marks)) > 1:
        return Unparsed("ambiguous")
    return Verdict(None, marks[0]) if LOWEST <= marks[0] <= HIGHEST else Unparsed("out_of_range")
