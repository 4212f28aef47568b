"""The reference answers of MT-Bench that are listed as wrong, each right answer found anew by computing."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest

from almost_eval.data.sources import DataSource, find_data
from almost_eval.errors import DataError
from almost_eval.files import read_rows
from almost_eval.judge import fastchat as references
from almost_eval.judge.fastchat import corrected, known_wrong, wrong_reference, wrong_turns
from almost_eval.judge.questions import find_questions
from almost_eval.judge.records import Question, QuestionTurn

LISTED = {(wrong.question_id, wrong.turn): wrong for wrong in known_wrong().values()}
DAVID = Question(
    "104",
    "David has three sisters. Each of them has one brother. How many brothers does David have?",
    "reasoning",
    "David has only one brother.",
    (
        QuestionTurn(
            "If we change the previous question and assume that each sister of David has two brothers, how many "
            "brothers would David have?",
            "If each of David's sisters has two brothers, then David would have two brothers.",
        ),
    ),
)
"""With the references that FastChat has."""


def says(question: int, turn: int) -> str:
    return LISTED[str(question), turn].corrected


def test_every_row_is_whole() -> None:
    rows = read_rows(Path(references.__file__).with_name("mt_bench_references.jsonl"))
    assert len(rows) == len(known_wrong()) == len(LISTED) == 22
    for row in rows:
        assert set(row) == {"question_id", "turn", "category", "sha256", "wrong", "corrected", "source"}
        assert row["category"] in ("math", "reasoning", "coding")
        assert 101 <= row["question_id"] <= 130
        assert row["turn"] in (1, 2)
        assert row["source"].startswith("https://github.com/")
        assert row["wrong"].endswith(".")
        assert row["corrected"]


def test_a_listed_reference_is_known_by_its_text() -> None:
    assert wrong_turns(DAVID, (1, 2)) == [1, 2]
    wrong = wrong_reference(DAVID, 1)
    assert wrong is not None
    assert wrong.source == "https://github.com/lm-sys/FastChat/issues/3053"
    mended = corrected(DAVID)
    assert mended.references == (says(104, 1), says(104, 2))
    assert mended.turns == DAVID.turns
    assert wrong_turns(mended, (1, 2)) == []
    own = DAVID.with_references(["David has no brother.", None])
    assert corrected(own) is own
    assert wrong_turns(own, (1, 2)) == []


# --- reasoning: every arrangement is tried


def test_the_secretary() -> None:
    people, colours = ("Alice", "Bert", "Cheryl", "David", "Enid"), ("yellow", "green", "purple", "red", "blue")

    def between(one: int, middle: int, other: int) -> bool:
        return one < middle < other or other < middle < one

    fitting = [
        (who, what)
        for who in itertools.permutations(people)
        for what in itertools.permutations(colours)
        if what[0] == "red"
        and what[4] == "purple"
        and between(what.index("red"), what.index("blue"), what.index("green"))
        and what[3] == "yellow"  # the secretary's place is the fourth
        and abs(who.index("Alice") - who.index("David")) == 1
        and what[who.index("Enid")] == "green"
        and between(who.index("Cheryl"), who.index("Bert"), who.index("Enid"))
        and who[4] == "David"
    ]
    assert fitting == [(("Cheryl", "Bert", "Enid", "Alice", "David"), ("red", "blue", "green", "yellow", "purple"))]
    assert says(105, 1).startswith("The secretary is Alice.")
    assert "Cheryl, Bert, Enid, Alice, David" in says(105, 1)
    assert ("105", 2) not in LISTED  # the order of the colours is published as it is


def test_three_generations() -> None:
    father_of = {"C": "B", "B": "A"}  # the first turn
    # C is the son of D, a father; E is the son of D, and of X, a father.
    d = father_of["C"]
    x = father_of["E"] = d
    father_of |= {"Y": x, "Z": "Y"}
    generations, one = 0, "Z"
    while one != "A":
        one, generations = father_of[one], generations + 1
    assert generations == 3
    assert says(107, 2).startswith("A is three generations above Z.")


def test_shadows_and_brothers() -> None:
    right_hand_of = {"north": "east", "east": "south", "south": "west", "west": "north"}
    shadow = "west"  # the sun is in the east
    assert [faced for faced, right in right_hand_of.items() if right == shadow] == ["south"]
    assert says(109, 1).startswith("West.")
    assert says(109, 2).startswith("South.")
    assert [2 - 1, 1 - 1] == [1, 0]  # brothers of a sister, less David
    assert says(104, 1).startswith("David has no brother.")
    assert says(104, 2) == "David has one brother."


# --- math


def test_the_triangle_and_its_circle() -> None:
    (ax, ay), (bx, by), (cx, cy) = corners = [(0, 0), (-1, 1), (3, 3)]
    area = Fraction(abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay)), 2)
    assert area == 3
    sides = [math.dist(one, other) for one, other in itertools.combinations(corners, 2)]
    radius = math.prod(sides) / (4 * float(area))
    assert math.isclose(math.pi * radius**2, 5 * math.pi)
    assert says(111, 1).startswith("The area is 3")
    assert says(111, 2).startswith("The area is 5 pi.")


def test_chances() -> None:
    rolls = [one + other for one in range(1, 7) for other in range(1, 7)]
    at_least_3 = Fraction(sum(total >= 3 for total in rolls), 36)
    assert at_least_3 == Fraction(35, 36)
    assert all(total >= 3 or total % 2 == 0 for total in rolls)
    assert says(114, 1).startswith("35/36.")
    assert says(114, 2).startswith("100 %.")
    green_alone, both = 45 - 22, 22
    assert green_alone + both == 45  # so nobody who likes green likes neither
    assert says(113, 2).startswith("0 %.")


def test_the_root() -> None:
    def f(x: float) -> float:
        return 4 * x**3 - 9 * x - 14

    assert f(2) == 0
    assert round(f(1.65), 1) == -10.9  # the published root
    assert all(math.isclose((x - 2) * (4 * x**2 + 8 * x + 7), f(x)) for x in (-3.0, 0.5, 7.0))
    assert 8**2 - 4 * 4 * 7 == -48
    assert says(120, 2).startswith("x = 2.")


# --- coding: what the published functions do is written out, as they are other people's words


def test_common_subsequence_with_a_table_of_none() -> None:
    table: list[list[int | None]] = [[None] * 2 for _ in range(2)]
    with pytest.raises(TypeError):
        table[1][1] = table[0][0] + 1  # type: ignore[operator]  # what it does for "a" and "a"
    assert "TypeError" in says(124, 2)


def test_full_trees() -> None:
    @cache
    def trees(nodes: int, children: int) -> int:
        """Trees whose inner nodes all have so many children, by taking the root away."""
        if nodes == 1:
            return 1
        parts = itertools.product(range(1, nodes), repeat=children)
        return sum(math.prod(trees(n, children) for n in part) for part in parts if sum(part) == nodes - 1)

    assert [trees(n, 2) for n in (1, 3, 5, 7, 9)] == [1, 1, 2, 5, 14]
    assert [trees(n, 3) for n in (1, 4, 7, 10)] == [1, 1, 3, 12]
    assert trees(4, 2) == trees(6, 3) == 0
    assert "1, 1, 2, 5, 14 for n = 1, 3, 5, 7, 9" in says(128, 1)
    assert "1, 1, 3, 12 for n = 1, 4, 7, 10" in says(128, 2)


def test_two_counters_do_not_find_the_two_most_frequent() -> None:
    array = [1, 1, 2, 2, 3, 3, 1, 2, 3, 4, 5]  # the published example
    counts: dict[int, int] = {}
    for number in array:
        if number in counts or len(counts) < 2:
            counts[number] = counts.get(number, 0) + 1
        else:
            counts = {kept: count - 1 for kept, count in counts.items() if count > 1}
    assert all(Counter(array)[number] == 1 for number in counts)
    assert {number for number, count in Counter(array).items() if count == 3} == {1, 2, 3}


def test_median_in_one_walk() -> None:
    def median(one: list[int], other: list[int]) -> float:
        i = j = 0
        last, before = 0, 0
        for _ in range((len(one) + len(other)) // 2 + 1):
            before = last
            if j == len(other) or (i < len(one) and one[i] < other[j]):
                last, i = one[i], i + 1
            else:
                last, j = other[j], j + 1
        return last if (len(one) + len(other)) % 2 else (last + before) / 2

    assert median([1, 3], [2]) == 2
    assert median([1, 2], [3, 4, 5, 6]) == 3.5
    assert "(n1 + n2) // 2 + 1 steps" in says(126, 1)


# --- the published file


@pytest.fixture
def published(data_root: Path) -> DataSource:
    data = find_data("hub", data_root)
    try:
        find_questions("mt-bench", data)
    except DataError as error:
        pytest.skip(f"MT-Bench and its reference answers are not at hand: {error}")
    return data


def test_the_published_file_holds_what_is_listed(published: DataSource) -> None:
    questions, _ = find_questions("mt-bench", published)
    listed = {(q.id, turn) for q in questions for turn in wrong_turns(q, (1, 2))}
    assert listed == set(LISTED)
    assert {q.id for q in questions if any(q.references)} == {str(id) for id in range(101, 131)}
    mended, digest = find_questions("mt-bench", published, reference="corrected")
    assert digest != find_questions("mt-bench", published)[1]
    assert not any(wrong_turns(q, (1, 2)) for q in mended)
    assert json.dumps([q.turns for q in mended]) == json.dumps([q.turns for q in questions])
