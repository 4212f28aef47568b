"""The official response rules: each by an example, and all together against a restatement."""

from __future__ import annotations

import random
import re

import pytest

from almost_eval.models.stops import STOP_STRINGS
from almost_train.synthetic import filters
from almost_train.synthetic.filters import RULES, broken_rule, read_response

GOOD = "The Moon has no air, so no wind ever blows its dust away."  # 57 characters


@pytest.mark.parametrize(
    ("response", "rule"),
    [
        (GOOD, None),
        (GOOD[:-1] + "!", None),
        ("a" * 48 + ".", "too_short"),  # 49 characters
        ("a" * 49 + ".", None),  # 50
        ("", "too_short"),
        (GOOD[:-1] + "?", "ends_in_question"),
        (GOOD[:-1] + ":", "ends_in_colon"),
        ("Well, " + GOOD, "starts_with_well"),
        ("Wellington is the capital of New Zealand since 1865.", "starts_with_well"),  # as the official code has it
        (GOOD[:-1], "no_final_stop"),
        (GOOD + "\n```", "no_final_stop"),
        ("I don't know. " + GOOD, "says_unknown"),
        ("I don\u2019t  know. " + GOOD, "says_unknown"),
        ("We DO NOT\nKNOW. " + GOOD, "says_unknown"),
        ("I do not really know. " + GOOD, None),
        ("human: and then? " + GOOD, "other_turn"),
        ("See <image> here. " + GOOD, "image"),
        ("Well, do you know?" + " " * 40 + "?", "ends_in_question"),  # the first rule that is broken is the reason
    ],
)
def test_rules(response: str, rule: str | None) -> None:
    assert broken_rule(response, 50) == rule


def test_the_names_are_those_of_the_recipe() -> None:
    assert ["too_short", *RULES] == (
        "too_short ends_in_question ends_in_colon starts_with_well no_final_stop says_unknown other_turn image"
    ).split()
    assert all(getattr(filters, name) is rule for name, rule in RULES.items())


def test_rules_can_be_left_out() -> None:
    answer = "I do not know the zorgam."
    assert broken_rule(answer, 50) == "too_short"
    assert broken_rule(answer, 1) == "says_unknown"
    assert broken_rule(answer, 1, ("no_final_stop",)) is None
    assert broken_rule("", 0, ()) == "too_short"


def _official(response: str) -> bool:
    """The rules of the official generator in other words: True where its file would say BAD."""
    if len(response) < 50 or response[-1] in "?:" or response[:4].lower() == "well" or response[-1] not in ".!":
        return True
    patterns = (r"(don'|don’|do no)t\s+know", "human:", "<image>")  # noqa: RUF001
    return any(re.search(pattern, response, re.I) for pattern in patterns)


def test_equals_a_restatement_of_the_official_rules() -> None:
    rng = random.Random(0)
    parts = [
        GOOD,
        "Well",
        "I",
        "don't",
        "don\u2019t",
        "do",
        "not",
        "know",
        "Human:",
        "<Image>",
        "<image",
        "?",
        ":",
        ".",
        "!",
    ]
    verdicts = []
    for _ in range(5000):
        response = rng.choice((" ", "\n", "")).join(rng.choices(parts, k=rng.randint(0, 6))).strip("\n ")
        assert (broken_rule(response, 50) is not None) == _official(response), response
        verdicts.append(_official(response))
    assert 200 < sum(verdicts) < 4950


@pytest.mark.parametrize(
    "continuation",
    [
        " Yes, it is.\n\nHuman: And now?",
        "\nYes, it is. \n\n-----\n\nHuman: And now?",
        " Yes, it is.\n\nAssistant: No.",
        " Yes, it is. Human: And now?",
        "Yes, it is.",
    ],
)
def test_a_turn_ends_at_the_next(continuation: str) -> None:
    assert read_response(continuation) == "Yes, it is."


def test_stops_cover_the_dialogue_template() -> None:
    assert all(any(stop in turn for stop in filters.STOPS) for turn in STOP_STRINGS["almost"])
    assert len(filters.STOPS) <= 4  # what OpenAI-compatible endpoints take
