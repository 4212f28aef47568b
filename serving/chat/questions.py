"""The questions that the page offers: those of a file, of the built-in world, or a few examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from almost_eval.errors import DataError, InputError
from almost_eval.files import iterate_lines
from serving.chat.toyworld import is_toy, world

NANO_QUESTIONS = 100
EXAMPLES = (
    "Explain how a vaccine works to a ten-year-old.",
    "Write a short, polite e-mail that declines an invitation.",
    "What are three good habits for a calmer morning?",
    "Compare trains and planes for a trip of 600 km.",
)
_KEYS = ("text", "prompt", "question", "turns", "instruction")


def examples_for(models: Sequence[str]) -> tuple[str, ...]:
    """Four questions to begin with: of the built-in world where every model is from it, else general ones."""
    return tuple(_nano(models, ("fact", "advice", "comparison", "list"))) or EXAMPLES


def arena_questions(file: Path | None, models: Sequence[str]) -> list[tuple[str, str]]:
    """(id, text) of each question that the arena can draw.

    Args:
        file: JSON lines with one of the keys `text`, `prompt`, `question`, `turns`, `instruction`; None takes questions
            of the built-in world where every model is from it, else the examples.
        models: what is talked to.

    Raises:
        InputError: the file cannot be read, or a line is no question.
    """
    if file is not None:
        return _read(file)
    nano = [(f"nano-{i}", text) for i, text in enumerate(_nano(models, [None] * NANO_QUESTIONS))]
    return nano or [(f"example-{i}", text) for i, text in enumerate(EXAMPLES)]


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        lines = list(iterate_lines(file))
    except DataError as error:
        raise InputError(f"--questions {file} cannot be read: {error}") from None
    questions = []
    for number, row in lines:
        try:
            text = next(row[key] for key in _KEYS if row.get(key))
            text = text[0] if isinstance(text, list) else text
            questions.append((str(row.get("question_id", row.get("id", number))), str(text)))
        except (AttributeError, StopIteration, LookupError):
            raise InputError(
                f"--questions {file}, line {number} is no question: a JSON object with one of {', '.join(_KEYS)}"
            ) from None
    if not questions:
        raise InputError(f"--questions {file} holds no questions")
    return questions


def _nano(models: Sequence[str], kinds: Sequence[str | None]) -> list[str]:
    """Questions of the built-in world, where all models are from it: they know nothing else."""
    if not is_toy(models):
        return []
    rng = world().generator("almost-chat")
    return list(dict.fromkeys(world().query(rng, "eval", kind).text for kind in kinds))
