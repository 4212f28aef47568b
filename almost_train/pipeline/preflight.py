"""What can be known to fail before the first stage of a recipe begins: models, files, names, batches, room, disk.

A recipe runs for hours, and each stage checks its own input when it comes to it. Here the same is looked at at once, as
far as it does not depend on what a stage will make. Models of the hub that are not on this machine are left to the
stage that downloads them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import AlmostError, InputError, ModelError, did_you_mean
from almost_eval.models.checkpoint import CAUSAL, Checkpoint, context_length, find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.nano import BUILT_IN
from almost_train.common.formats import read_preferences, read_prompt_rows
from almost_train.common.held_out_loss import refuse_without_rows
from almost_train.common.tables import read_any
from almost_train.common.trainers import check_batches
from almost_train.dpo.online import OnlineDPOSettings
from almost_train.dpo.run import DPOSettings
from almost_train.dpo.trainer import PreferenceSettings, check_loss
from almost_train.pipeline.recipe import Recipe
from almost_train.reward.run import KINDS, RewardSettings
from almost_train.rlsf.job import RLSFSettings, check_settings
from almost_train.rlsf.run import check_shares
from almost_train.self_play.settings import SelfPlaySettings
from almost_train.sft.run import SFTSettings
from almost_train.synthetic.prompt_sets import DemonstrationSet, SeedSet
from almost_train.synthetic.ranking import as_ranking
from almost_train.synthetic.responses import Configuration, ResponseSettings, read_configurations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWARD_KINDS = ("SequenceClassification", "RewardModel")
COPIES = {"reward": 4, "sft": 4, "rlsf": 7, "dpo": 4, "online_dpo": 4, "as_is_reward": 4}
"""Stage -> how many times the weights of its model, in float32, it writes at most at one time: the result, and a
checkpoint with AdamW's two moments; PPO's checkpoints hold the value model too."""


def check_recipe(recipe: Recipe, seeds: SeedSet, folder: Path) -> None:
    """Refuse a recipe that would fail later.

    Args:
        recipe: its sections have been read without an error.
        seeds: its prompt set.
        folder: of the pipeline.

    Raises:
        InputError: the first thing that is wrong, with the section that says so.
    """
    checks = _Checks(recipe, seeds)
    for section in recipe.sections:
        try:
            checks.check(section)
        except AlmostError as error:
            if str(error).startswith(f"recipe {recipe.name}"):
                raise
            raise InputError(f"recipe {recipe.name}, {section}: {error}") from None
    _check_files(recipe)
    _check_disk(recipe, folder)


class _Checks:
    """What each section needs: a method of its name, which raises AlmostError."""

    def __init__(self, recipe: Recipe, seeds: SeedSet) -> None:
        self.recipe = recipe
        self.seeds = seeds
        self.samples_here = recipe.engine.get("engine", "hf") in ("hf", "vllm")
        """Whether models that sample are checkpoints; else an endpoint's names."""
        self._tokenizers: dict[Path, PreTrainedTokenizerBase] = {}
        """Of each folder: one of a large vocabulary takes seconds to read, and several sections name the same."""

    def check(self, section: str) -> None:
        """Check one section; some have nothing to check."""
        if method := getattr(self, section, None):
            method()

    def prompts(self) -> None:
        self._sampler(str(self.recipe.value("prompts", "model")))

    def responses(self) -> None:
        settings = self.recipe.settings("responses", ResponseSettings, "configurations")
        for c in self._configurations():
            self._sampler(c.model)
            tokens = c.max_new_tokens or settings.max_new_tokens
            self._shots(f"configuration {c.name!r}", c.model, c.demonstrations, c.shots, tokens)

    def comparisons(self) -> None:
        section = self.recipe.sections["comparisons"]
        names = [c.name for c in self._configurations()] if "responses" in self.recipe.sections else None
        for group in as_ranking(section.get("ranking"), f"recipe {self.recipe.name}, comparisons"):
            for name in group:
                if names is not None and name not in names:
                    raise InputError(f"the ranking names {name!r}; {did_you_mean(name, names, limit=20)}")
        if model := section.get("as_is_reward_model"):
            self._checkpoint(str(model), REWARD_KINDS)

    def as_is_reward(self) -> None:
        self._reward("as_is_reward")
        if file := self.recipe.sections["as_is_reward"].get("comparisons"):
            read_preferences(read_any(str(file)))

    def reward(self) -> None:
        self._reward("reward")

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
        self._checkpoint(str(self.recipe.value("sft", "model")), CAUSAL)
        self._held_out(settings.eval_every, settings.eval_share)
        check_batches(settings)

    def rlsf(self) -> None:
        settings = self.recipe.settings("rlsf", RLSFSettings)
        check_shares(settings, check_settings(settings).update_size(settings))

    def dpo(self) -> None:
        settings = self.recipe.settings("dpo", DPOSettings)
        self._held_out(settings.eval_every, settings.eval_share)
        self._dpo(settings)

    def online_dpo(self) -> None:
        self._dpo(self.recipe.settings("online_dpo", OnlineDPOSettings))

    def evaluation(self) -> None:
        section = self.recipe.sections["evaluation"]
        if "vanilla" in section:
            self._checkpoint(str(section["vanilla"]), CAUSAL)

    # --- parts ---

    def _configurations(self) -> tuple[Configuration, ...]:
        where = f"recipe {self.recipe.name}, responses"
        return read_configurations(self.recipe.value("responses", "configurations"), where)

    def _reward(self, section: str) -> None:
        settings = self.recipe.settings(section, RewardSettings, "model", "comparisons")
        self._checkpoint(str(self.recipe.value(section, "model")), KINDS)
        self._held_out(settings.eval_every, settings.eval_share)
        check_batches(settings)

    @staticmethod
    def _held_out(every: int, share: float) -> None:
        refuse_without_rows(every, math.ceil(share), "set eval_share")

    def _dpo(self, settings: PreferenceSettings) -> None:
        check_batches(settings)
        check_loss(settings)

    def _sampler(self, model: str) -> None:
        if self.samples_here:
            self._checkpoint(model, CAUSAL)

    def _checkpoint(self, model: str, kinds: Collection[str]) -> None:
        local_checkpoint(model, kinds)

    def _shots(self, who: str, model: str, demonstrations: str, shots: int, tokens: int | None) -> None:
        """Whether so many demonstrations are there, and leave room for an answer of so many tokens."""
        own = self.seeds.demonstration_set(demonstrations)
        if shots > len(own.conversations):
            raise InputError(f"{who} wants {shots} shots; {demonstrations!r} has {len(own.conversations)}")
        checkpoint = local_checkpoint(model, CAUSAL) if self.samples_here else None
        if checkpoint is None:
            return
        if checkpoint.path not in self._tokenizers:
            self._tokenizers[checkpoint.path] = load_tokenizer(checkpoint)
        tokenizer = self._tokenizers[checkpoint.path]
        room = context_length(checkpoint.config, tokenizer)
        read = max(len(tokenizer.encode(text)) for text in _headers(own, shots))
        new = tokens or own.max_new_tokens
        if read + new >= room:
            raise InputError(
                f"{who}: {shots} shots of {demonstrations!r} are {read} tokens, and an answer may have {new}; "
                f"{model} reads {room}. Lower shots or max_new_tokens, or take a model that reads more"
            )


def _headers(demonstrations: DemonstrationSet, shots: int) -> list[str]:
    """The first shots, and the longest: a stage takes either the first or some that are drawn."""
    by_length = sorted(demonstrations.conversations, key=lambda c: -sum(len(m.content) for m in c))
    return [demonstrations.document((), some[:shots]) for some in (demonstrations.conversations, tuple(by_length))]


def local_checkpoint(model: str, kinds: Collection[str]) -> Checkpoint | None:
    """The checkpoint of a folder or a built-in name, checked; None for a name that only the hub may know.

    Raises:
        ModelError: no such folder, or a model of another kind.
    """
    if model in BUILT_IN or Path(model).exists() or model.startswith(("nano/", "/", ".", "~")):
        return find_checkpoint(model, architectures=kinds)
    if model.count("/") != 1:
        raise ModelError(f"no model at {model!r}: give a checkpoint directory, a hub id (org/name) or a built-in name")
    return None


def _check_files(recipe: Recipe) -> None:
    """Files of prompts that the recipe names, read to their end."""
    files = {"held_out": recipe.held_out if recipe.held_out != "nano" else None}
    files["evaluation"] = recipe.sections.get("evaluation", {}).get("prompts")
    for section, file in files.items():
        if file is None:
            continue
        try:
            read_prompt_rows(read_any(str(file)))
        except AlmostError as error:
            raise InputError(f"recipe {recipe.name}, {section}: {str(error).partition(';')[0]}") from None


def _check_disk(recipe: Recipe, folder: Path) -> None:
    """Whether the disk has room for the weights that the stages write, checkpoints to resume from among them."""
    kept, most = 0, 0
    for section, copies in COPIES.items():
        if section not in recipe.sections or (folder / section / "result.json").exists():
            continue
        # RLSF and DPO train what SFT has made.
        starts_at_sft = section in ("rlsf", "dpo", "online_dpo")
        model = recipe.sections.get("sft" if starts_at_sft else section, {}).get("model")
        if recipe.sections[section].get("eval_every"):  # the best so far, and one that may become it
            copies += 2
        checkpoint = local_checkpoint(str(model), KINDS) if model else None
        if checkpoint is None:
            continue
        weights = 4 * checkpoint.n_parameters()
        most = max(most, kept + copies * weights)
        kept += weights
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if most > free:
        raise InputError(
            f"recipe {recipe.name}: its stages write up to {most / 2**30:.1f} GiB of weights at one time, and {there} "
            f"has {free / 2**30:.1f} GiB free; give another --output"
        )
