"""Which responses count: the official rules, each a named predicate, and how a turn is cut out of a continuation.

Source: naver-ai/ALMoST `generator.py`. The order is the official one; a response is rejected for the first rule that
it breaks. The rules are exactly those of the official code, with their faults: "Wellington is the capital." starts with
"well".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from almost_eval.models.stops import first_stop
from almost_train.synthetic.prompt_sets import SEPARATOR

STOPS = (SEPARATOR, "\n\nHuman:", "Human:", "Assistant:")
"""Where an answer is over. `Human:` covers the second, which is there for tokenizers that make it one special token,
unseen in the text. Four, as some endpoints take no more."""

_UNKNOWN = re.compile(r"(?:do not|don['\u2019]t)\s+know", re.IGNORECASE)
_OTHER_TURN = re.compile(r"human:", re.IGNORECASE)
_IMAGE = re.compile(r"<image>", re.IGNORECASE)


def too_short(response: str, min_characters: int) -> bool:
    """Fewer characters than the minimum; an empty response is too short for any bound."""
    return len(response) < max(1, min_characters)


def ends_in_question(response: str) -> bool:
    """The last character is a question mark."""
    return response.endswith("?")


def ends_in_colon(response: str) -> bool:
    """The last character is a colon: a list was announced and never came."""
    return response.endswith(":")


def starts_with_well(response: str) -> bool:
    """The first letters are `well`, in any case."""
    return response.lower().startswith("well")


def no_final_stop(response: str) -> bool:
    """The last character is neither `.` nor `!`: most often the token budget ran out."""
    return not response.endswith((".", "!"))


def says_unknown(response: str) -> bool:
    """Somewhere it says `do not know` or `don't know`."""
    return _UNKNOWN.search(response) is not None


def other_turn(response: str) -> bool:
    """It holds another turn of the human (in other letters than the stop string)."""
    return _OTHER_TURN.search(response) is not None


def image(response: str) -> bool:
    """It holds the mark of a picture."""
    return _IMAGE.search(response) is not None


RULES: dict[str, Callable[[str], bool]] = {
    rule.__name__: rule
    for rule in (ends_in_question, ends_in_colon, starts_with_well, no_final_stop, says_unknown, other_turn, image)
}
"""Name -> True where the response breaks the rule. `too_short`, which takes a bound, comes before them."""


def broken_rule(response: str, min_characters: int, rules: Sequence[str] = tuple(RULES)) -> str | None:
    """The first rule that a response breaks, or None.

    >>> broken_rule("The Moon has no air, so there is no wind to blow the dust away.", 50)
    >>> broken_rule("It depends.", 50)
    'too_short'
    """
    if too_short(response, min_characters):
        return "too_short"
    return next((name for name, broken in RULES.items() if name in rules and broken(response)), None)


def read_response(continuation: str) -> str:
    """The assistant's turn: a continuation up to the next turn or dialogue, without blanks around it."""
    end = first_stop(continuation, STOPS)
    return continuation[:end].strip("\n ")
