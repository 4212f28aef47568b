"""The stages of a recipe as calls: what each reads of the recipe, which folders it reads, which one it writes.

`plan` checks every section of a recipe and returns the steps in order. It runs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

from almost_eval.compare.tax.tasks import nano_oracle
from almost_eval.data.sources import find_data
from almost_eval.engines.base import GenerationEngine
from almost_eval.engines.build import ENGINES, EngineOptions, generation_engine
from almost_eval.errors import InputError, did_you_mean
from almost_eval.files import read_rows, write_rows
from almost_eval.progress import Progress
from almost_eval.types import JSONObject
from almost_train.common.held_out import read_held_out
from almost_train.dpo.online import OnlineDPOSettings, train_online_dpo
from almost_train.dpo.run import DPOSettings, train_dpo
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies, prompts_of
from almost_train.pipeline.preflight import check_recipe
from almost_train.pipeline.recipe import Recipe
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.rlsf.job import RLSFSettings, check_settings
from almost_train.rlsf.run import rlsf
from almost_train.self_play.run import SelfPlaySettings, self_play
from almost_train.sft.run import SFTSettings, train_sft
from almost_train.synthetic.comparisons import ComparisonSettings, synthesize_comparisons
from almost_train.synthetic.prompt_sets import load_seed_set
from almost_train.synthetic.prompts import PromptSettings, synthesize_prompts
from almost_train.synthetic.ranking import as_ranking, ranking_text
from almost_train.synthetic.responses import ResponseSettings, read_configurations, synthesize_responses

T = TypeVar("T")
Step = Callable[[], JSONObject]
"""Runs a stage, or goes on with it; returns its `result.json`."""


def plan(recipe: Recipe, folder: Path, data_root: str | None, progress: Progress) -> dict[str, Step]:
    """Name -> step, in the order of the recipe's stages.

    Raises:
        InputError: a section with an unknown or impossible setting, or a stage whose input no stage makes.
    """
    return _Plan(recipe, folder, data_root, progress).steps()


class _Plan:
    def __init__(self, recipe: Recipe, folder: Path, data_root: str | None, progress: Progress) -> None:
        self.recipe = recipe
        self.folder = folder
        self.progress = progress
        nano = recipe.prompt_set == "nano"
        self.data = find_data("nano" if nano else None, None if nano else data_root)
        self.seeds = load_seed_set(recipe.prompt_set, self.data)
        self.options = engine_options(recipe.engine, f"recipe {recipe.name}, engine")

    def steps(self) -> dict[str, Step]:
        """Every section that the recipe has, checked."""
        makers: dict[str, Callable[[], Step]] = {
            "prompts": self.prompts,
            "responses": self.responses,
            "votes": self.votes,
            "as_is_reward": self.as_is_reward,
            "comparisons": self.comparisons,
            "reward": self.reward,
            "self_play": self.self_play,
            "sft": self.sft,
            "rlsf": self.rlsf,
            "dpo": self.dpo,
            "online_dpo": self.online_dpo,
            "evaluation": self.evaluation,
        }
        steps = {}
        for name, make in makers.items():
            if name in self.recipe.sections:
                with self.recipe.section(name):
                    steps[name] = make()
        check_recipe(self.recipe, self.seeds, self.folder, self.options)
        return steps

    # --- synthetic feedback ---

    def prompts(self) -> Step:
        settings = self._settings("prompts", PromptSettings, "model", prompt_set=self.recipe.prompt_set)
        model = self.recipe.text("prompts", "model")
        return lambda: synthesize_prompts(
            settings,
            model,
            self.folder / "prompts",
            data=self.data,
            engine_for=self.engine,
            held_out=self.held_out(),
            progress=self.progress,
        )

    def responses(self) -> Step:
        settings = self._settings("responses", ResponseSettings, "configurations", prompt_set=self.recipe.prompt_set)
        where = f"recipe {self.recipe.name}, responses"
        configurations = read_configurations(self.recipe.value("responses", "configurations"), where)
        for configuration in configurations:
            self.seeds.demonstration_set(configuration.demonstrations)
        return partial(
            synthesize_responses,
            settings,
            self._made("prompts", "prompts.jsonl"),
            configurations,
            self.folder / "responses",
            data=self.data,
            engine_for=self.engine,
            progress=self.progress,
        )

    def votes(self) -> Step:
        """The nano world's other preference source: see `nano_data.write_votes`."""
        from almost_train.nano.data import VoteSettings, votes

        return partial(votes, self._settings("votes", VoteSettings), self.folder / "votes")

    def as_is_reward(self) -> Step:
        settings = self._settings("as_is_reward", RewardSettings, "model", "comparisons")
        file = self.recipe.sections["as_is_reward"].get("comparisons")
        comparisons = Path(str(file)) if file else self._made("votes", "comparisons.jsonl")
        model = self.recipe.text("as_is_reward", "model")
        output = self.folder / "as_is_reward"
        return partial(train_reward, settings, comparisons, model, output, progress=self.progress)

    def comparisons(self) -> Step:
        settings = self._settings("comparisons", ComparisonSettings, "ranking", "as_is_reward_model")
        where = f"recipe {self.recipe.name}, comparisons: ranking"
        ranking = as_ranking(self.recipe.value("comparisons", "ranking"), where)
        model = self.recipe.sections["comparisons"].get("as_is_reward_model")
        as_is = str(model) if model else None
        if as_is is None and "as_is_reward" in self.recipe.sections:
            as_is = str(self.folder / "as_is_reward" / "model")
        responses, output = self._made("responses", ""), self.folder / "comparisons"

        def step() -> JSONObject:
            # The stage reads a ranking file: the recipe's section becomes one beside the stage's folder.
            file = self.folder / "ranking.yaml"
            file.write_text(ranking_text(ranking), encoding="utf-8")
            return synthesize_comparisons(
                settings, responses, file, output, as_is_reward_model=as_is, progress=self.progress
            )

        return step

    # --- training ---

    def reward(self) -> Step:
        settings = self._settings("reward", RewardSettings, "model")
        comparisons, model = self._made("comparisons", "comparisons.jsonl"), self.recipe.text("reward", "model")
        return partial(train_reward, settings, comparisons, model, self.folder / "reward", progress=self.progress)

    def self_play(self) -> Step:
        settings = self._settings("self_play", SelfPlaySettings)
        for name in (settings.assistant_demonstrations, settings.user_demonstrations):
            self.seeds.demonstration_set(name)
        return lambda: self_play(
            settings,
            self._made("prompts", "prompts.jsonl"),
            str(self._made("reward", "model")),
            self.folder / "self_play",
            engine_for=self.engine,
            demonstrations=self.seeds.demonstrations,
            held_out=self.held_out(),
            progress=self.progress,
        )

    def sft(self) -> Step:
        settings = self._settings("sft", SFTSettings, "model")
        demonstrations, model = self._made("self_play", "demonstrations.jsonl"), self.recipe.text("sft", "model")
        return partial(train_sft, settings, demonstrations, model, self.folder / "sft", progress=self.progress)

    def rlsf(self) -> Step:
        settings = self._settings("rlsf", RLSFSettings)
        check_settings(settings)
        return partial(
            rlsf,
            settings,
            self._made("prompts", "prompts.jsonl"),
            str(self._made("sft", "model")),
            str(self._made("reward", "model")),
            self.folder / "rlsf",
            progress=self.progress,
        )

    def dpo(self) -> Step:
        settings = self._settings("dpo", DPOSettings)
        comparisons, policy = self._made("comparisons", "comparisons.jsonl"), str(self._made("sft", "model"))
        return partial(train_dpo, settings, comparisons, policy, self.folder / "dpo", progress=self.progress)

    def online_dpo(self) -> Step:
        settings = self._settings("online_dpo", OnlineDPOSettings)
        return partial(
            train_online_dpo,
            settings,
            self._made("prompts", "prompts.jsonl"),
            str(self._made("sft", "model")),
            str(self._made("reward", "model")),
            self.folder / "online_dpo",
            progress=self.progress,
        )

    # --- evaluation ---

    def evaluation(self) -> Step:
        """Held-out prompts: a file, or the nano world's evaluation pool with its oracle as judge."""
        own = ("prompts", "vanilla", "nano_prompts")
        settings = self._settings("evaluation", EvaluationSettings, *own)
        section = self.recipe.sections["evaluation"]
        policies: dict[str, Path | str] = {}
        if "vanilla" in section:
            policies["vanilla"] = str(section["vanilla"])
        policies["sft"] = self._made("sft", "model")
        if "rlsf" in self.recipe.sections:
            policies["rlsf"] = self.folder / "rlsf" / "policy"
        for stage in ("dpo", "online_dpo"):
            if stage in self.recipe.sections:
                policies[stage] = self.folder / stage / "model"
        nano, file = (pool := prompts_of(self.recipe)).nano_prompts, pool.prompts
        if nano is not None:
            from almost_train.nano.data import draw_prompts

            draw_prompts(nano, pool="test", seed=self.recipe.seed)

        def step() -> JSONObject:
            prompts = Path(str(file))
            if nano is not None:
                from almost_train.nano.data import write_prompts

                prompts = write_prompts(
                    self.folder / "evaluation-prompts.jsonl", nano, pool="test", seed=self.recipe.seed
                )
            return evaluate_policies(
                settings,
                prompts,
                policies,
                self.folder / "evaluation",
                reward_model=self._made("reward", "model"),
                reference="sft",
                judge=None if nano is None else nano_oracle(),
                progress=self.progress,
            )

        return step

    # --- what they share ---

    def engine(self, model: str) -> GenerationEngine:
        """The recipe's engine on a model."""
        return generation_engine(model, self.options)

    def held_out(self) -> Path | None:
        """The prompts that no stage may train on, those of the evaluation among them; what is no one file is written.

        `held_out` of the recipe may name others, or more than the evaluation asks.
        """
        section = self.recipe.sections.get("evaluation", {})
        asked = "nano" if "nano_prompts" in section else section.get("prompts")
        sources = [str(source) for source in dict.fromkeys((self.recipe.held_out, asked)) if source]
        return held_out_file(sources, self.folder / "held-out.jsonl") if sources else None

    def _settings(self, section: str, cls: type[T], *drop: str, **fixed: object) -> T:
        return self.recipe.settings(section, cls, *drop, **fixed)

    def _made(self, stage: str, name: str) -> Path:
        """What another stage makes."""
        if stage not in self.recipe.sections:
            raise InputError(f"it needs the section {stage!r}, which is missing")
        return self.folder / stage / name if name else self.folder / stage


def held_out_file(sources: Sequence[str], file: Path) -> Path:
    """One file with the prompts of all sources: the only one, or one that holds the others, or `file`, written.

    Args:
        sources: files of prompts, and `nano` for all that the nano world's evaluation may ask.
        file: where they are written.

    Raises:
        DataError: a file of prompts that cannot be read.
    """
    if "nano" in sources:
        from almost_train.nano.data import write_held_out

        write_held_out(file)
    files = [Path(source) for source in sources if source != "nano"]
    if not files:
        return file
    texts = [read_held_out(source) for source in files]
    if "nano" not in sources:
        for source, words in zip(files, texts, strict=True):
            if all(other <= words for other in texts):
                return source
    rows = read_rows(file) if "nano" in sources else []
    rows += [{"prompt": " ".join(words)} for words in sorted(frozenset().union(*texts)) if words]
    write_rows(file, ({**row, "id": f"held-out-{number}"} for number, row in enumerate(rows, 1)))
    return file


def engine_options(section: JSONObject, where: str) -> EngineOptions:
    """Engine options from a mapping; `where` names it in an error.

    Raises:
        InputError: an unknown option, or a value that it cannot have.
    """
    known = {field.name: field for field in fields(EngineOptions)}
    kinds = get_type_hints(EngineOptions)
    options = {}
    for key, value in section.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise InputError(f"{where}: unknown option {key!r}; {did_you_mean(name, known, 30)}")
        if name in options:
            raise InputError(f"{where}: {name} stands there twice, with - and with _; keep one")
        flag = known[name].metadata["flag"]
        taken = tuple(get_origin(kind) or kind for kind in get_args(kinds[name]) or (kinds[name],))
        taken += (int,) if float in taken else ()
        if not isinstance(value, taken) or (isinstance(value, bool) and bool not in taken):
            raise InputError(f"{where}: {name} is {value!r}; it must be {' or '.join(map(_KINDS.__getitem__, taken))}")
        if isinstance(value, int | float):
            low = (flag.least is not None and value < flag.least) or (flag.above is not None and value <= flag.above)
            if low or (flag.most is not None and value > flag.most):
                raise InputError(f"{where}: {name} is {value}, which is out of its bounds; see --help of a stage")
        options[name] = value
    engine = EngineOptions(**options)
    if engine.engine not in ENGINES:
        raise InputError(f"{where}: unknown engine {engine.engine!r}; {did_you_mean(engine.engine, ENGINES)}")
    return engine


_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    Mapping: "a mapping",
}
"""Type of an engine's option -> how an error calls it."""
