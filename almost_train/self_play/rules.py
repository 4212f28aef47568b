"""Self-play's rules: why a candidate cannot win, and why a dialogue ends at a user's turn. Pure, each rule has a name.

The rules are this project's own: the paper's code is not released. They keep typical faults of a vanilla model out of
the demonstrations: it goes on into the next turn, repeats itself, or does not stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from almost_eval.types import Completion
from almost_train.common.held_out import words_of

_TURN = re.compile(r"(?:^|\n)[ \t]*(?:Human|Assistant|User|AI)[ \t]*:|(?:^|\n)-----")
_LOOP_WORDS = 4
_LONGEST_GOODBYE = 12  # words: "thank you" in a longer turn is most often part of a request


def is_empty(text: str) -> bool:
    """Not a single word or digit."""
    return not words_of(text)


def has_another_turn(text: str) -> bool:
    """A line that opens a turn of its own, or the line that ends a dialogue in a document of demonstrations."""
    return bool(_TURN.search(text))


def is_unfinished(completion: Completion) -> bool:
    """Cut by the token budget, or ends in a mark that cannot end a sentence."""
    return completion.finish_reason != "stop" or completion.text.rstrip().endswith((",", ":", ";", "-", "(", "…"))


def repeats_itself(text: str) -> bool:
    """More than half of its runs of four words occur earlier in it."""
    words = words_of(text)
    runs = [words[i : i + _LOOP_WORDS] for i in range(len(words) - _LOOP_WORDS + 1)]
    return len(runs) > _LOOP_WORDS and len(set(runs)) * 2 < len(runs)


def repeats_turn(text: str, turns: Sequence[str]) -> bool:
    """The same words as an earlier turn."""
    words = words_of(text)
    return any(words_of(turn) == words for turn in turns)


def says_goodbye(text: str, phrases: Sequence[str]) -> bool:
    """A short turn without a question that holds one of the phrases, as whole words."""
    words = words_of(text)
    if "?" in text or len(words) > _LONGEST_GOODBYE:
        return False
    said = f" {' '.join(words)} "
    return any(f" {' '.join(words_of(phrase))} " in said for phrase in phrases if words_of(phrase))


CANDIDATE_RULES: dict[str, Callable[[Completion, Sequence[str]], bool]] = {
    "empty": lambda completion, _: is_empty(completion.text),
    "another_turn": lambda completion, _: has_another_turn(completion.text),
    "unfinished": lambda completion, _: is_unfinished(completion),
    "repeats_itself": lambda completion, _: repeats_itself(completion.text),
    "repeats_turn": lambda completion, turns: repeats_turn(completion.text, turns),
}
"""Name -> whether an assistant's candidate breaks the rule, after all turns before it. The first broken one counts."""


def broken_rule(completion: Completion, turns: Sequence[str]) -> str | None:
    """The first rule that an assistant's candidate breaks, or None.

    >>> broken_rule(Completion(" The river,", (), "stop"), ["Where is it?"])
    'unfinished'
    """
    return next((name for name, breaks in CANDIDATE_RULES.items() if breaks(completion, turns)), None)


def end_at_user(completion: Completion, turns: Sequence[str], goodbyes: Sequence[str]) -> str | None:
    """Why the dialogue ends at this turn of the user, or None where it goes on.

    >>> end_at_user(Completion(" Thanks, bye!", (), "stop"), ["Where is it?"], ("bye",))
    'goodbye'
    """
    text = completion.text
    if is_empty(text):
        return "empty"
    if completion.finish_reason != "stop":
        return "too_long"
    if has_another_turn(text):
        return "another_turn"
    if repeats_turn(text, turns):
        return "repeats"
    return "goodbye" if says_goodbye(text, goodbyes) else None
