"""The right answers of lm-eval's documents: read before a model is, and told where no choice is one.

lm-eval reads them when it scores. A row whose answer it cannot read would end a run after the model has answered; one
whose answer is no choice (a test set with its labels taken out, `-1`) is wrong whatever the model says, with a line in
the log. Here the first is refused by its row, and the second is counted beside the score, which stays lm-eval's.
"""

from __future__ import annotations

from typing import Any

from almost_eval.errors import InputError


def check_answer(task: Any, doc: Any) -> None:
    """Read the answer of a document as `process_results` will.

    Raises:
        InputError: it cannot be read.
    """
    if _scores_itself(task):
        return
    try:
        gold = task.doc_to_target(doc)
        if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input and not isinstance(gold, int | str | list):
            raise TypeError(f"{gold!r} is no number of a choice, and no text of one")
    except Exception as error:  # a task's own code may raise anything
        problem = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"lm-eval cannot read the right answer of {task.task_name} ({type(error).__name__}: {problem}); mend the "
            "row"
        ) from None


def has_no_right_choice(task: Any, doc: Any) -> bool:
    """Whether no choice of a document is its answer, so that lm-eval counts it as wrong in any case."""
    if task.OUTPUT_TYPE != "multiple_choice" or _scores_itself(task):
        return False
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    answers = gold if isinstance(gold, list) else [gold]
    return not any(
        answer in choices if isinstance(answer, str) else isinstance(answer, int) and 0 <= answer < len(choices)
        for answer in answers
    )


def _scores_itself(task: Any) -> bool:
    """Whether the task has code of its own in the place of lm-eval's `process_results`."""
    config = getattr(task, "config", None)
    return config is None or callable(getattr(config, "process_results", None)) or config.doc_to_target is None
