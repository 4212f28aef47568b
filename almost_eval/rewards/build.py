"""Which class gives the rewards of a reward model: one for each engine, imported where it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from almost_eval.engines.build import SCORERS_TAKE, EngineOptions, engine_arguments, load_class, one_process, open_pool

if TYPE_CHECKING:
    from almost_eval.models.chat import ChatTemplate
    from almost_eval.rewards.base import CheckpointRewardModel
    from almost_eval.rewards.http import HTTPRewardModel

REWARD_MODELS = {
    "hf": "almost_eval.rewards.hf:HFRewardModel",
    "vllm": "almost_eval.rewards.vllm:VLLMRewardModel",
    "openai": "almost_eval.rewards.http:HTTPRewardModel",
}
"""Name of an engine -> the class that gives its rewards."""


def reward_model(
    model: str | None, options: EngineOptions, template: ChatTemplate | str | None = None
) -> CheckpointRewardModel | HTTPRewardModel:
    """The reward model on the engine of `options`. Loads no weights; a server must say at once what it serves.

    `model` is a checkpoint directory, hub id or built-in name; for `openai` the served name, or None for whichever.
    Without a template (or a choice of `load_template`), conversations are written by the model's own.

    Raises:
        InputError: an unknown engine, or an option that it does not take; whatever the reward model refuses.
        MissingDependencyError: the engine's package is not installed.
    """
    takes = {engine: names - {"data_parallel_size", "speculative_config"} for engine, names in SCORERS_TAKE.items()}
    alone = one_process(options)
    arguments = engine_arguments(alone, takes, "reward model on")
    arguments.pop("share_prefixes", None)  # hf's: rewards have no prefixes to share, so both values mean the same
    reward: Any = load_class(REWARD_MODELS[options.engine])(model, template=template, **arguments)
    if hasattr(reward, "check"):  # a server: is it there, and what does it serve
        reward.check()
    if alone != options:
        from almost_eval.rewards.pooled import PooledRewardModel, RewardServant

        assert model is not None
        reward = PooledRewardModel(reward, open_pool(reward, RewardServant, model, arguments, options))
    return reward
