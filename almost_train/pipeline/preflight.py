"""What can be known to fail before the first stage of a recipe begins: models, files, names, batches, room, disk.

A recipe runs for hours, and each stage checks its own input when it comes to it. Here the same is looked at at once, as
far as it does not depend on what a stage will make. Models of the hub that are not on this machine are left to the
stage that downloads them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.compare.tax.tasks import read_prompts
from almost_eval.data.sources import find_data
from almost_eval.engines.build import TAKES, EngineOptions, engine_arguments, generation_engine, one_process
from almost_eval.errors import AlmostError, InputError, did_you_mean
from almost_eval.models.chat import load_template
from almost_eval.models.checkpoint import CAUSAL, Checkpoint, context_length
from almost_eval.models.endpoints import BASE_URL, EndpointAddress
from almost_eval.models.loading import load_tokenizer, pick_device
from almost_eval.types import Message
from almost_train.common.held_out import read_held_out
from almost_train.common.held_out_loss import refuse_without_rows
from almost_train.common.lora import ALL, LoraSettings, check_lora
from almost_train.common.train_settings import TrainSettings
from almost_train.common.trainers import check_batches, micro_batch
from almost_train.dpo.online import OnlineDPOSettings
from almost_train.dpo.run import DPOSettings
from almost_train.dpo.trainer import PreferenceSettings, check_loss
from almost_train.nano.data import VoteSettings
from almost_train.pipeline.evaluation import EvaluationSettings, prompts_of
from almost_train.pipeline.recipe import SAMPLED, Recipe
from almost_train.pipeline.room import check_disk, local_checkpoint
from almost_train.reward.pairs import read_comparisons, reward_encoder
from almost_train.reward.run import KINDS, RewardSettings
from almost_train.rlsf.job import RLSFSettings, check_settings, refuse_empty_stop
from almost_train.rlsf.run import check_shares
from almost_train.self_play.turns import SelfPlaySettings
from almost_train.sft.run import SFTSettings
from almost_train.synthetic.comparisons import ComparisonSettings
from almost_train.synthetic.prompt_sets import DemonstrationSet, SeedSet, load_seed_set
from almost_train.synthetic.prompts import PromptSettings, check_shots
from almost_train.synthetic.ranking import as_ranking
from almost_train.synthetic.responses import Configuration, ResponseSettings, read_configurations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWARD_KINDS = ("SequenceClassification", "RewardModel")


def check_recipe(recipe: Recipe, seeds: SeedSet, folder: Path | None, options: EngineOptions) -> None:
    """Refuse a recipe that would fail later.

    Args:
        recipe: its sections have been read without an error.
        seeds: its prompt set.
        folder: of the pipeline; None where it is to run elsewhere: devices, packages, files and disk are left out then.
        options: of its engine.

    Raises:
        InputError: the first thing that is wrong, with the section that says so.
    """
    checks = _Checks(recipe, seeds, options, here=folder is not None)
    for section in recipe.sections:
        with recipe.section(section):
            checks.check(section)
    if folder is None:
        return
    if any(name in recipe.sections and not _is_done(folder, name) for name in SAMPLED):
        with recipe.section("engine"):
            engine_arguments(one_process(options), TAKES)
            if options.engine == "hf":
                pick_device(options.device)
    _check_files(recipe)
    check_disk(recipe, folder, [name for name in recipe.sections if not _is_done(folder, name)])


def check_elsewhere(recipe: Recipe, data_root: str | None, options: EngineOptions) -> None:
    """Refuse a recipe, or a part of one, that would fail on any machine.

    Raises:
        InputError: as `check_recipe`.
    """
    nano = recipe.prompt_set == "nano"
    data = find_data("nano" if nano else None, None if nano else data_root)
    check_recipe(recipe, load_seed_set(recipe.prompt_set, data), None, options)


def _is_done(folder: Path, stage: str) -> bool:
    return (folder / stage / "result.json").exists()


class _Checks:
    """What each section needs: a method of its name, which raises AlmostError."""

    def __init__(self, recipe: Recipe, seeds: SeedSet, options: EngineOptions, *, here: bool) -> None:
        self.recipe = recipe
        self.seeds = seeds
        self.options = options
        self.here = here
        """Whether this machine is to run it."""
        self.samples_here = options.engine in ("hf", "vllm")
        """Whether models that sample are checkpoints; else an endpoint's names."""
        self._tokenizers: dict[Path, PreTrainedTokenizerBase] = {}
        """Of each folder: one of a large vocabulary takes seconds to read, and several sections name the same."""
        self._samplers: set[str] = set()
        """Models whose engine has been looked at."""

    def check(self, section: str) -> None:
        """Check one section; some have nothing to check."""
        if method := getattr(self, section, None):
            method()

    def prompts(self) -> None:
        settings = self.recipe.settings("prompts", PromptSettings, "model", prompt_set=self.recipe.prompt_set)
        check_shots(settings, self.seeds)
        model = self.recipe.text("prompts", "model")
        self._sampler(model)
        if self.samples_here:
            self._room(model, CAUSAL, settings.max_new_tokens)

    def responses(self) -> None:
        settings = self.recipe.settings("responses", ResponseSettings, "configurations")
        for c in self._configurations():
            self._sampler(c.model)
            tokens = c.max_new_tokens or settings.max_new_tokens
            self._shots(f"configuration {c.name!r}", c.model, c.demonstrations, c.shots, tokens, settings.draw_shots)

    def comparisons(self) -> None:
        section = self.recipe.sections["comparisons"]
        names = [c.name for c in self._configurations()] if "responses" in self.recipe.sections else None
        for group in as_ranking(section.get("ranking"), f"recipe {self.recipe.name}, comparisons: ranking"):
            for name in group:
                if names is not None and name not in names:
                    raise InputError(f"the ranking names {name!r}; {did_you_mean(name, names, limit=20)}")
        if section.get("as_is_reward_model"):
            if "as_is_reward" in self.recipe.sections:
                raise InputError(
                    "as_is_reward_model names a reward model for the filter, and the section as_is_reward trains "
                    "another; leave one of them out"
                )
            self._checkpoint(self.recipe.text("comparisons", "as_is_reward_model"), REWARD_KINDS)
        settings = self.recipe.settings("comparisons", ComparisonSettings, "ranking", "as_is_reward_model")
        if self.here:
            pick_device(settings.device)

    def votes(self) -> None:
        self.recipe.settings("votes", VoteSettings)

    def as_is_reward(self) -> None:
        settings = self._reward("as_is_reward")
        if "comparisons" in self.recipe.sections["as_is_reward"]:
            file = self.recipe.text("as_is_reward", "comparisons")
            if self.here:
                read_comparisons(file, None, margin=settings.margin, skip_empty=settings.skip_empty)
        else:
            _refuse_margin(settings, "votes")

    def reward(self) -> None:
        _refuse_margin(self._reward("reward"), "comparisons")

    def self_play(self) -> None:
        settings = self.recipe.settings("self_play", SelfPlaySettings)
        if self.recipe.prompt_set != "nano":
            for name in ("assistant_model", "user_model"):
                if name not in self.recipe.sections["self_play"]:
                    raise InputError(f"{name!r} is missing; only the built-in world has a model for it")
        for role in ("assistant", "user"):
            model: str = getattr(settings, f"{role}_model")
            self._sampler(model)
            demonstrations: str = getattr(settings, f"{role}_demonstrations")
            tokens = settings.max_new_tokens if role == "assistant" else settings.user_max_new_tokens
            self._shots(f"the {role}", model, demonstrations, settings.shots, tokens)

    def sft(self) -> None:
        settings = self.recipe.settings("sft", SFTSettings, "model")
        self._held_out(settings.eval_every, settings.eval_share)
        self._trained(settings, self.recipe.text("sft", "model"), CAUSAL)

    def rlsf(self) -> None:
        settings = self.recipe.settings("rlsf", RLSFSettings)
        check_shares(settings, check_settings(settings, here=self.here).update_size(settings))
        if self.here:
            pick_device(settings.device)
            check_lora(settings, settings.device)
        self._policy(settings)
        self._judged(settings.max_new_tokens)

    def dpo(self) -> None:
        settings = self.recipe.settings("dpo", DPOSettings)
        self._held_out(settings.eval_every, settings.eval_share)
        self._dpo(settings)

    def online_dpo(self) -> None:
        settings = self.recipe.settings("online_dpo", OnlineDPOSettings)
        self._dpo(settings)
        refuse_empty_stop(settings.stop)
        if settings.max_new_tokens >= settings.max_length:
            raise InputError(
                f"max_new_tokens {settings.max_new_tokens} leaves a prompt no room in max_length {settings.max_length}"
            )
        self._judged(settings.max_new_tokens)

    def evaluation(self) -> None:
        own = ("prompts", "vanilla", "nano_prompts")
        settings = self.recipe.settings("evaluation", EvaluationSettings, *own)
        prompts_of(self.recipe)
        refuse_empty_stop(settings.stop)
        if self.here:
            pick_device(settings.device)
        if "vanilla" in self.recipe.sections["evaluation"]:
            self._room(self.recipe.text("evaluation", "vanilla"), CAUSAL, settings.max_new_tokens)
        self._judged(settings.max_new_tokens)

    # --- parts ---

    def _configurations(self) -> tuple[Configuration, ...]:
        where = f"recipe {self.recipe.name}, responses"
        return read_configurations(self.recipe.value("responses", "configurations"), where)

    def _reward(self, section: str) -> RewardSettings:
        settings = self.recipe.settings(section, RewardSettings, "model", "comparisons")
        self._held_out(settings.eval_every, settings.eval_share)
        self._trained(settings, self.recipe.text(section, "model"), KINDS)
        return settings

    @staticmethod
    def _held_out(every: int, share: float) -> None:
        refuse_without_rows(every, math.ceil(share), "set eval_share")

    def _dpo(self, settings: PreferenceSettings) -> None:
        check_loss(settings)
        self._policy(settings)
        self._length(settings, self._checkpoint(self.recipe.text("sft", "model"), CAUSAL))
        self._batches(settings)

    def _trained(self, settings: TrainSettings, model: str, kinds: Collection[str]) -> None:
        """What a stage that trains a model wants of it, and of this machine."""
        checkpoint = self._checkpoint(model, kinds)
        self._targets(settings, checkpoint)
        self._length(settings, checkpoint)
        self._batches(settings)

    def _length(self, settings: TrainSettings, checkpoint: Checkpoint | None) -> None:
        """Whether `max_length` holds the shortest of the seed prompts with an answer of a word."""
        if checkpoint is None:
            return
        tokenizer = self._tokenizer(checkpoint)
        template = load_template("auto", tokenizer)
        assert template is not None  # only `none` is
        shortest = min(self.seeds.seed_prompts, key=len)
        read = len(reward_encoder(tokenizer, template)((Message("user", shortest), Message("assistant", "Yes."))))
        if read > settings.max_length:
            raise InputError(
                f"max_length {settings.max_length} holds no dialogue: the shortest seed prompt with an answer of one "
                f"word is {read} tokens; raise it"
            )

    def _batches(self, settings: TrainSettings) -> None:
        if self.here:
            pick_device(settings.device)
            check_batches(settings)
            check_lora(settings, settings.device)
        else:
            micro_batch(settings)

    def _policy(self, settings: LoraSettings) -> None:
        """SFT's model, where it is trained on."""
        self._targets(settings, self._checkpoint(self.recipe.text("sft", "model"), CAUSAL))

    @staticmethod
    def _targets(settings: LoraSettings, checkpoint: Checkpoint | None) -> None:
        """Whether the layers that a LoRA is to stand beside are there, by the names of the tensors on disk."""
        names = {name.rpartition(".")[0] for name in checkpoint.tensor_names()} if checkpoint else set()
        layers = {name.rpartition(".")[2] for name in names}
        if not settings.lora_rank or not layers or settings.lora_targets == (ALL,):
            return
        for target in settings.lora_targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise InputError(f"lora_targets: no layer is called {target!r}; {did_you_mean(target, layers, 20)}")

    def _judged(self, new_tokens: int) -> None:
        """Whether SFT's policy and the reward model, which has its base's context, have room for such an answer."""
        for section, kinds in (("sft", CAUSAL), ("reward", KINDS)):
            self._room(self.recipe.text(section, "model"), kinds, new_tokens)

    def _room(self, model: str, kinds: Collection[str], new_tokens: int) -> None:
        checkpoint = self._checkpoint(model, kinds)
        if checkpoint is None:
            return
        room = context_length(checkpoint.config, self._tokenizer(checkpoint))
        if new_tokens >= room:
            raise InputError(f"max_new_tokens {new_tokens} leaves no room for a prompt: {model} reads {room}; lower it")

    def _tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        if checkpoint.path not in self._tokenizers:
            self._tokenizers[checkpoint.path] = load_tokenizer(checkpoint)
        return self._tokenizers[checkpoint.path]

    def _sampler(self, model: str) -> None:
        if not self.samples_here:
            url = self.options.base_url or (self.here and os.environ.get(BASE_URL)) or None
            if url:
                EndpointAddress.parse_all(url, "base_url")
            elif self.here:
                generation_engine(model, self.options)  # says that there is no endpoint
            return
        is_here = self._checkpoint(model, CAUSAL) is not None and self.here
        if is_here and self.options.engine == "hf" and model not in self._samplers:
            self._samplers.add(model)
            generation_engine(model, one_process(self.options))  # loads no weight, and refuses what the stage would

    def _checkpoint(self, model: str, kinds: Collection[str]) -> Checkpoint | None:
        return local_checkpoint(model, kinds)

    def _shots(
        self, who: str, model: str, demonstrations: str, shots: int, tokens: int | None, drawn: bool = False
    ) -> None:
        """Whether so many demonstrations are there, and leave room for an answer of so many tokens."""
        own = self.seeds.demonstration_set(demonstrations)
        if shots > len(own.conversations):
            raise InputError(f"{who} wants {shots} shots; {demonstrations!r} has {len(own.conversations)}")
        checkpoint = local_checkpoint(model, CAUSAL) if self.samples_here else None
        if checkpoint is None:
            return
        tokenizer = self._tokenizer(checkpoint)
        room = min(context_length(checkpoint.config, tokenizer), self.options.max_length or sys.maxsize)
        read = len(tokenizer.encode(shots_text(own, shots, longest=drawn)))
        new = tokens or own.max_new_tokens
        if read + new >= room:
            raise InputError(
                f"{who}: {shots} shots of {demonstrations!r} are {read} tokens, and an answer may have {new}; "
                f"{model} reads {room}. Lower shots or max_new_tokens, or take a model that reads more"
            )


def shots_text(demonstrations: DemonstrationSet, shots: int, *, longest: bool) -> str:
    """What stands before every prompt: the first shots, or those that may be drawn and are the longest."""
    shown = list(demonstrations.conversations)
    if longest:
        shown.sort(key=lambda conversation: -sum(len(message.content) for message in conversation))
    return demonstrations.document((), shown[:shots])


def _refuse_margin(settings: RewardSettings, stage: str) -> None:
    if settings.margin:
        raise InputError(f"margin: the pairs of the stage {stage!r} have none; leave it out")


def _check_files(recipe: Recipe) -> None:
    """Files of prompts that the recipe names, read to their end as their stages will read them."""
    try:
        if recipe.held_out not in (None, "nano"):
            read_held_out(Path(str(recipe.held_out)))
    except AlmostError as error:
        raise InputError(f"recipe {recipe.name}, held_out: {error}") from None
    file = recipe.sections.get("evaluation", {}).get("prompts")
    if file is not None:
        with recipe.section("evaluation"):
            read_prompts(Path(str(file)))
            read_held_out(Path(str(file)))  # what the evaluation asks is kept out of training
