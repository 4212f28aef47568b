"""`synthesize responses`: answers to every prompt from several configurations of vanilla language models.

ALMoST (arXiv 2305.13735, section 2.1; naver-ai/ALMoST `generator.py`): a configuration is a model, a set of
demonstrations and how many of them are shown. The first n of the set stand before every prompt. `filters` has the rules
for answers.

Departures from the official code:

- The prompts go to the engine all at once, or 16,384 at once where there are more; the official code sends four.
- An answer that breaks a rule keeps its text and gets the reason; the official file says BAD.
- No shots means no shots; the official `0` shows the whole set.
- `draw_shots` shows other demonstrations for each prompt.

Memory is bounded by the documents of 16,384 prompts, which the engine is given together, and by 100 bytes of every
prompt, however long prompts and answers are: both are read from their files when they are wanted (`row_index`). A shard
holds the ids of all prompts, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import GenerationEngine, SamplingParams
from almost_eval.engines.partition import partition_lengths
from almost_eval.errors import DataError, InputError, StoreError
from almost_eval.files import LineWriter, Row, write_rows
from almost_eval.models.loading import release_memory
from almost_eval.progress import Progress
from almost_eval.run.shards import Mark, Shard, begin_shard, file_names
from almost_eval.types import Completion, JSONObject, Message
from almost_train.common.config import MOST_SEED, option, settings_from
from almost_train.common.records import refuse_half
from almost_train.common.shards import folder_of, shard_result, whole_stage
from almost_train.common.stage import Stage, model_input
from almost_train.synthetic.filters import RULES, STOPS, broken_rule, read_response
from almost_train.synthetic.prompt_sets import PROMPT_SETS, DemonstrationSet, SeedSet, load_seed_set
from almost_train.synthetic.row_index import Numbers, RowIndex, digests_of
from almost_train.synthetic.sampling import EngineFactory, derived_rng, derived_seed, pin_dtype

STAGE = "synthesize-responses"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes a file's name
_PROMPT = {"prompt": str}
_ANSWER = {"prompt": str, "response": str, "finish_reason": str}

TOGETHER = 16_384
"""Prompts that go to the engine at once. It starts anew for each such list, so with far fewer its batches would run
empty between two of them; with more, documents and their tokens would be what bounds the memory (some 200 MiB)."""


@dataclass(frozen=True, slots=True)
class ResponseSettings:
    """Settings of `synthesize responses`; the defaults are the official ones."""

    prompt_set: str = option("official", "Where the demonstrations come from.", choices=PROMPT_SETS)
    temperature: float = option(1.0, "Sampling temperature.", least=0)
    top_p: float = option(0.9, "Nucleus.", above=0, most=1)
    max_new_tokens: int | None = option(
        None,
        "Longest answer, in tokens; unset, what the demonstrations ask for (384, or 768 for longer ones).",
        least=1,
    )
    draw_shots: bool = option(False, "Draw the demonstrations anew for each prompt; else the first of the set.")
    min_characters: int = option(50, "Shorter answers are rejected.", least=1)
    rules: tuple[str, ...] = option(tuple(RULES), "Rules that an answer must keep.", choices=tuple(RULES))
    seed: int = option(0, "Seed of the sampling and of the draws.", least=0, most=MOST_SEED)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to answer; a list of these is a section of a recipe."""

    name: str = option("", "Names the file of answers, and the configuration in a ranking.")
    model: str = option("", "A vanilla language model: folder, hub id or built-in name.")
    demonstrations: str = option("", "Name of a demonstration set of the prompt set.")
    shots: int = option(3, "Demonstrations to show.", least=0)
    max_new_tokens: int | None = option(None, "In place of the stage's.", least=1)
    temperature: float | None = option(None, "In place of the stage's.", least=0)
    top_p: float | None = option(None, "In place of the stage's.", above=0, most=1)


def read_configurations(items: object, where: str) -> tuple[Configuration, ...]:
    """Configurations from a list of mappings, as YAML holds it.

    Raises:
        InputError: not such a list, an unknown or missing setting, a name twice or unfit for a file; with `where`.
    """
    if not isinstance(items, list) or not items:
        raise InputError(f"{where} must be a list of configurations (name, model, demonstrations, shots)")
    configurations: list[Configuration] = []
    for number, item in enumerate(items, 1):
        at = f"{where}, configuration {number}"
        if not isinstance(item, Mapping):
            raise InputError(f"{at} is {item!r}; it must be a mapping with name, model, demonstrations and shots")
        configuration = settings_from(Configuration, item, at)
        for key in ("name", "model", "demonstrations"):
            if not getattr(configuration, key):
                raise InputError(f"{at} has no {key}")
        if not _NAME.fullmatch(configuration.name):
            raise InputError(f"{at}: name {configuration.name!r} names a file; use letters, digits, '.', '_' and '-'")
        if configuration.name in {c.name for c in configurations}:
            raise InputError(f"{at}: the name {configuration.name!r} is taken by an earlier one")
        configurations.append(configuration)
    return tuple(configurations)


def synthesize_responses(
    settings: ResponseSettings,
    prompts: Path,
    configurations: Sequence[Configuration],
    output: Path,
    *,
    data: DataSource,
    engine_for: EngineFactory,
    progress: Progress | None = None,
    shard: Shard | None = None,
) -> JSONObject:
    """Answer every prompt in every configuration: `<configuration>.jsonl` under `output`, in the order of the prompts.

    A row is id, prompt, response, finish_reason, configuration, and `rejected`: the rule it breaks, or null. One model
    is loaded at a time.

    Args:
        settings: how to sample, and the rules.
        prompts: `prompts.jsonl`.
        configurations: see `read_configurations`.
        output: the stage's folder.
        data: where the official prompt set is looked for.
        engine_for: makes the engine of a model.
        progress: where to report.
        shard: answer a part of the prompts, in a folder inside `output`; `merge_responses` joins all.

    Returns:
        `result.json`: metrics hold, for each configuration, what was kept and what was rejected by which rule.

    Raises:
        InputError: no such demonstrations, or fewer than `shots`; prompts that are absent, malformed or repeat an id;
            a folder of another run; a prompt that does not fit the model.
    """
    # 1. What is refused before any model is loaded.
    seeds = load_seed_set(settings.prompt_set, data)
    for c in configurations:
        has = len(seeds.demonstration_set(c.demonstrations).conversations)
        if c.shots > has:
            raise InputError(f"configuration {c.name!r} wants {c.shots} shots; {c.demonstrations!r} has {has}")
    index = _Prompts(prompts, _PROMPT)
    index.check_prompts()
    inputs: dict[str, Path | str] = {"prompts": prompts, "prompt_set": seeds.digest}
    for c in configurations:
        # The model is an input of its own, by content: the same weights in another folder are the same model.
        inputs[f"configuration {c.name}"] = str({k: v for k, v in asdict(c).items() if k not in ("name", "model")})
        inputs[f"model of {c.name}"] = model_input(c.model)
    every_id: list[str] = []
    places: Sequence[int] = range(len(index))
    if shard:
        # All prompts of a configuration stand behind the same demonstrations: what differs is their length.
        lengths = []
        for row in index.read(places):
            every_id.append(row["id"])
            lengths.append(len(row["prompt"]))
        places = shard.part(partition_lengths(lengths, shard.of).parts, "prompts")
    output = folder_of(output, shard)
    with Stage(output, STAGE, settings, inputs, is_shard=shard is not None) as stage:
        mark = begin_shard(output, shard, places, every_id, _names(configurations)) if shard else None
        if mark and mark.finished is not None:
            return shard_result(mark, STAGE)
        if stage.result is not None:
            return stage.result
        # 2. One model after the other: the answers that are missing, then all in the order of the prompts.
        own = np.array(places, np.int64)
        metrics: JSONObject = {}
        for model, group in _by_model(configurations):
            engine: GenerationEngine | None = None  # made for the first configuration that lacks an answer
            for c in group:
                file = output / f"{c.name}.jsonl"
                with LineWriter(file) as log:
                    answers = RowIndex(file, _ANSWER)
                    missing = own[answers.find(index.ids[own]) < 0]
                    if missing.size:
                        engine = engine or engine_for(model)
                        pin_dtype(stage, c.name, engine)
                        with (progress or Progress()).track(c.name, own.size, own.size - missing.size) as advance:
                            for row in _Source(settings, seeds, c).answer(index, missing, engine):
                                log.append(row)
                                advance(1)
                        answers = RowIndex(file, _ANSWER)
                tally = _Tally()
                write_rows(file, tally.count(answers.read(answers.find(index.ids[own]))))
                metrics[c.name] = tally.metrics()
            del engine
            release_memory()  # for the next model
        if mark:
            return shard_result(mark.write({"answers": len(places) * len(configurations)}), STAGE)
        files = {c.name: output / f"{c.name}.jsonl" for c in configurations}
        return stage.finish({"prompts": len(places), "configurations": metrics}, files)


def merge_responses(marks: Sequence[Mark], output: Path) -> JSONObject:
    """Write the stage of all shards into `output`, as one process would have written it; returns `result.json`.

    Raises:
        StoreError: shards that lack a row, or an output that holds something else.
    """
    names = file_names(marks[0], "configurations")
    joined = {name: _Joined(marks, name) for name in names}
    tallies = {name: _Tally() for name in names}
    with whole_stage(marks, output, {}) as stage:
        for name in names:
            write_rows(output / f"{name}.jsonl", tallies[name].count(joined[name].read()))
        answered = file_names(marks[0], "answered")
        return stage.finish(
            {"prompts": marks[0].total, "configurations": {name: tallies[name].metrics() for name in answered}},
            {name: output / f"{name}.jsonl" for name in names},
        )


class _Joined:
    """The answers of one configuration in all shards, in the order of the prompts.

    Raises:
        StoreError: a row that is none of the shard's, or one that is missing.
    """

    def __init__(self, marks: Sequence[Mark], name: str) -> None:
        self._files = [RowIndex(mark.folder / f"{name}.jsonl", _ANSWER) for mark in marks]
        self._shard = np.empty(marks[0].total, np.int64)
        """Place of a prompt -> which of the files has its answer."""
        self._number = np.full(marks[0].total, -1)
        """Place of a prompt -> the number of that row there; -1 where it is missing."""
        for at, (mark, file) in enumerate(zip(marks, self._files, strict=True)):
            ids, places = digests_of(mark.ids), list(mark.places)
            foreign = np.flatnonzero(~np.isin(file.ids, ids))
            if foreign.size:
                [row] = file.read(foreign[:1].tolist())
                raise StoreError(f"{file.file} has a row of {row['id']!r}, which is another shard's")
            self._shard[places], self._number[places] = at, file.find(ids)
        rows = sum(map(len, self._files))
        if (self._number < 0).any() or rows != marks[0].total:
            raise StoreError(f"the shards hold {rows} answers of {name!r} to {marks[0].total} prompts")

    def read(self) -> Iterator[Row]:
        """All rows."""
        # A shard's rows are in the order of the prompts, so each file is read from its begin to its end.
        streams = [file.read(self._number[self._shard == at]) for at, file in enumerate(self._files)]
        for at in self._shard.tolist():
            yield next(streams[at])


def _names(configurations: Sequence[Configuration]) -> JSONObject:
    """The names of the configurations, as listed and as answered: results hold them in both orders."""
    answered = [c.name for _, group in _by_model(configurations) for c in group]
    return {"configurations": [c.name for c in configurations], "answered": answered}


class _Prompts(RowIndex):
    """The file of prompts; one that no model could be asked is refused by its row."""

    def look(self, number: int, row: Row) -> None:
        where = f"{self.file}, row {number + 1}"
        for name in ("id", "prompt"):
            if not row[name].strip():
                raise DataError(f"malformed data: {where}: the {name} is empty; write one, or remove the row")
            refuse_half(row[name], where)


class _Source:
    """One configuration with its demonstrations and sampling parameters."""

    def __init__(self, settings: ResponseSettings, seeds: SeedSet, configuration: Configuration) -> None:
        c = self.configuration = configuration
        self.settings = settings
        self.demonstrations: DemonstrationSet = seeds.demonstration_set(c.demonstrations)
        self.params = SamplingParams(
            c.max_new_tokens or settings.max_new_tokens or self.demonstrations.max_new_tokens,
            settings.temperature if c.temperature is None else c.temperature,
            settings.top_p if c.top_p is None else c.top_p,
            stop=STOPS,
            seed=derived_seed(settings.seed, f"sampling/{c.name}"),
        )

    def document(self, row: Row) -> str:
        """What the model reads for one prompt."""
        shots = self.demonstrations.conversations[: self.configuration.shots]
        if self.settings.draw_shots:
            # The name of the configuration is not in the seed: with one set, two configurations draw the same shots.
            rng = derived_rng(self.settings.seed, f"shots/{self.configuration.demonstrations}/{row['id']}")
            order = rng.sample(self.demonstrations.conversations, len(self.demonstrations.conversations))
            shots = tuple(order[: self.configuration.shots])
        return self.demonstrations.document((Message("user", row["prompt"]),), shots)

    def answer(self, prompts: RowIndex, missing: Numbers, engine: GenerationEngine) -> Iterator[Row]:
        """The finished row of each missing prompt (by number) as soon as it is known, in any order."""
        for numbers in self._lists(prompts, missing):
            # A call of its own: here, the documents of one list would stay until those of the next are made.
            yield from self._answer_list(list(prompts.read(numbers)), engine)

    def _answer_list(self, rows: Sequence[Row], engine: GenerationEngine) -> Iterator[Row]:
        documents = [self.document(row) for row in rows]
        for index, completions in engine.stream_completions(documents, self.params):
            yield self._row(rows[index], completions[0])

    def _lists(self, prompts: RowIndex, missing: Numbers) -> Iterator[Numbers]:
        """What goes to the engine at once."""
        if missing.size > TOGETHER:
            # The longest documents first: what does not fit the model is to be refused before the first answer. And
            # documents of one length share a batch, as they would if the engine had all of them.
            lengths = (len(self.document(row).encode(errors="surrogatepass")) for row in prompts.read(missing))
            missing = missing[np.argsort(-np.fromiter(lengths, np.int64, missing.size), kind="stable")]
        for at in range(0, missing.size, TOGETHER):
            yield np.sort(missing[at : at + TOGETHER])

    def _row(self, row: Row, completion: Completion) -> Row:
        response = read_response(completion.text)
        cut = len(response) < len(completion.text.strip("\n "))
        return {
            "id": row["id"],
            "prompt": row["prompt"],
            "response": response,
            "finish_reason": "stop" if cut else completion.finish_reason,
            "configuration": self.configuration.name,
            "rejected": broken_rule(response, self.settings.min_characters, self.settings.rules),
        }


def _by_model(configurations: Sequence[Configuration]) -> list[tuple[str, list[Configuration]]]:
    """Configurations that share a model, together, models in order of first use."""
    groups: dict[str, list[Configuration]] = {}
    for c in configurations:
        groups.setdefault(c.model, []).append(c)
    return list(groups.items())


@dataclass(slots=True)
class _Tally:
    """The metrics of one configuration, from its rows as they pass."""

    kept: int = 0
    characters: int = 0
    """Of the answers that are kept."""
    cut: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, each counted."""
        for row in rows:
            if row["rejected"] is None:
                self.kept += 1
                self.characters += len(row["response"])
            else:
                self.rejected[row["rejected"]] += 1
            self.cut += row["finish_reason"] == "length"
            yield row

    def metrics(self) -> JSONObject:
        """As `result.json` has them."""
        return {
            "kept": self.kept,
            "rejected": dict(sorted(self.rejected.items())),
            "cut_by_budget": self.cut,
            "mean_characters": round(self.characters / self.kept, 1) if self.kept else None,
        }
