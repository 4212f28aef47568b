"""`almost-train plan`: what each stage of a recipe needs on some devices, how long it takes, and what to change.

Sizes that a stage only finds out when it runs are taken at their most: every prompt is mined, every pair is kept, every
text has the longest length. So times are upper bounds, by the rates of `hardware` or those measured here; a forward
pass of a token costs 2 operations a parameter (arXiv 2001.08361, section 2.1), a sampled token one reading of the
weights and of half of the keys and values, divided by the rows that are sampled together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from almost_eval.data.sources import DataSource, find_data
from almost_eval.errors import InputError
from almost_eval.models.chat import dialogue_text
from almost_eval.suite.hardware import GPUS, SAMPLING_SHARE, TRAINING_SHARE
from almost_eval.types import JSONObject
from almost_train.common.tables import read_any
from almost_train.dpo.online import OnlineDPOSettings
from almost_train.dpo.run import DPOSettings
from almost_train.pipeline.evaluation import EvaluationSettings, prompts_of
from almost_train.pipeline.needs import PROMPT_TOKENS, Estimator, Need
from almost_train.pipeline.policy_needs import dpo_need, online_dpo_need, rlsf_need
from almost_train.pipeline.recipe import SAMPLED, Recipe
from almost_train.pipeline.sampling_needs import generation_need, judging_need
from almost_train.reward.run import RewardSettings
from almost_train.rlsf.job import RLSFSettings
from almost_train.self_play.turns import SelfPlaySettings
from almost_train.sft.run import SFTSettings
from almost_train.synthetic.prompt_sets import SeedSet, load_seed_set
from almost_train.synthetic.prompts import PromptSettings
from almost_train.synthetic.ranking import as_ranking
from almost_train.synthetic.responses import ResponseSettings, read_configurations

CHARACTERS = 3
"""Characters of a token of few-shot text: fewer than in English (about 4), so that lengths are not too small."""
MINED_TOKENS = 64
"""Tokens of a prompt among the shots of mining: it has at most 250 characters."""
RateOf = Callable[[Need, bool], float | None]
"""Stage, and whether it is about training -> tokens a second of a forward pass as training does it, or sampled ones,
measured on this machine; None where it cannot be."""


@dataclass(frozen=True, slots=True)
class StageBudget:
    """A stage's need, and whether it fits."""

    need: Need
    fits: bool
    advice: str = ""
    """What to change in the recipe where it does not."""

    def to_dict(self) -> JSONObject:
        """As JSON; bytes and seconds."""
        values = {field.name: getattr(self.need, field.name) for field in fields(self.need)}
        return {**values, "total": self.need.total, "fits": self.fits, "advice": self.advice}


@dataclass(frozen=True, slots=True)
class WholeCost:
    """All stages of a recipe, one after the other on the same devices; without the time of endpoints."""

    devices: int
    read: int
    """Tokens in training, at most."""
    written: int
    """Tokens sampled, at most."""
    seconds: float | None
    """None where no rate of one of them is known."""

    @property
    def gpu_hours(self) -> float | None:
        """Of all devices together."""
        return None if self.seconds is None else self.seconds * self.devices / 3600

    def money(self, price: float | None) -> float | None:
        """USD at a price of a GPU-hour; None where none is stated, or no time known."""
        return None if price is None or self.gpu_hours is None else self.gpu_hours * price

    def to_dict(self, price: float | None) -> JSONObject:
        """As JSON."""
        values = {"trained_tokens": self.read, "generated_tokens": self.written, "seconds": self.seconds}
        return {**values, "gpu_hours": self.gpu_hours, "usd": self.money(price)}


def whole_cost(rows: Sequence[StageBudget], devices: int) -> WholeCost:
    """The sum of a plan's stages."""
    times = [row.need.seconds for row in rows if not row.need.elsewhere]
    seconds = sum(time for time in times if time is not None)
    return WholeCost(
        devices,
        sum(row.need.trained_tokens for row in rows),
        sum(row.need.generated_tokens for row in rows),
        None if None in times else seconds,
    )


def budgets(
    recipe: Recipe, estimator: Estimator, data_root: str | None, rate_of: RateOf | None = None
) -> Iterator[StageBudget]:
    """The budget of each stage that has a model in memory, in the recipe's order.

    Args:
        recipe: checked as far as `load_recipe` does.
        estimator: with the devices.
        data_root: for official prompt sets.
        rate_of: measures, where times are not to be those of a datasheet.

    Raises:
        InputError: a setting that cannot be, or a model without a configuration.
    """
    sizes = _Sizes(recipe, estimator, data_root)
    for section in recipe.sections:
        for need in sizes.needs(section, recipe):
            fits = need.total <= estimator.devices.room and "no room" not in need.note
            advice = "" if fits else _advice(section, need, recipe, sizes, estimator)
            yield StageBudget(replace(need, seconds=seconds(need, estimator, rate_of)), fits, advice)


def seconds(need: Need, estimator: Estimator, rate_of: RateOf | None) -> float | None:
    """How long a stage takes at most; None where no rate is known, or an endpoint does it."""
    if need.elsewhere:
        return None
    if rate_of is not None:
        read = need.passes * need.trained_tokens + need.measured_tokens
        total = 0.0
        for tokens, trains in ((read, True), (need.generated_tokens, False)):
            rate = rate_of(need, trains) if tokens else 1.0
            if not rate:
                return None
            total += tokens / rate
        return total
    gpu = GPUS.get(estimator.devices.gpu or "")
    if gpu is None:
        return None
    operations = 2 * need.parameters * (need.passes * need.trained_tokens + need.measured_tokens)
    training = operations / (gpu.flops * TRAINING_SHARE * estimator.devices.count)
    steps = need.generated_tokens / need.rows / (estimator.devices.count if need.trained else 1)
    sampling = steps * (need.parameters * 2 if need.trained else need.weights + need.cache / 2)
    return training + sampling / (gpu.bandwidth * SAMPLING_SHARE)


class _Sizes:
    """How much each section of a recipe computes: a method of its name yields its needs."""

    def __init__(self, recipe: Recipe, estimator: Estimator, data_root: str | None) -> None:
        self._estimator = estimator
        nano = recipe.prompt_set == "nano"
        self._data: DataSource = find_data("nano" if nano else None, None if nano else data_root)
        self._seeds: SeedSet = load_seed_set(recipe.prompt_set, self._data)
        self._base = recipe

    def needs(self, section: str, recipe: Recipe) -> list[Need]:
        """Of one section; several where it holds one model after the other."""
        method: Callable[[Recipe], list[Need]] | None = getattr(self, section, None)
        with recipe.section(section):
            return method(recipe) if method else []

    @property
    def _prompts(self) -> int:
        return self._base.settings("prompts", PromptSettings, "model").count if "prompts" in self._base.sections else 0

    @property
    def _pairs(self) -> int:
        """Each two configurations of different rank, for each prompt."""
        groups = as_ranking(self._base.value("comparisons", "ranking"), f"recipe {self._base.name}, comparisons")
        sizes = [len(group) for group in groups]
        return self._prompts * (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2

    def prompts(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("prompts", PromptSettings, "model")
        model = str(recipe.value("prompts", "model"))
        read = s.shots * MINED_TOKENS
        return [
            generation_need(
                self._estimator,
                "prompts",
                model,
                read=read,
                new=s.max_new_tokens,
                requests=s.count,
                engine=_engine(recipe),
            )
        ]

    def responses(self, recipe: Recipe) -> list[Need]:
        by_model: dict[str, list[tuple[int, int]]] = {}
        for model, shots, new in self._configurations(recipe):
            by_model.setdefault(model, []).append((shots, new))
        return [
            generation_need(
                self._estimator,
                "responses",
                model,
                read=max(read for read, _ in sizes) + PROMPT_TOKENS,
                new=max(new for _, new in sizes),
                requests=len(sizes) * self._prompts,
                engine=_engine(recipe),
                # One configuration after the other; shots that differ are read, and kept, one after the other too.
                shared=max(read for read, _ in sizes),
                together=self._prompts,
            )
            for model, sizes in by_model.items()
        ]

    def _configurations(self, recipe: Recipe) -> list[tuple[str, int, int]]:
        """(model, tokens of its shots, tokens of an answer) of each configuration."""
        if "responses" not in recipe.sections:
            return []
        s = recipe.settings("responses", ResponseSettings, "configurations")
        where = f"recipe {recipe.name}, responses"
        sizes = []
        for c in read_configurations(recipe.value("responses", "configurations"), where):
            new = c.max_new_tokens or s.max_new_tokens or self._seeds.demonstration_set(c.demonstrations).max_new_tokens
            sizes.append((c.model, self._shots(c.demonstrations, c.shots), new))
        return sizes

    def as_is_reward(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("as_is_reward", RewardSettings, "model", "comparisons")
        file = recipe.sections["as_is_reward"].get("comparisons")
        votes = int(recipe.sections.get("votes", {}).get("count", 0))
        pairs = len(read_any(str(file)).rows) if file else votes
        return [self._estimator.reward("as_is_reward", str(recipe.value("as_is_reward", "model")), s, pairs)]

    def comparisons(self, recipe: Recipe) -> list[Need]:
        """The as-is filter's reward model; the other filters have none."""
        model = recipe.sections["comparisons"].get("as_is_reward_model")
        if model is None and "as_is_reward" in recipe.sections:
            model = recipe.value("as_is_reward", "model")
        if model is None:
            return []
        ranked = sum(
            map(len, as_ranking(recipe.value("comparisons", "ranking"), f"recipe {recipe.name}, comparisons: ranking"))
        )
        longest = PROMPT_TOKENS + max((new for *_, new in self._configurations(recipe)), default=0)
        texts = self._prompts * ranked
        return [judging_need(self._estimator, "comparisons", str(model), length=longest, texts=texts)]

    def reward(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("reward", RewardSettings, "model")
        return [self._estimator.reward("reward", str(recipe.value("reward", "model")), s, self._pairs)]

    def self_play(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("self_play", SelfPlaySettings)
        longest = s.max_turns * (s.max_new_tokens + s.user_max_new_tokens) + PROMPT_TOKENS
        roles = {
            s.assistant_model: (s.assistant_demonstrations, s.max_new_tokens, s.candidates * s.max_turns),
            s.user_model: (s.user_demonstrations, s.user_max_new_tokens, s.max_turns - 1),
        }
        if s.assistant_model == s.user_model:
            roles[s.user_model] = (s.assistant_demonstrations, s.max_new_tokens, s.candidates * s.max_turns)
        # Engines load on first use and stay: the reward model, and the other speaker where it is another model.
        needs = [
            generation_need(
                self._estimator,
                "self_play",
                model,
                read=self._shots(demonstrations, s.shots) + longest,
                new=new,
                requests=self._prompts * answers,
                engine=_engine(recipe),
                shared=self._shots(demonstrations, s.shots),
                reward=str(recipe.value("reward", "model")),
            )
            for model, (demonstrations, new, answers) in roles.items()
        ]
        if len(needs) == 2 and _engine(recipe).get("engine", "hf") == "hf":
            needs = [
                replace(need, weights=need.weights + other.weights)
                for need, other in zip(needs, needs[::-1], strict=True)
            ]
        return needs

    def sft(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("sft", SFTSettings, "model")
        turns = 1
        if "self_play" in recipe.sections:
            turns = recipe.settings("self_play", SelfPlaySettings).max_turns
        return [self._estimator.sft("sft", str(recipe.value("sft", "model")), s, self._prompts * turns)]

    def rlsf(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("rlsf", RLSFSettings)
        policy, reward = str(recipe.value("sft", "model")), str(recipe.value("reward", "model"))
        return [rlsf_need(self._estimator, "rlsf", policy, reward, s)]

    def dpo(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("dpo", DPOSettings)
        return [dpo_need(self._estimator, "dpo", str(recipe.value("sft", "model")), s, self._pairs)]

    def online_dpo(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("online_dpo", OnlineDPOSettings)
        policy, reward = str(recipe.value("sft", "model")), str(recipe.value("reward", "model"))
        return [online_dpo_need(self._estimator, "online_dpo", policy, reward, s, self._prompts)]

    def evaluation(self, recipe: Recipe) -> list[Need]:
        s = recipe.settings("evaluation", EvaluationSettings, "prompts", "vanilla", "nano_prompts")
        section = recipe.sections["evaluation"]
        pool = prompts_of(recipe)
        file, count = pool.prompts, pool.nano_prompts or 0
        if file and Path(str(file)).is_file():
            count = len(read_any(str(file)).rows)
        count = min(count, s.limit or count)
        policies = 1 + ("vanilla" in section) + sum(name in recipe.sections for name in ("rlsf", "dpo", "online_dpo"))
        return [
            generation_need(
                self._estimator,
                "evaluation",
                str(recipe.value("sft", "model")),
                read=PROMPT_TOKENS,
                new=s.max_new_tokens,
                requests=count * policies,
                engine={},
                reward=str(recipe.value("reward", "model")),
            )
        ]

    def _shots(self, demonstrations: str, shots: int) -> int:
        """Tokens of the longest shots with their header."""
        own = self._seeds.demonstration_set(demonstrations)
        lengths = sorted((len(dialogue_text(conversation)) for conversation in own.conversations), reverse=True)
        return (len(own.header) + sum(lengths[:shots])) // CHARACTERS


def _engine(recipe: Recipe) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in recipe.engine.items()}


# --- what to change ---

TRAINING_CHANGES: tuple[Mapping[str, object], ...] = (
    {"micro_batch_size": 1},
    {"gradient_checkpointing": True},
    {"bf16": True},
    {"lora_rank": 16},
    {"quantize": "4bit"},
)
"""Tried one after the other, each beside those before it; what costs least stands first."""
ENGINE_CHANGES: tuple[Mapping[str, object], ...] = (
    {"dtype": "bfloat16"},
    {"gpu_memory": 0.7},
    {"gpu_memory": 0.5},
    {"gpu_memory": 0.3},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 4, "gpu_memory": 0.7},
    {"tensor_parallel_size": 8, "gpu_memory": 0.5},
)


def _advice(section: str, need: Need, recipe: Recipe, sizes: _Sizes, estimator: Estimator) -> str:
    """The smallest of the changes that makes it fit."""
    if need.elsewhere:
        return "a smaller reward model, or devices with more memory"
    engine = section in SAMPLED
    changes: dict[str, object] = {}
    own = recipe.engine if engine else recipe.sections[section]
    is_vllm = recipe.engine.get("engine") == "vllm"
    for change in ENGINE_CHANGES if engine else TRAINING_CHANGES if need.trained else ():
        if not is_vllm and engine and "dtype" not in change:
            continue
        if all(own.get(key) == value for key, value in change.items()):
            continue
        changes = {**changes, **change}
        changed = {**own, **changes}
        if engine:
            other = replace(recipe, engine=changed)
        else:
            other = replace(recipe, sections={**recipe.sections, section: changed})
        try:
            tried = [one for one in sizes.needs(section, other) if one.model == need.model]
        except InputError:  # more devices than there are
            continue
        if all(one.total <= estimator.devices.room and "no room" not in one.note for one in tried):
            words = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
            return f"{'engine' if engine else section}: {words}"
    more = "; or engine: vllm with tensor_parallel_size" if engine and not is_vllm else ""
    return f"a smaller model than {need.model}, or devices with more memory{more}"
