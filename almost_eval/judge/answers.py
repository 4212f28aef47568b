"""The compared systems and their answers: read from a file, or sampled from a model and kept line by line.

Answers are sampled as FastChat samples them (temperature 0.7, 1,024 new tokens), but each from a generator of its own,
keyed by seed and prompt: neither batching nor a kill changes a draw. The lines are FastChat's answer JSONL, so a
file of one run is a baseline of the next, here or there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions, generation_engine
from almost_eval.errors import InputError, RunError, StoreError, TemplateError
from almost_eval.files import LineWriter, read_records, repair_end, write_rows
from almost_eval.judge.questions import answer_line, over_long, read_answers
from almost_eval.judge.records import Answer, Question
from almost_eval.models.chat import ChatTemplate, load_template, special_tokens
from almost_eval.models.reasoning import split_reasoning
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.run.texts import split_completion, unscored_reason
from almost_eval.tasks.base import ReasoningRule
from almost_eval.types import JSONObject, Message

MAX_ANSWER_CHARS = 100_000
"""Characters of the longest answer that is judged as it is: some 25,000 tokens, of which a judge reads two."""

_ADVICE = "what was answered is kept: the same command goes on"

AnswerReasoning = Literal["strip", "keep", "refuse"]
"""What becomes of thoughts in an answer that is judged."""

Answers = dict[str, Answer]
"""Question id -> answer."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn. The defaults are the official ones."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    template: str = "auto"
    """See `load_template`; its stop strings end an answer."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, besides the template's own and EOS."""
    reasoning: ReasoningRule = "strip"
    """What becomes of a thought before an answer; what is stripped is kept in the answer's metadata."""


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
        choice: which answer is taken where the file holds several to a question, from 1.

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
        choice: int = 1,
    ) -> None:
        self.name, answers = read_answers(path, questions, subset=subset, choice=choice)
        self._answers = {id: less_thoughts(answer, reasoning) for id, answer in answers.items()}
        self.notes = []
        if many := [answer.metadata["choices"] for answer in answers.values() if "choices" in answer.metadata]:
            self.notes.append(
                f"{self.name}: the file holds up to {max(many)} answers to a question; number {choice} is judged "
                "(--choice)"
            )
        self._questions = questions
        if limit is not None and (long := over_long(self._answers, limit)):
            longest = max(len(self._answers[question].text) for question in long)
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


class ModelSystem:
    """Answers that a model writes. Loads no weights until `write`.

    Args:
        model: a checkpoint directory, hub id or built-in name; for the engine `openai` the name it serves.
        questions: one user turn each.
        sampling: how to draw.
        options: which engine, and how.

    Raises:
        InputError: a prompt leaves no room for `max_new_tokens`; whatever the engine refuses.
        TemplateError: see `load_template`.
    """

    def __init__(
        self,
        model: str,
        questions: Sequence[Question],
        sampling: Sampling,
        options: EngineOptions | None = None,
    ) -> None:
        self.name = Path(model).name if Path(model).is_dir() else model
        self.notes: list[str] = []
        self._questions = questions
        self._sampling = sampling
        engine: Any = generation_engine(model, options)
        self.engine = engine
        tokenizer = getattr(engine, "tokenizer", None)
        self.template: ChatTemplate | None = load_template(sampling.template, tokenizer)
        self._tokens = special_tokens(tokenizer) if tokenizer is not None else {}
        self.prompts = [self._render(question, self._tokens) for question in questions]
        self._refuse_long()
        checkpoint = getattr(engine, "checkpoint", None)
        self._spec = {
            "name": self.name,
            "source": "model",
            "architecture": checkpoint.architecture if checkpoint else None,
            "weight_digest": checkpoint.weight_digest() if checkpoint else None,
            "model_files": checkpoint.file_digests() if checkpoint else None,
            "engine": engine.settings(),
            "template": self.template.to_dict() if self.template else None,
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": sampling.max_new_tokens,
                "seed": sampling.seed,
                "stop": list(self._stop),
                **({} if sampling.reasoning == "strip" else {"reasoning": sampling.reasoning}),
            },
        }

    @property
    def _stop(self) -> tuple[str, ...]:
        return (*(self.template.stop if self.template else ()), *self._sampling.stop)

    def spec(self) -> JSONObject:
        """Weights, engine, template and sampling."""
        return self._spec

    def adopt_date(self, stored: JSONObject) -> None:
        """Let the template write the time that it wrote when the run began, of whose spec `stored` is the part."""
        now = (stored.get("template") or {}).get("now")
        if self.template is not None and self.template.now and now:
            self.template = replace(self.template, now=now)
            self.prompts = [self._render(question, self._tokens) for question in self._questions]
            self._spec["template"] = self.template.to_dict()

    def known(self) -> None:
        """None: they are yet to be written."""
        return

    def write(self, file: Path, progress: Progress) -> Answers:
        """Sample what `file` lacks; a line is on disk before the next answer is waited for.

        Raises:
            StoreError: `file` holds lines that this run did not write.
            RunError: out of memory, or the disk is full.
        """
        by_id = {question.id: question for question in self._questions}
        repair_end(file)
        answers = _kept(read_records(file, _answer, "an answer"), file, by_id)
        todo = [i for i, question in enumerate(self._questions) if question.id not in answers]
        if todo:
            params = SamplingParams(
                max_new_tokens=self._sampling.max_new_tokens,
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                stop=self._stop,
                seed=self._sampling.seed,
            )
            with (
                LineWriter(file, ascii_only=True, advice=_ADVICE) as lines,
                progress.track(f"answers of {self.name}", len(by_id), len(answers)) as advance,
            ):
                for place, [completion] in self.engine.stream_completions([self.prompts[i] for i in todo], params):
                    question = self._questions[todo[place]]
                    prompt = self.prompts[todo[place]]
                    part = split_completion(self._sampling.reasoning, prompt, completion)
                    made = {"finish_reason": completion.finish_reason, "sampling": self._spec["sampling"]}
                    if part.thought is not None:
                        made |= {"reasoning": part.thought, "unscored": unscored_reason(self._sampling.reasoning, part)}
                    answer = Answer(question.id, part.answer.strip(), self.name, made)
                    lines.append(answer_line(answer, question))
                    answers[question.id] = answer
                    advance(1)
        if (checkpoint := getattr(self.engine, "checkpoint", None)) and (
            checkpoint.file_digests() != self._spec["model_files"]
            or checkpoint.weight_digest() != self._spec["weight_digest"]
        ):
            raise RunError(f"{self.name} was changed while it answered: remove {file.parent.parent}, and run it again")
        self.engine = None  # two models need not fit in memory at a time
        return {question.id: answers[question.id] for question in self._questions}

    def _render(self, question: Question, tokens: Mapping[str, str]) -> str:
        if self.template is None:
            return question.text
        turn = (Message("user", question.text),)
        try:
            return self.template.render(turn, add_generation_prompt=True, special_tokens=tokens)
        except TemplateError as error:
            raise error.about(f"question {question.id}") from None

    def _refuse_long(self) -> None:
        encoder, context = getattr(self.engine, "encoder", None), getattr(self.engine, "context_length", None)
        if encoder is None or context is None:
            return  # an endpoint tells neither; it refuses by itself
        lengths = [len(ids) for ids in encoder.encode_texts(self.prompts)]
        new = self._sampling.max_new_tokens
        if (longest := max(lengths)) + new > context:
            where = self._questions[lengths.index(longest)].id
            raise InputError(
                f"question {where} takes {longest} tokens, and {new} new ones do not fit the {context} of {self.name}; "
                f"give --max-new-tokens {max(1, context - longest)} or fewer"
            )


def open_system(
    name: str,
    questions: Sequence[Question],
    sampling: Sampling,
    options: EngineOptions | None = None,
    *,
    limit: int | None = MAX_ANSWER_CHARS,
    subset: bool = False,
    reasoning: AnswerReasoning = "strip",
    choice: int = 1,
) -> System:
    """What `--model`, `--baseline` and `--models` name: an answer file where there is one of that name, else a model.

    Raises:
        InputError: see `ArchivedSystem` and `ModelSystem`.
    """
    if is_answer_file(name):
        return ArchivedSystem(Path(name), questions, limit=limit, subset=subset, reasoning=reasoning, choice=choice)
    return ModelSystem(name, questions, sampling, options)


def less_thoughts(answer: Answer, reasoning: AnswerReasoning, *, opened: bool = False) -> Answer:
    """An answer as it is judged: `strip` moves a thought into its metadata, `keep` leaves it in the text.

    Args:
        answer: as the system wrote it.
        reasoning: what is done.
        opened: its prompt ended inside a thought.

    Raises:
        InputError: it holds a thought, and `reasoning` is `refuse`.
    """
    if reasoning == "keep":
        return answer
    split = split_reasoning(answer.text, opened)
    if split.thought is None:
        return answer
    if reasoning == "refuse":
        raise InputError(
            f"{answer.model}, question {answer.question_id}: the answer holds thinking; give --answer-reasoning strip "
            "to judge what follows it, or keep"
        )
    lost = len(answer.text) - len(split.answer)
    kept = {"reasoning": split.thought, "reasoning_characters": lost} | (
        {"reasoning_cut": True} if split.is_cut else {}
    )
    return replace(answer, text=split.answer, metadata={**answer.metadata, **kept})


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
    """sha256 over (question id, text) in the order of the ids: what was judged, whoever wrote the lines and when."""
    texts = sorted((question, answer.text) for question, answer in answers.items())
    return provenance.digest({"answers": texts})


def _kept(rows: Iterable[tuple[int, Answer]], file: Path, questions: Mapping[str, Question]) -> Answers:
    """What an earlier process wrote, by question.

    Raises:
        StoreError: an answer to no question of this run, or a second one.
    """
    answers: Answers = {}
    for number, answer in rows:
        if answer.question_id not in questions or answer.question_id in answers:
            raise StoreError(f"{file}, line {number}: question {answer.question_id} is not asked, or answered twice")
        answers[answer.question_id] = answer
    return answers


def _answer(row: JSONObject) -> Answer:
    return Answer(str(row["question_id"]), str(row["text"]), str(row["model_id"]), row.get("metadata") or {})


def question_line(question: Question) -> JSONObject:
    """A line of a question file, as FastChat's: `read_questions` gives the question back."""
    line = {"question_id": question.id, "text": question.text, "category": question.category}
    return line | ({"reference": question.reference} if question.reference is not None else {})
