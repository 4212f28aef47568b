"""What a review says that scores two answers; `brackets.py` reads those that name the winner by a letter.

The official parser reads the first line and nothing else; a math review ends with its scores. Here a review may state
its scores in five ways, each a *reading*:

1. `line`: a line of two scores and nothing else ("8 9", "(8, 9)", "Scores: 8 and 9"), the first line or the last ones;
2. `tuple`: "(8, 9)" beside a word such as score, rating, tuple or output; the last such tuple of the review counts;
3. `labelled`: a score for each assistant by name ("Assistant 1: 8/10 ... Assistant 2: 9/10") where a word says that
   these are scores; without such a word only as the first or last thing of the review;
4. `table`: a table with a column for each assistant, and a row for the score, the total or the like;
5. `prose`: "Assistant 1 receives a score of 8 ...", where 1 to 4 see nothing.

Readings that disagree make the review ambiguous: no verdict is better than a wrong one. So does "8 - 9" where nothing
else says whether it is two scores or a range of one; to take it only where it falls would favour the first assistant.
Numbers that the review quotes from the question (three words or more in a row) are struck out first, and so is what it
states without meaning it (`asides.py`). Nothing else is a score: no equation, no count of mistakes, no range.

A score of 0 is off the scale of 1 to 10 that the prompt gives. It is taken only where the scores are the first line and
the explanation says in words that it is meant ("a score of 0", "provided no answer"): archived reviews of empty answers
do. Anywhere else it is out of range.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from almost_eval.judge.asides import without_asides
from almost_eval.judge.plain_text import EMPHASIS, PLAIN, plain_text, without_quotes, without_thoughts
from almost_eval.judge.records import Unparsed, Verdict
from almost_eval.judge.structured import HIGHEST, LOWEST, NAME, SIDES, Scores, embedded_scores, object_scores

_NUMBER = r"(\d{1,4}(?:\.\d{1,3})?)(?: ?/ ?(\d{1,3})(?![\d/])| out of (\d{1,3}))?(?: ?points?\b)?"
_BEFORE, _AFTER = r"(?<![\w.,/$-])", r"(?![\w%]|[.,]\d| ?[/^])"
_N = _BEFORE + _NUMBER + _AFTER
"""A number and the scale it names, if any. Three groups."""
_BETWEEN = r" ?[\])]* ?(?:,? and |, ?|; ?|\| ?|& ?|vs\.? | )[\[(]* ?"
_PAIR = rf"[\[(]* ?{_BEFORE}{_NUMBER}{_BETWEEN}{_NUMBER}{_AFTER} ?[\])]*"
"""Two numbers. Six groups. A slash between them is a fraction, and a dash, with spaces or without, may be a range."""
_DASHED = rf"[\[(]* ?{_BEFORE}{_NUMBER} ?- ?{_NUMBER}{_AFTER} ?[\])]*"
_WORD = r"(?:scor|rating|rated?\b|grad|mark|verdict|evaluation result)"
_LABEL = rf"\b{NAME}(?: ?[#_-]?| number | no\.? )(1|2|a|b|one|two)\b(?!-)"
_LABELLED = _LABEL.replace("(1|2", "(?:1|2")
_BOTH = rf"(?:{NAME}s? ?)?#?\b(?:1|a)\b (?:and|&) (?:{NAME} ?)?#?\b(?:2|b)\b"
_TURNED = re.compile(
    rf"(?:{NAME}s? ?)?#?\b(?:2|b)\b (?:and|&) (?:{NAME} ?)?#?\b(?:1|a)\b(?P<between>[^.\d\n]{{0,20}}[:=] ?){_PAIR}",
    re.I,
)
"""Both assistants in one breath, the second one first, and their scores in the same order."""
_NAMED_BEHIND = rf"{_N} ?(?:\(|for |to )(?:the )?{_LABEL}\)?"
_BEHIND = re.compile(rf"{_NAMED_BEHIND} ?(?:,? and |, ?|; ?|\| ?| ){_NAMED_BEHIND} ?[.]?", re.I)
"""Two scores on a line of their own, each with its assistant behind it."""
_COMMA_PAIR = re.compile(
    r"(\d{1,2}(?:,\d{1,2})?)(?:/10)?(?:;? | and | und | et | y | e )(\d{1,2}(?:,\d{1,2})?)(?:/10)?[.]?"
)
_COMMA_LABELLED = re.compile(
    rf"({_LABELLED}[^\d\n]{{0,12}}[:=] ?)(\d{{1,2}}),(\d{{1,2}})(?= ?/ ?10\b| *(?:$|\n|[;)|])|, ?[A-Za-z])", re.I
)
"""Decimal commas: two numbers that a space tells apart, or one behind a name. "8,9" alone is two scores."""
_TOTAL_ROW = re.compile(
    r"(?:(?:total|overall|final) ?)?(?:scores?|ratings?|grades?|marks?|verdict|points)?"
    r"(?: ?\((?:[^()]*\b10|1 ?- ?10)\)| ?/ ?10| out of 10)?",
    re.I,
)
"""The first cell of a row of scores, in whole: "Total errors" and "Final answer" are none."""
_FINAL = re.compile(r"\b(?:final|overall|total|conclusion|output|in summary)", re.I)

_LEAD = (
    rf"(?:(?:here (?:are|is) )?(?:the |my |final |overall )*(?:{_WORD}\w*|output|result|answer)"
    r"[^.\d\n:=()-]{0,60}(?:\([^()\n]{0,40}\) ?)?[:=-] ?)?"
)
_LINE = re.compile(rf"{_LEAD}{_PAIR} ?[.,;]?", re.I)
_LINE_WITH_DASH = re.compile(rf"{_LEAD}{_DASHED} ?[.,;]?", re.I)
"""Two scores, or a range of one. Of "8/10 - 9/10" each has its scale, so these are two."""
_SENTENCE = re.compile(r"(?<=[.:!?]) ")
_FIRST_THEN_TEXT = re.compile(rf"{_PAIR}(?: ?[.:;,(-] ?(?=[A-Za-z]{{2}})| (?=[A-Z][a-z]))")
_SINGLE = re.compile(rf"{_N}[.,;]?")
_HEAD = re.compile(rf"{_LABEL}(?:'s)?(?: ?(?:{_WORD}\w*))?(?: ?\([^()]*\))?", re.I)
_TUPLE = re.compile(rf"[\[(] ?{_NUMBER} ?, ?{_NUMBER} ?,? ?[\])](?! ?[\^*/+=])")
_TUPLE_WORD = re.compile(rf"{_WORD}|tuple|\boutput", re.I)
_STATED_PAIR = re.compile(rf"\b{_WORD}\w*\b(?P<between>[^.\d\n]{{0,80}}?){_PAIR}", re.I)
_COUNTED = re.compile(r"\b(?:rank|place|position|errors?|mistakes?|counts?|words|length)", re.I)
"""What numbers beside the assistants' names may be, where no word says that they are scores."""
_RANGE = re.compile(r"\b(?:between|from|scale|range|ranging)\b", re.I)
_ENTRY = re.compile(
    rf"(?P<word>(?:\b{_WORD}\w*|points)(?: (?:for|of|to))?:? ?[(\[]? ?(?:the )?)?"
    rf"{_LABEL}[\"'\])]*(?:'?s)?(?: ?\([^()\d\n]*\))?"
    rf" ?(?P<word2>(?:final |overall |total )?(?:{_WORD}\w*)(?: is| would be| of)?)?[\"']?"
    rf" ?(?::|=|->|\u2192|\||-(?= )|\((?=\d)|(?<=[a-z] is)|(?<=be)|(?<=of))"
    rf"(?: *[\"'\[(]{{0,2}} ?{_N}| *\n+ *{_N}(?= *(?:\n|$)))",
    re.I,
)
_TAIL = re.compile(
    r" ?(?:$|\n|[.,;:()\[\]\"'}]|\|(?! ?\d)|-(?! ?\d)|(?:and|while|whereas|because|as|for|vs|assistant|answer)\b)", re.I
)
"""What may follow a labelled score: a word that is counted ("3 errors") may not, nor the next number in a table."""
_CLAUSE = re.compile(r"[;\n]|\.(?= |$)|,? (?:and|while|whereas|but)(?= )|, ", re.I)
_ALONE = rf"(?<!\d - )(?<!\d to )(?<!\d or ){_N}(?! ?(?:-|to|or|through) ?\d)"
"""A number that neither begins nor ends a range."""
_GIVEN = re.compile(
    rf"\b(?:(?:score|rating|grade) ?(?:is|of|:|=|would be)? ?(?:a |an )?{_ALONE}"
    rf"|(?:(?:scored|gets?|got|receives?|received|earns?|earned|deserves?)(?: an?)?|{_LABELLED} an?) {_N}(?=\W*$))",
    re.I,
)
_NO_ANSWER = r"(?:no|not|n't|fail\w*|without|empty)\b[^.]{0,40}\b(?:answer|response|respond|content|text|output)"
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
    is_unsure: bool = False
    """It may as well be a range of one score."""


def parse_scores(review: str, question_text: str = "") -> Verdict | Unparsed:
    """The two scores of a review, 1 to 10; none is taken from `question_text`, which it may have quoted.

    Returns:
        A verdict with scores, or why there is none: `empty`, `no_scores`, `ambiguous`, `out_of_range`, or
        `duplicate_field` where a JSON object states a score twice.
    """
    spoken = without_thoughts(review)
    if isinstance(spoken, Unparsed):
        return spoken
    review, question_text = _columns_in_order(spoken), _columns_in_order(question_text)
    text = plain_text(review)
    if not text.strip():
        return Unparsed("empty")
    if stated := object_scores(review):
        return stated if isinstance(stated, Unparsed) else _verdict_of([_Reading(scores) for scores in stated], text)
    embedded = embedded_scores(review, question_text)
    if isinstance(embedded, Unparsed):
        return embedded
    quoted = plain_text(question_text)
    text = without_asides(without_quotes(text, quoted))
    text = _COMMA_LABELLED.sub(r"\1\2.\3", _TURNED.sub(_in_turn, text))
    readings = _lines(text) + _tuples(text) + _stated_pairs(text) + _labelled(text)
    bars = without_quotes(EMPHASIS.sub("", review.translate(PLAIN)), quoted)
    readings += _tables(bars) + _rows_of_assistants(bars)
    readings += [_Reading(scores) for scores in embedded]
    return _verdict_of(readings or _prose(text), text)


def _verdict_of(readings: list[_Reading], text: str) -> Verdict | Unparsed:
    """What readings of a review say together."""
    if not readings:
        return Unparsed("no_scores")
    decisive = [r for r in readings if r.first or r.final] if any(r.final for r in readings) else readings
    if len({(r.scores, r.scale) for r in decisive}) > 1 or all(r.is_unsure for r in decisive):
        return Unparsed("ambiguous")
    reading = decisive[0]
    if not reading.scale or not all(_in_range(side, reading, text) for side in (0, 1)):
        return Unparsed("out_of_range")
    return Verdict.of_scores(*reading.scores)


# --- readings


def _lines(text: str) -> list[_Reading]:
    """Two scores and nothing else on a line: among the first three lines that are not empty, or the last two."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    lines[:1] = map(_with_points, lines[:1])  # further down, "1,5 2,5" may be anything
    places = [(i, line) for i, line in enumerate(lines) if i < 3 or i >= len(lines) - 2]
    readings = []
    for i, line in places:
        if i == 0 and (behind := _BEHIND.fullmatch(line)) and behind[4].lower() != behind[8].lower():
            sides = [SIDES[behind[place].lower()] for place in (4, 8)]
            numbers = [_three(behind.groups()[at : at + 3]) for at in (0, 4)]
            if sorted(sides) == [0, 1]:
                ordered = numbers if sides == [0, 1] else numbers[::-1]
                readings.append(_reading((*ordered[0], *ordered[1]), first=i == 0))
                continue
        stated = re.sub(_BOTH, "both", line, flags=re.I)
        *before, end = _SENTENCE.split(stated)  # "I had that the wrong way round. 6 8", "Final: 6 8"
        alone = end if before and (not before[-1].endswith(":") or _FINAL.search(before[-1])) else stated
        first = _FIRST_THEN_TEXT.match(stated) if i == 0 else None
        if match := _LINE.fullmatch(stated) or first or _LINE.fullmatch(alone):
            readings.append(_reading(match.groups(), final=bool(_FINAL.search(stated)), first=i == 0))
        elif match := _LINE_WITH_DASH.fullmatch(stated) or _LINE_WITH_DASH.fullmatch(alone):
            reading = _reading(match.groups(), final=bool(_FINAL.search(stated)), first=i == 0)
            each_of_ten = any(match.groups()[1:3]) and any(match.groups()[4:])
            readings.append(replace(reading, is_unsure=not each_of_ten))
    alone = [match for line in lines[:2] if (match := _SINGLE.fullmatch(line))]
    if not readings and len(alone) == 2:  # one below the other
        readings.append(_reading(alone[0].groups() + alone[1].groups(), first=True))
    return readings


def _with_points(line: str) -> str:
    """A line of two numbers, with its decimal commas as points."""
    match = _COMMA_PAIR.fullmatch(line)
    if match is None or "," not in line:
        return line
    return re.sub(r" (?:und|et|y|e) ", " and ", re.sub(r"(?<=\d),(?=\d)", ".", line))


def _in_turn(match: re.Match[str]) -> str:
    """The scores of the second and the first assistant, told as those of the first and the second."""
    _, one, *scales_1, two, scale_2, scale_3 = match.groups()
    scales = [next((f"/{scale}" for scale in both if scale), "") for both in (scales_1, (scale_2, scale_3))]
    return f"Assistant 1 and 2{match['between']}{two}{scales[1]} and {one}{scales[0]}"


def _tables(text: str) -> list[_Reading]:
    """The rows of totals in tables that have a column for each assistant, their bars still there: an empty cell tells
    the columns apart.
    """
    readings: list[_Reading] = []
    columns: list[int] | None = None
    for line in text.split("\n"):
        cells = _cells(line)
        heads = _heads(cells)
        columns = heads or (columns if len(cells) > 2 else None)
        if columns is None or heads or max(columns) >= len(cells) or not (cells[0] and _TOTAL_ROW.fullmatch(cells[0])):
            continue
        one, two = (_SINGLE.fullmatch(cells[at]) for at in columns)
        if one and two:
            is_final = bool(re.match("total|overall|final", cells[0], re.I))
            readings.append(_reading(one.groups() + two.groups(), final=is_final))
    return readings


def _rows_of_assistants(text: str) -> list[_Reading]:
    """The columns of totals in tables that have a row for each assistant, and several columns of numbers."""
    readings: list[_Reading] = []
    head: list[str] = []
    rows: dict[int, list[str]] = {}
    for cells in map(_cells, text.split("\n")):
        if (label := _HEAD.fullmatch(cells[0])) is None:
            head, rows = (cells, {}) if any(re.search(r"\w", cell) for cell in cells) else (head, rows)
            continue
        rows[SIDES[label[1].lower()]] = cells
        if len(rows) < 2 or not len(head) == len(rows[0]) == len(rows[1]) > 2:
            continue
        for at, name in enumerate(head):
            one, two = (_SINGLE.fullmatch(rows[side][at]) for side in (0, 1))
            if at and name and _TOTAL_ROW.fullmatch(name) and one and two:
                is_final = bool(re.match("total|overall|final", name, re.I))
                readings.append(_reading(one.groups() + two.groups(), final=is_final))
    return readings


def _columns_in_order(text: str) -> str:
    """The text with the column of Assistant 1 before that of Assistant 2 in its tables."""
    lines, columns = text.split("\n"), None
    for number, line in enumerate(lines):
        cells = _cells(line)
        columns = _heads([EMPHASIS.sub("", cell.translate(PLAIN)) for cell in cells]) or (
            columns if len(cells) > 1 else None
        )
        if columns and columns[0] > columns[1] and columns[0] < len(cells):
            one, two = columns
            cells[one], cells[two] = cells[two], cells[one]
            lines[number] = f"| {' | '.join(cells)} |"
    return "\n".join(lines)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _heads(cells: Sequence[str]) -> list[int] | None:
    """The columns of Assistant 1 and 2 in the head of a table; None where it is none."""
    sides = {SIDES[m[1].lower()]: at for at, cell in enumerate(cells) if (m := _HEAD.fullmatch(cell))}
    return [sides[0], sides[1]] if len(sides) == 2 else None


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
        sides = [SIDES[entry[2].lower()] for entry in (one, two)]
        if sorted(sides) != [0, 1] or two.start() - one.end() > 600:
            continue
        numbers = [_three(entry.groups()[3:]) for entry in (one, two)]  # the first three are the words and the label
        above = "\n".join(text[max(0, one.start() - 160) : one.start()].rstrip().split("\n")[-2:])
        told = any(entry["word"] or entry["word2"] for entry in (one, two)) or any(any(n[1:]) for n in numbers)
        ends = not text[: one.start()].strip() or "\n" not in text[two.end() :].strip()
        counted = _COUNTED.search(above + one[0])
        is_plausible = all(LOWEST <= float(number[0] or 0) <= HIGHEST for number in numbers)
        if told or _TUPLE_WORD.search(above) or (ends and is_plausible and not counted):
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
            labels = {SIDES[m[1].lower()] for m in re.finditer(_LABEL, clause, re.I)}
            numbers = [_three(match.groups()) for match in _GIVEN.finditer(clause)]
            if not numbers and labels:  # "... and Assistant 2 a 9", "8 for Assistant 1"
                match = re.search(rf"(?:\ba|\ban)? ?{_ALONE} (?:to|for) {_LABEL}", clause, re.I)
                numbers = [_three(match.groups()[:3])] if match else []
            if not labels and header and len(others) == 1:
                labels = {SIDES[header[1].lower()]}
            if len(labels) == 1 and len(numbers) == 1:
                stated[labels.pop()].add(numbers[0])
    if not all(stated.values()):
        return []
    return [_reading((*one, *two)) for one in stated[0] for two in stated[1]]


def _three(groups: Sequence[str | None]) -> tuple[str | None, ...]:
    """The number and its scale out of a pattern's alternatives, of which one has matched."""
    return next(tuple(groups[i : i + 3]) for i in range(0, len(groups), 3) if groups[i] is not None)


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
    silent = rf"\b{NAME} {('(?:1|a)', '(?:2|b)')[side]}\b[^.]{{0,80}}{_NO_ANSWER}"
    return bool(re.search(rf"{silent}|\b(?:scores?|rating) of (?:0|zero)\b", text, re.I))
