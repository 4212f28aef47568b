"""`synthesize responses`: answers to every prompt from several configurations of vanilla language models.

ALMoST (arXiv 2305.13735, section 2.1; naver-ai/ALMoST `generator.py`): a configuration is a model, a set of
demonstrations and how many of them are shown. The first n of the set stand before every prompt. `filters` has the rules
for answers.

Departures from the official code:

- The whole list of prompts goes to the engine at once; the official code sends four.
- An answer that breaks a rule keeps its text and gets the reason; the official file says BAD.
- No shots means no shots; the official `0` shows the whole set.
- `draw_shots` shows other demonstrations for each prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import GenerationEngine, SamplingParams
from almost_eval.engines.partition import partition_lengths
from almost_eval.errors import DataError, InputError, StoreError
from almost_eval.files import Row, read_rows, write_rows
from almost_eval.models.release import release_memory
from almost_eval.progress import Progress
from almost_eval.run.shards import Mark, Shard, begin_shard, file_names
from almost_eval.types import Completion, JSONObject, Message
from almost_train.common.config import option, settings_from
from almost_train.common.resume import RowLog
from almost_train.common.shards import folder_of, joined_rows, shard_result, whole_stage
from almost_train.common.stage import Stage, model_input
from almost_train.synthetic.filters import RULES, STOPS, broken_rule, read_response
from almost_train.synthetic.prompt_sets import PROMPT_SETS, DemonstrationSet, SeedSet, load_seed_set
from almost_train.synthetic.sampling import EngineFactory, derived_rng, derived_seed, pin_dtype

STAGE = "synthesize-responses"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes a file's name


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
    seed: int = option(0, "Seed of the sampling and of the draws.", least=0)


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
    rows = read_prompts(prompts)
    inputs: dict[str, Path | str] = {"prompts": prompts, "prompt_set": seeds.digest}
    for c in configurations:
        # The model is an input of its own, by content: the same weights in another folder are the same model.
        inputs[f"configuration {c.name}"] = str({k: v for k, v in asdict(c).items() if k not in ("name", "model")})
        inputs[f"model of {c.name}"] = model_input(c.model)
    every_id = [row["id"] for row in rows]
    places: Sequence[int] = range(len(rows))
    if shard:
        # All prompts of a configuration stand behind the same demonstrations: what differs is their length.
        places = shard.part(partition_lengths([len(row["prompt"]) for row in rows], shard.of).parts, "prompts")
        rows = [rows[place] for place in places]
    output = folder_of(output, shard)
    with Stage(output, STAGE, settings, inputs, is_shard=shard is not None) as stage:
        mark = begin_shard(output, shard, places, every_id, _names(configurations)) if shard else None
        if mark and mark.finished is not None:
            return shard_result(mark, STAGE)
        if stage.result is not None:
            return stage.result
        # 2. One model after the other: the answers that are missing, then all in the order of the prompts.
        metrics: JSONObject = {}
        for model, group in _by_model(configurations):
            engine: GenerationEngine | None = None  # made for the first configuration that lacks an answer
            for c in group:
                file = output / f"{c.name}.jsonl"
                with RowLog(file) as log:
                    done = {row["id"] for row in log.rows}
                    missing = [row for row in rows if row["id"] not in done]
                    if missing:
                        engine = engine or engine_for(model)
                        pin_dtype(stage, c.name, engine)
                        with (progress or Progress()).track(c.name, len(rows), len(done)) as advance:
                            for row in _Source(settings, seeds, c).answer(missing, engine):
                                log.append(row)
                                advance(1)
                answered = {row["id"]: row for row in log.rows}
                in_order = [answered[row["id"]] for row in rows]
                write_rows(file, in_order)
                metrics[c.name] = _metrics(in_order)
            del engine
            release_memory()  # for the next model
        if mark:
            return shard_result(mark.write({"answers": len(rows) * len(configurations)}), STAGE)
        files = {c.name: output / f"{c.name}.jsonl" for c in configurations}
        return stage.finish({"prompts": len(rows), "configurations": metrics}, files)


def merge_responses(marks: Sequence[Mark], output: Path) -> JSONObject:
    """Write the stage of all shards into `output`, as one process would have written it; returns `result.json`.

    Raises:
        StoreError: shards that lack a row, or an output that holds something else.
    """
    names = file_names(marks[0], "configurations")
    rows = joined_rows(marks, names, lambda _, place: place)
    if short := next((name for name in names if len(rows[name]) != marks[0].total), None):
        raise StoreError(f"the shards hold {len(rows[short])} answers of {short!r} to {marks[0].total} prompts")
    with whole_stage(marks, output, rows) as stage:
        metrics = {name: _metrics(rows[name]) for name in file_names(marks[0], "answered")}
        return stage.finish(
            {"prompts": marks[0].total, "configurations": metrics},
            {name: output / f"{name}.jsonl" for name in names},
        )


def _names(configurations: Sequence[Configuration]) -> JSONObject:
    """The names of the configurations, as listed and as answered: results hold them in both orders."""
    answered = [c.name for _, group in _by_model(configurations) for c in group]
    return {"configurations": [c.name for c in configurations], "answered": answered}


def read_prompts(file: Path) -> list[Row]:
    """The rows of a `prompts.jsonl`.

    Raises:
        DataError: absent, empty, malformed, or an id twice.
    """
    rows = read_rows(file, {"id": str, "prompt": str})
    if not rows:
        raise DataError(f"{file} is empty; mine prompts first")
    twice = [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{file} has the id {twice[0]!r} more than once; every prompt needs its own")
    return rows


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

    def answer(self, rows: Sequence[Row], engine: GenerationEngine) -> Iterator[Row]:
        """The finished row of each prompt as soon as it is known, in any order."""
        documents = [self.document(row) for row in rows]
        for index, completions in engine.stream_completions(documents, self.params):
            yield self._row(rows[index], completions[0])

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


def _metrics(rows: Sequence[Row]) -> JSONObject:
    kept = [row for row in rows if row["rejected"] is None]
    rejected = Counter(row["rejected"] for row in rows if row["rejected"] is not None)
    return {
        "kept": len(kept),
        "rejected": dict(sorted(rejected.items())),
        "cut_by_budget": sum(row["finish_reason"] == "length" for row in rows),
        "mean_characters": round(sum(len(row["response"]) for row in kept) / len(kept), 1) if kept else None,
    }
