"""The compared systems and their answers: read from a file, or written by a model (see `model_system.py`).

The lines are FastChat's answer JSONL, so a file of one run is a baseline of the next, here or there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from almost_eval.engines.build import EngineOptions
from almost_eval.errors import InputError
from almost_eval.files import write_rows
from almost_eval.judge.model_system import ModelSystem, Sampling
from almost_eval.judge.questions import answer_line, over_long, read_answers
from almost_eval.judge.records import Answer, Answers, AnswerTurn, Question
from almost_eval.models.reasoning import split_reasoning
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.types import JSONMapping, JSONObject

MAX_ANSWER_CHARS = 100_000
"""Characters of the longest answer that is judged as it is: some 25,000 tokens, of which a judge reads two."""

ALL_CHOICES = "all"
"""The choice that takes each of a file's answers to a question."""

AnswerReasoning = Literal["strip", "keep", "refuse"]
"""What becomes of thoughts in an answer that is judged."""


class System(Protocol):
    """One of the systems that are compared."""

    name: str
    """As it stands in reviews, tables and file names; unique in a run."""
    notes: list[str]
    """What the reader of the results must know of its answers."""

    def spec(self) -> JSONObject:
        """What decides its answers, as JSON."""
        ...

    def known(self) -> Answers | None:
        """Its answers where they are there already; None where a model has yet to write them."""
        ...

    def write(self, file: Path, progress: Progress) -> Answers:
        """Its answers to all questions; those that `file` lacks are made and appended, each before the next."""
        ...


class ArchivedSystem:
    """Answers out of a FastChat answer file.

    Args:
        path: JSONL.
        questions: what must be answered, each once.
        subset: the questions are the first few of a file, so answers to others are passed over.
        limit: characters of the longest answer that is taken; None where answers will be cut on purpose.
        reasoning: what becomes of thoughts in its answers; see `less_thoughts`.
        choice: which answer is taken where the file holds several to a question, from 1; None takes all.

    Raises:
        DataError: the file does not answer exactly these questions; see `read_answers`.
        InputError: an answer beyond `limit`.
    """

    def __init__(
        self,
        path: Path,
        questions: Sequence[Question],
        *,
        limit: int | None = MAX_ANSWER_CHARS,
        subset: bool = False,
        reasoning: AnswerReasoning = "strip",
        choice: int | None = 1,
    ) -> None:
        self.name, answers = read_answers(path, questions, subset=subset, choice=choice)
        self._answers = {id: less_thoughts(answer, reasoning) for id, answer in answers.items()}
        self.notes = []
        if many := [answer.metadata["choices"] for answer in answers.values() if "choices" in answer.metadata]:
            which = "each is judged" if choice is None else f"number {choice} is judged"
            self.notes.append(
                f"{self.name}: the file holds up to {max(many)} answers to a question; {which} (--choice)"
            )
        self._questions = questions
        if limit is not None and (long := over_long(self._answers, limit)):
            longest = max(len(turn) for id in long for one in self._answers[id].choices for turn in one.turns)
            raise InputError(
                f"{path}: {len(long)} answers are longer than {limit:,} characters (question {long[0]}; the longest "
                f"has {longest:,}); cut them with --max-answer-chars N, or leave them out"
            )

    def spec(self) -> JSONObject:
        """Name and digest: where the file lies decides nothing."""
        return {"name": self.name, "source": "file", "digest": digest_answers(self._answers)}

    def known(self) -> Answers:
        """All of them."""
        return self._answers

    def write(self, file: Path, progress: Progress) -> Answers:
        """A copy in the run folder, so that it holds all that its numbers were made of."""
        write_rows(file, [answer_line(self._answers[q.id], q) for q in self._questions], ascii_only=True)
        return self._answers


def open_system(
    name: str,
    questions: Sequence[Question],
    sampling: Sampling,
    options: EngineOptions | None = None,
    *,
    limit: int | None = MAX_ANSWER_CHARS,
    subset: bool = False,
    reasoning: AnswerReasoning = "strip",
    choice: int | None = 1,
) -> System:
    """What `--model`, `--baseline` and `--models` name: an answer file where there is one of that name, else a model.

    Raises:
        InputError: see `ArchivedSystem` and `ModelSystem`.
    """
    if is_answer_file(name):
        return ArchivedSystem(Path(name), questions, limit=limit, subset=subset, reasoning=reasoning, choice=choice)
    return ModelSystem(name, questions, sampling, options)


def less_thoughts(answer: Answer, reasoning: AnswerReasoning) -> Answer:
    """An answer as it is judged: `strip` moves a thought into its metadata, `keep` leaves it in the text.

    Raises:
        InputError: it holds a thought, and `reasoning` is `refuse`.
    """
    if reasoning == "keep":
        return answer
    turns = [_less_thought(answer, turn, reasoning) for turn in answer.answered]
    others = tuple(less_thoughts(other, reasoning) for other in answer.others)
    return replace(answer.of_turns(turns), others=others)


def _less_thought(answer: Answer, turn: AnswerTurn, reasoning: AnswerReasoning) -> AnswerTurn:
    split = split_reasoning(turn.text)
    if split.thought is None:
        return turn
    if reasoning == "refuse":
        raise InputError(
            f"{answer.model}, question {answer.question_id}: the answer holds thinking; give --answer-reasoning strip "
            "to judge what follows it, or keep"
        )
    about: JSONMapping = {
        **turn.metadata,
        "reasoning": split.thought,
        "reasoning_characters": len(turn.text) - len(split.answer),
        **({"reasoning_cut": True} if split.is_cut else {}),
    }
    return AnswerTurn(split.answer, about)


def is_answer_file(name: str) -> bool:
    """Whether a system is an answer file. A missing one is not looked for on the hub, where no model ends so."""
    return name.endswith((".jsonl", ".json")) or Path(name).is_file()


def distinct(systems: Sequence[System]) -> Sequence[System]:
    """The systems, once no two of them bear one name.

    Raises:
        InputError: two do, so that no table could tell them apart.
    """
    names = [system.name for system in systems]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(
            f"two of the systems are called {twice!r}; rename a checkpoint's folder, or the model_id of an answer file"
        )
    return systems


def answer_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """`answers/<system>.jsonl` of each system, the characters that file names lack replaced."""
    readable = ["".join(c if c.isalnum() or c in "+-_." else "_" for c in name)[:80] for name in names]
    return [
        folder / "answers" / f"{name}{f'-{i}' if readable.count(name) > 1 else ''}.jsonl"
        for i, name in enumerate(readable)
    ]


def digest_answers(answers: Mapping[str, Answer]) -> str:
    """sha256 over (question id, texts) in the order of the ids: what was judged, whoever wrote the lines and when."""
    texts = sorted((question, *one.turns) for question, answer in answers.items() for one in answer.choices)
    return provenance.digest({"answers": texts})


def question_line(question: Question) -> JSONObject:
    """A line of a question file, as FastChat's: `read_questions` gives the question back."""
    if question.later:
        line = {"question_id": question.id, "category": question.category, "turns": list(question.turns)}
        has_reference = any(reference is not None for reference in question.references)
        return line | ({"reference": list(question.references)} if has_reference else {})
    line = {"question_id": question.id, "text": question.text, "category": question.category}
    return line | ({"reference": question.reference} if question.reference is not None else {})
