"""`synthesize prompts`: queries mined from a vanilla language model, in the manner of self-instruct.

ALMoST (arXiv 2305.13735, section 2.1; naver-ai/ALMoST `generator.py`): ten shots are drawn from the seed prompts and
those mined so far, each on a line after `Query:`. The model writes the next query. It is dropped if it is too short,
too long, or too similar to an earlier prompt (ROUGE-L F1 of 0.5 or more).

Departures from the official code:

- The official code reads the model's *second* query: it skips the line that completes the open `Query:` and takes the
  next line that begins with one. Here the completion itself is read, and generation stops at its end. This needs half
  the tokens, and never takes a query that the token budget cut. `reading: official` is the official way.
- The official rule for prompts above 250 characters accepts those that do not end in punctuation; here all are dropped.
- Shots are drawn by (seed, round), and a round does not use its own prompts as shots, as in an official batch. Every
  completion is on disk as soon as it is finished, so a killed run loses those that the model was writing.
- ROUGE-L: see `overlap`.

Memory is bounded by the prompts that are kept: what `overlap` holds of each, some 700 bytes of tokens and lists, and
eight for the place of its text. Texts, rejections and rounds are on disk alone.
"""

from __future__ import annotations

import re
import string
from array import array
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import GenerationEngine, SamplingParams
from almost_eval.errors import InputError, RunError
from almost_eval.files import LineWriter, Row, iterate_rows, write_rows
from almost_eval.progress import Progress
from almost_eval.types import Completion, JSONObject
from almost_train.common.config import MOST_SEED, option
from almost_train.common.held_out import HeldOut, is_held_out, read_held_out
from almost_train.common.resume import RowLog
from almost_train.common.stage import Stage, model_input
from almost_train.synthetic.overlap import OverlapIndex
from almost_train.synthetic.prompt_sets import PROMPT_SETS, SeedSet, load_seed_set
from almost_train.synthetic.sampling import EngineFactory, derived_rng, derived_seed, pin_dtype

PREFIX = "Query:"
READINGS = ("completion", "official")

_NEXT_QUERY = re.compile(r"query\s?:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """Settings of `synthesize prompts`; the defaults are the official ones."""

    count: int = option(100, "Prompts to mine.", least=1)
    prompt_set: str = option("official", "Where the seed prompts come from.", choices=PROMPT_SETS)
    shots: int = option(10, "Prompts shown to the model in each request.", least=1)
    temperature: float = option(1.2, "Sampling temperature.", least=0)
    top_p: float = option(0.9, "Nucleus.", above=0, most=1)
    max_new_tokens: int = option(64, "Longest completion, in tokens.", least=1)
    overlap: float = option(0.5, "ROUGE-L F1 with an earlier prompt from which one is rejected.", above=0, most=1)
    min_characters: int = option(30, "Shorter prompts must end in punctuation.", least=1)
    max_characters: int = option(250, "Longer prompts are rejected.", least=1)
    reading: str = option(
        "completion", "Which query to read: the model's next one, or the official one.", choices=READINGS
    )
    round_size: int = option(64, "Requests in a round; what a round finds is shown as shots from the next on.", least=1)
    patience: int = option(20, "Rounds in a row without a new prompt after which mining stops.", least=1)
    max_rounds: int | None = option(None, "Rounds after which mining stops.", least=1)
    accept_fewer: bool = option(False, "Where mining stops early, go on with the prompts there are.")
    seed: int = option(0, "Seed of the shots and of the sampling.", least=0, most=MOST_SEED)


def synthesize_prompts(
    settings: PromptSettings,
    model: str,
    output: Path,
    *,
    data: DataSource,
    engine_for: EngineFactory,
    held_out: Path | None = None,
    progress: Progress | None = None,
) -> JSONObject:
    """Mine prompts: `prompts.jsonl` (id, prompt) and `prompts.rejected.jsonl` (round, text, reason) under `output`.

    Args:
        settings: what to mine.
        model: a vanilla language model: folder, hub id or built-in name.
        output: the stage's folder.
        data: where the official prompt set is looked for.
        engine_for: makes the engine.
        held_out: a `prompts.jsonl` that an evaluation asks: a prompt with the same words is rejected.
        progress: where to report.

    Returns:
        `result.json`: metrics are the prompts, rounds, candidates, and the rejections by reason.

    Raises:
        InputError: a prompt set that is absent or has too few seeds; a folder of another run.
        RunError: `patience` rounds brought nothing new, or `max_rounds` are over; what was mined is kept.
    """
    seeds = load_seed_set(settings.prompt_set, data)
    check_shots(settings, seeds)
    inputs: dict[str, Path | str] = {"model": model_input(model), "prompt_set": seeds.digest}
    if held_out is not None:
        inputs["held_out"] = held_out
    kept_out = read_held_out(held_out)
    with Stage(output, "synthesize-prompts", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result
        journal, answers = output / ".rounds.jsonl", output / ".answers.jsonl"
        with LineWriter(journal) as log, RowLog(answers) as answered, _Texts(output) as texts:
            mine = _Mine(settings, seeds, kept_out, log, answered, texts)
            engine: GenerationEngine | None = None
            with (progress or Progress()).track("prompts", settings.count, mine.kept) as advance:
                while mine.kept < settings.count and not mine.stopped:
                    if engine is None:
                        engine = engine_for(model)
                        pin_dtype(stage, "model", engine)
                    advance(mine.round(engine))
            if mine.kept < settings.count and not (settings.accept_fewer and mine.kept):
                raise RunError(mine.why_stopped())
            result = mine.finish(stage)
        journal.unlink(missing_ok=True)
        answers.unlink(missing_ok=True)
        return result


def check_shots(settings: PromptSettings, seeds: SeedSet) -> None:
    """Raise InputError for more shots than there are seed prompts."""
    if settings.shots > len(seeds.seed_prompts):
        raise InputError(
            f"--shots {settings.shots} is more than the {len(seeds.seed_prompts)} seed prompts of {seeds.name!r}"
        )


class _Texts:
    """Texts by number, in a file without a name: it is gone when this is closed, or the process. Eight bytes each."""

    def __init__(self, folder: Path) -> None:
        self._stream = TemporaryFile(dir=folder)  # noqa: SIM115 - closed in __exit__
        self._ends = array("q", [0])

    def __enter__(self) -> _Texts:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        begin, end = self._ends[number], self._ends[number + 1]
        self._stream.seek(begin)
        return self._stream.read(end - begin).decode("utf-8", "surrogatepass")

    def append(self, text: str) -> None:
        """Add one."""
        self._stream.seek(self._ends[-1])
        self._ends.append(self._ends[-1] + self._stream.write(text.encode("utf-8", "surrogatepass")))


@dataclass
class _Mine:
    """The state of the mining; after a kill it is made again from the journal."""

    settings: PromptSettings
    seeds: SeedSet
    held_out: HeldOut
    log: LineWriter
    """One row for each finished round: its candidates, in order, each with its reason or None."""
    answered: RowLog
    """One row for each finished completion of the round that is not finished."""
    texts: _Texts
    """The seed prompts, then those that were kept."""
    rounds: int = 0
    """Those that are finished."""
    candidates: int = 0
    """Of these rounds."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Their rejections."""
    characters: int = 0
    """Of the prompts that were kept."""

    def __post_init__(self) -> None:
        self.index = OverlapIndex(self.settings.overlap)
        self.new: deque[int] = deque(maxlen=self.settings.patience)  # new prompts of each of the last rounds
        for prompt in self.seeds.seed_prompts:
            self._add(prompt)
        for _, row in iterate_rows(self.log.file):
            for candidate in row["candidates"]:
                if candidate["reason"] is None:
                    self._keep(candidate["text"])
            self._count(row)

    @property
    def kept(self) -> int:
        """Prompts so far."""
        return len(self.texts) - len(self.seeds.seed_prompts)

    @property
    def stopped(self) -> bool:
        """Whether too many rounds in a row brought nothing new, or the rounds are over."""
        fruitless = len(self.new) == self.settings.patience and not any(self.new)
        return fruitless or self.rounds == self.settings.max_rounds

    def round(self, engine: GenerationEngine) -> int:
        """One round: draw shots, generate, judge in order, write it down. Returns the number of new prompts."""
        s, number = self.settings, self.rounds + 1
        # 1. Shots from the seeds and from the prompts of earlier rounds.
        rng = derived_rng(s.seed, f"shots/{number}")
        pool = range(len(self.texts))  # numbers: the draw is that from a list of the texts
        requests = [
            request_text(self.seeds.instruction, (self.texts[shot] for shot in rng.sample(pool, s.shots)))
            for _ in range(s.round_size)
        ]
        # 2. All requests at once.
        params = SamplingParams(
            s.max_new_tokens,
            s.temperature,
            s.top_p,
            stop=("\n",) if s.reading == "completion" else (),
            seed=derived_seed(s.seed, f"sampling/{number}"),
        )
        completions = self._complete(number, requests, params, engine)
        # 3. Judge in the order of the requests: the engine may finish them in another order.
        before = self.kept
        candidates = [self._judge(completion) for completion in completions]
        row = {"round": number, "new": self.kept - before, "candidates": candidates}
        self.log.append(row)
        self._count(row)
        self.answered.rewrite([])
        self.answered.rows.clear()
        return self.kept - before

    def _complete(
        self, number: int, requests: list[str], params: SamplingParams, engine: GenerationEngine
    ) -> list[Completion]:
        """The completion of each request of a round, written down as soon as it is finished."""
        done = {row["request"]: row for row in self.answered.rows if row["round"] == number}
        missing = [i for i in range(len(requests)) if i not in done]
        for index, completions in engine.stream_completions([requests[i] for i in missing], params):
            said = completions[0]
            row = {"round": number, "request": missing[index], "text": said.text, "finish_reason": said.finish_reason}
            self.answered.append(row)
            done[missing[index]] = row
        return [Completion(done[i]["text"], (), done[i]["finish_reason"]) for i in range(len(requests))]

    def why_stopped(self) -> str:
        """One line for the user."""
        told = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common()) or "none"
        return (
            f"mining stopped after {self.rounds} rounds with {self.kept} of {self.settings.count} "
            f"prompts (rejected: {told}); in a new --output use fewer prompts, more patience, a higher overlap or "
            "temperature, or --accept-fewer"
        )

    def finish(self, stage: Stage) -> JSONObject:
        """Write the outputs."""
        files = {"prompts": stage.folder / "prompts.jsonl", "rejected": stage.folder / "prompts.rejected.jsonl"}
        texts = (self.texts[number] for number in range(len(self.seeds.seed_prompts), len(self.texts)))
        write_rows(files["prompts"], ({"id": f"p{i:05d}", "prompt": text} for i, text in enumerate(texts, 1)))
        rounds = (row for _, row in iterate_rows(self.log.file))
        judged = ({"round": row["round"], **candidate} for row in rounds for candidate in row["candidates"])
        write_rows(files["rejected"], (row for row in judged if row["reason"] is not None))
        metrics = {
            "prompts": self.kept,
            "rounds": self.rounds,
            "candidates": self.candidates,
            "rejected": dict(sorted(self.reasons.items())),
            "mean_characters": round(self.characters / self.kept, 1),
            "prompt_set": self.seeds.name,
        }
        return stage.finish(metrics, files)

    def _judge(self, completion: Completion) -> Row:
        text = read_query(completion.text, self.settings.reading)
        reason = self._fault(text, completion)
        if reason is None and is_held_out(text, self.held_out):
            reason = "held_out"
        if reason is None and self.kept == self.settings.count:
            reason = "not_needed"  # the count was reached earlier in this round
        if reason is not None:
            return {"text": text, "reason": reason}
        nearest = self.index.nearest(text)
        if nearest is not None:
            earlier = self.texts[nearest.number]
            return {"text": text, "reason": "overlap", "score": round(nearest.score, 4), "nearest": earlier}
        self._keep(text)
        return {"text": text, "reason": None}

    def _fault(self, text: str, completion: Completion) -> str | None:
        if not text:
            return "empty"
        if len(text) < self.settings.min_characters and text[-1] not in string.punctuation:
            return "too_short"
        if len(text) > self.settings.max_characters:
            return "too_long"
        ended = completion.finish_reason == "stop" or "\n" in completion.text or _NEXT_QUERY.search(completion.text)
        return None if ended or self.settings.reading == "official" else "unfinished"

    def _keep(self, text: str) -> None:
        self.characters += len(text)
        self._add(text)

    def _add(self, text: str) -> None:
        self.texts.append(text)
        self.index.add(text)

    def _count(self, row: Row) -> None:
        """Take a finished round into the figures."""
        self.rounds += 1
        self.new.append(row["new"])
        self.candidates += len(row["candidates"])
        self.reasons.update(one["reason"] for one in row["candidates"] if one["reason"] is not None)


def request_text(instruction: str, shots: Iterable[str]) -> str:
    """The instruction, the shots one a line, and an open `Query:` for the model to complete."""
    head = [instruction, ""] if instruction else []
    return "\n".join([*head, *(f"{PREFIX} {shot}" for shot in shots), PREFIX])


def read_query(completion: str, reading: str) -> str:
    """The query in a completion of `request_text`; empty where there is none.

    >>> read_query(" Why is grass green?\\nQuery: How old is rock?", "completion")
    'Why is grass green?'
    >>> read_query(" Why is grass green?\\nQuery: How old is rock?", "official")
    'How old is rock?'
    """
    lines = completion.split("\n")
    if reading == "official":
        lines = [line.replace(PREFIX, "").strip() for line in lines if line.strip().startswith(PREFIX)]
    # A model may open the next query on the same line.
    return _NEXT_QUERY.split(lines[0])[0].strip("\n ") if lines else ""
