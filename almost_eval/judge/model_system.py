"""A model that answers questions: turn by turn, each answer on disk before the next is waited for.

Answers are sampled as FastChat samples them (temperature 0.7, or by category; 1,024 new tokens), but each from a
generator of its own, keyed by seed and prompt: neither batching nor a kill changes a draw. All questions get their
first turn, then all get their second, which follows the model's own answer to the first. A finished answer is a line of
FastChat's answer JSONL; until its last turn is answered, its turns wait in a file beside it (`.turns`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions, generation_engine
from almost_eval.errors import InputError, RunError, StoreError, TemplateError
from almost_eval.files import LineWriter, read_records, read_rows, repair_end, write_rows
from almost_eval.judge.questions import LATER, answer_line
from almost_eval.judge.records import TOO_LONG, Answer, Answers, AnswerTurn, Question
from almost_eval.models.chat import ChatTemplate, load_template, special_tokens
from almost_eval.models.reasoning import opens_thought, split_reasoning
from almost_eval.progress import Progress
from almost_eval.run.texts import split_completion, unscored_reason
from almost_eval.tasks.base import ReasoningRule
from almost_eval.types import Completion, JSONObject, Message

_ADVICE = "what was answered is kept: the same command goes on"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn. The defaults are the official ones."""

    temperature: float = 0.7
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Category of the question -> temperature, instead of `temperature`. MT-Bench's are `fastchat.TEMPERATURES`."""
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    template: str = "auto"
    """See `load_template`; its stop strings end an answer."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, besides the template's own and EOS."""
    reasoning: ReasoningRule = "strip"
    """What becomes of a thought before an answer; what is stripped is kept in the answer's metadata."""


class ModelSystem:
    """Answers that a model writes: a checkpoint directory, hub id or built-in name; for the engine `openai` the name it
    serves. Loads no weights until `write`.

    Raises:
        InputError: a first turn leaves no room for `max_new_tokens`; questions of several turns, and no template that
            could write the dialogue; whatever the engine refuses.
        TemplateError: see `load_template`.
    """

    def __init__(
        self, model: str, questions: Sequence[Question], sampling: Sampling, options: EngineOptions | None = None
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
        if self.template is None and any(question.later for question in questions):
            raise InputError(
                f"{self.name}: without a template nothing says how a dialogue of several turns is written; give "
                "--template, or --turns 1"
            )
        self.prompts = [self._prompt(question) for question in questions]
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
                **({"temperatures": dict(sampling.temperatures)} if sampling.temperatures else {}),
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
            self.prompts = [self._prompt(question) for question in self._questions]
            self._spec["template"] = self.template.to_dict()

    def known(self) -> None:
        """None: they are yet to be written."""
        return

    def write(self, file: Path, progress: Progress, only: Collection[str] | None = None) -> Answers:
        """Sample what `file` lacks; a turn is on disk before the next answer is waited for. In the end the file's lines
        have the order of the questions. `only` has the ids of some; None is all of them.

        Raises:
            StoreError: `file`, or the turns that wait beside it, hold lines that this run did not write.
            RunError: out of memory, or the disk is full.
        """
        repair_end(file)
        questions = [question for question in self._questions if only is None or question.id in only]
        by_id = {question.id: question for question in questions}
        answers = _kept(read_records(file, _answer, "an answer"), file, by_id)
        drafts = file.with_suffix(".turns")
        turns = {id: list(answers[id].answered) if id in answers else [] for id in by_id}
        _take_drafts(read_records(drafts, _draft, "an answer to a turn"), drafts, by_id, answers, turns)
        total, known = sum(len(q.turns) for q in questions), sum(map(len, turns.values()))
        most = max(len(question.turns) for question in questions)
        if known < total:
            with (
                LineWriter(file, ascii_only=True, advice=_ADVICE) as lines,
                LineWriter(drafts, ascii_only=True, advice=_ADVICE) if most > 1 else nullcontext() as waiting,
                progress.track(f"answers of {self.name}", total, known) as advance,
            ):
                for turn in range(1, most + 1):
                    todo = [q for q in questions if len(turns[q.id]) == turn - 1 and len(q.turns) >= turn]
                    for question, answered in self._ask(todo, turns):
                        turns[question.id].append(answered)
                        if len(turns[question.id]) == len(question.turns):
                            answer = Answer(question.id, "", self.name).of_turns(turns[question.id])
                            lines.append(answer_line(answer, question))
                            answers[question.id] = answer
                        elif waiting is not None:
                            waiting.append(_draft_line(question, turn, answered))
                        advance(1)
        _put_in_order(file, list(by_id))
        drafts.unlink(missing_ok=True)  # every turn is in a whole answer now
        self._note_long(answers)
        if (pool := getattr(self.engine, "pool", None)) is not None:
            self.notes += [f"{self.name}: {warning}" for warning in pool.warnings]
        if (checkpoint := getattr(self.engine, "checkpoint", None)) and (
            checkpoint.file_digests() != self._spec["model_files"]
            or checkpoint.weight_digest() != self._spec["weight_digest"]
        ):
            raise RunError(f"{self.name} was changed while it answered: remove {file.parent.parent}, and run it again")
        self.engine = None  # two models need not fit in memory at a time
        return {question.id: answers[question.id] for question in questions}

    def _ask(
        self, questions: Sequence[Question], turns: Mapping[str, list[AnswerTurn]]
    ) -> Iterator[tuple[Question, AnswerTurn]]:
        """The answer to the next turn of each question, in any order; `turns` has those before it."""
        prompts = {question.id: self._prompt(question, turns[question.id]) for question in questions}
        groups: dict[float, list[Question]] = {}
        for question in questions:
            if turns[question.id] and self._leaves_no_room(prompts[question.id]):
                yield question, AnswerTurn("", {"finish_reason": None, "unscored": TOO_LONG})
            else:
                temperature = self._sampling.temperatures.get(question.category, self._sampling.temperature)
                groups.setdefault(temperature, []).append(question)
        for temperature, group in groups.items():
            params = SamplingParams(
                max_new_tokens=self._sampling.max_new_tokens,
                temperature=temperature,
                top_p=self._sampling.top_p,
                stop=self._stop,
                seed=self._sampling.seed,
            )
            for place, [completion] in self.engine.stream_completions([prompts[q.id] for q in group], params):
                yield group[place], self._read(prompts[group[place].id], completion, temperature)

    def _read(self, prompt: str, completion: Completion, temperature: float) -> AnswerTurn:
        """An answer as it is stored: a thought beside it, as the rule says."""
        part = split_completion(self._sampling.reasoning, prompt, completion)
        stated = {key: value for key, value in self._spec["sampling"].items() if key != "temperatures"}
        sampling = stated | {"temperature": temperature}
        made: JSONObject = {"finish_reason": completion.finish_reason, "sampling": sampling}
        if part.thought is not None:
            made |= {"reasoning": part.thought, "unscored": unscored_reason(self._sampling.reasoning, part)}
        return AnswerTurn(part.answer.strip(), made)

    def _prompt(self, question: Question, before: Sequence[AnswerTurn] = ()) -> str:
        """What the model reads for the turn after those that are answered: its own answers, less their thoughts.

        Raises:
            TemplateError: the template cannot write the dialogue.
        """
        if self.template is None:
            return question.text
        dialogue: list[Message] = []
        try:
            for text, answer in zip(question.turns, before, strict=False):
                dialogue.append(Message("user", text))
                own = answer.text
                if self._sampling.reasoning == "keep":
                    own = split_reasoning(own, opens_thought(self._render(dialogue))).answer.strip()
                dialogue.append(Message("assistant", own))
            return self._render([*dialogue, Message("user", question.turns[len(before)])])
        except TemplateError as error:
            raise error.about(f"question {question.id}") from None

    def _render(self, dialogue: Sequence[Message]) -> str:
        assert self.template is not None
        return self.template.render(tuple(dialogue), add_generation_prompt=True, special_tokens=self._tokens)

    def _leaves_no_room(self, prompt: str) -> bool:
        encoder, context = getattr(self.engine, "encoder", None), getattr(self.engine, "context_length", None)
        if encoder is None or context is None:
            return False
        return len(encoder.encode_texts([prompt])[0]) + self._sampling.max_new_tokens > context

    def _note_long(self, answers: Answers) -> None:
        later = [turn for answer in answers.values() for turn in answer.later]
        if lost := sum(turn.metadata.get("unscored") == TOO_LONG for turn in later):
            self.notes.append(
                f"{self.name}: {lost} of {len(later)} later turns have no answer, as what was said before and "
                f"{self._sampling.max_new_tokens} new tokens do not fit its context; fewer --max-new-tokens leave room"
            )

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


def _put_in_order(file: Path, ids: list[str]) -> None:
    """Give the lines, one for each of these questions, their order: which was answered first tells nothing."""
    rows = {str(row["question_id"]): row for row in read_rows(file)}
    if list(rows) != ids:
        write_rows(file, [rows[id] for id in ids], ascii_only=True)


def _take_drafts(
    rows: Iterable[tuple[int, tuple[str, int, AnswerTurn]]],
    file: Path,
    questions: Mapping[str, Question],
    answers: Answers,
    turns: Mapping[str, list[AnswerTurn]],
) -> None:
    """Put what an earlier process answered of unfinished questions into `turns`.

    Raises:
        StoreError: a turn of no question of this run, or out of its order.
    """
    for number, (id, turn, answered) in rows:
        if id in answers:
            continue  # its last turn came, and all are in the answer
        if id not in questions or turn != len(turns[id]) + 1 or turn >= len(questions[id].turns):
            raise StoreError(f"{file}, line {number}: turn {turn} of question {id} is not asked, or answered twice")
        turns[id].append(answered)


def _answer(row: JSONObject) -> Answer:
    about = dict(row.get("metadata") or {})
    texts = [str(turn) for turn in row["choices"][0]["turns"]] if "choices" in row else [str(row["text"])]
    of_later = about.pop(LATER, [{}] * (len(texts) - 1)) if len(texts) > 1 else []
    later = [AnswerTurn(text, dict(more)) for text, more in zip(texts[1:], of_later, strict=True)]
    return Answer(str(row["question_id"]), texts[0], str(row["model_id"]), about, tuple(later))


def _draft_line(question: Question, turn: int, answered: AnswerTurn) -> JSONObject:
    return {"question_id": question.id, "turn": turn, "text": answered.text, "metadata": dict(answered.metadata)}


def _draft(row: JSONObject) -> tuple[str, int, AnswerTurn]:
    return str(row["question_id"]), int(row["turn"]), AnswerTurn(str(row["text"]), row["metadata"])
