"""The stages that train or make demonstrations, each a command: reward, self-play, sft, dpo, rlsf."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from almost_eval.cli.options import LOG_TO, SHARD
from almost_eval.errors import RunError
from almost_train.cli.options import DATA_ROOT, HELD_OUT, OUTPUT, PUSH_TO_HUB, UserPath, data_for, path_option
from almost_train.cli.settings import settings_command

TABLES = "JSON Lines, JSON, CSV, Parquet, or a data set of the hub (org/name[:config][@split])"

if TYPE_CHECKING:
    from almost_eval.progress import Progress
    from almost_eval.run.shards import Shard
    from almost_eval.types import JSONObject
    from almost_train.dpo.online import OnlineDPOSettings
    from almost_train.dpo.run import DPOSettings
    from almost_train.reward.run import RewardSettings
    from almost_train.rlsf.job import RLSFSettings
    from almost_train.self_play.turns import SelfPlaySettings
    from almost_train.sft.run import SFTSettings
    from almost_train.synthetic.sampling import EngineFactory


@settings_command("almost_train.reward.run:RewardSettings")
@path_option("--comparisons", f"Preference pairs: {TABLES}.")
@click.option("--eval-comparisons", type=UserPath(), help="Held-out pairs, in place of a share.")
@click.option("--model", required=True, help="What to start from: a language model, encoder or classifier.")
@OUTPUT
@LOG_TO
@PUSH_TO_HUB
def reward(
    settings: RewardSettings,
    comparisons: Path,
    eval_comparisons: Path | None,
    model: str,
    output: Path,
    progress: Progress,
) -> JSONObject:
    """Train a reward model on preference pairs (Bradley-Terry).

    \b
    Example:
      almost-train reward --comparisons runs/comparisons/comparisons.jsonl --model nano/vanilla-medium \\
        --output runs/reward
    """
    from almost_train.reward.run import train_reward

    return train_reward(settings, comparisons, model, output, eval_comparisons=eval_comparisons, progress=progress)


@settings_command("almost_train.self_play.turns:SelfPlaySettings", engine=True, name="self-play")
@path_option("--prompts", f"The first user turns: {TABLES}.")
@click.option("--reward-model", help="Its checkpoint; may be left out with --unguided.")
@click.option("--prompt-set", default="official", show_default=True, help="official, builtin or nano.")
@HELD_OUT
@OUTPUT
@SHARD
@DATA_ROOT
def self_play(
    settings: SelfPlaySettings,
    prompts: Path,
    reward_model: str | None,
    prompt_set: str,
    output: Path,
    shard: Shard | None,
    engine_for: EngineFactory,
    data_root: str | None,
    held_out: Path | None,
    progress: Progress,
) -> JSONObject:
    """Simulate dialogues, each answer the best of N by the reward model (RMSP).

    \b
    Example:
      almost-train self-play --prompts runs/prompts/prompts.jsonl --reward-model runs/reward/model --prompt-set nano \\
        --assistant-demonstrations good --user-demonstrations good --output runs/self-play
    """
    from almost_train.self_play.run import self_play as play
    from almost_train.synthetic.prompt_sets import load_seed_set

    seeds = load_seed_set(prompt_set, data_for(prompt_set, data_root))
    return play(
        settings,
        prompts,
        reward_model,
        output,
        engine_for=engine_for,
        demonstrations=seeds.demonstrations,
        held_out=held_out,
        progress=progress,
        shard=shard,
    )


@settings_command("almost_train.sft.run:SFTSettings")
@path_option("--demonstrations", f"Dialogues: {TABLES}.")
@click.option("--eval-demonstrations", type=UserPath(), help="Held-out dialogues, in place of a share.")
@click.option("--model", required=True, help="The language model to fine-tune.")
@OUTPUT
@LOG_TO
@PUSH_TO_HUB
def sft(
    settings: SFTSettings,
    demonstrations: Path,
    eval_demonstrations: Path | None,
    model: str,
    output: Path,
    progress: Progress,
) -> JSONObject:
    """Fine-tune on demonstrations, loss on the answers alone.

    \b
    Example:
      almost-train sft --demonstrations runs/play/demonstrations.jsonl --model nano/vanilla-medium --output runs/sft
    """
    from almost_train.sft.run import train_sft

    return train_sft(
        settings, demonstrations, model, output, eval_demonstrations=eval_demonstrations, progress=progress
    )


@settings_command("almost_train.dpo.run:DPOSettings")
@path_option("--comparisons", f"Preference pairs: {TABLES}.")
@click.option("--eval-comparisons", type=UserPath(), help="Held-out pairs, in place of a share.")
@click.option("--policy", required=True, help="The SFT checkpoint: the start, and the reference.")
@OUTPUT
@LOG_TO
@PUSH_TO_HUB
def dpo(
    settings: DPOSettings,
    comparisons: Path,
    eval_comparisons: Path | None,
    policy: str,
    output: Path,
    progress: Progress,
) -> JSONObject:
    """Direct preference optimisation of a policy on preference pairs (DPO, IPO).

    \b
    Example:
      almost-train dpo --comparisons runs/comparisons/comparisons.jsonl --policy runs/sft/model --output runs/dpo
    """
    from almost_train.dpo.run import train_dpo

    return train_dpo(settings, comparisons, policy, output, eval_comparisons=eval_comparisons, progress=progress)


@settings_command("almost_train.dpo.online:OnlineDPOSettings", name="online-dpo")
@path_option("--prompts", f"What to answer: {TABLES}.")
@click.option("--policy", required=True, help="The SFT checkpoint: the start, and the reference.")
@click.option("--reward-model", required=True, help="The reward model's checkpoint: the judge.")
@OUTPUT
@LOG_TO
@PUSH_TO_HUB
def online_dpo(
    settings: OnlineDPOSettings, prompts: Path, policy: str, reward_model: str, output: Path, progress: Progress
) -> JSONObject:
    """DPO on the policy's own answers, two to a prompt, of which the reward model chooses one.

    \b
    Example:
      almost-train online-dpo --prompts runs/prompts/prompts.jsonl --policy runs/sft/model \\
        --reward-model runs/reward/model --output runs/online-dpo
    """
    from almost_train.dpo.online import train_online_dpo

    return train_online_dpo(settings, prompts, policy, reward_model, output, progress=progress)


def _refuse_stopped(result: JSONObject) -> None:
    if stopped := result["metrics"]["stopped"]:
        step = result["metrics"]["policy_step"]
        raise RunError(
            f"training was stopped by a guard ({stopped}); the policy is that of step {step}, the last within bounds: "
            "lower --learning-rate or raise --kl-coefficient"
        )


@settings_command("almost_train.rlsf.job:RLSFSettings", check=_refuse_stopped)
@path_option("--prompts", f"What to answer: {TABLES}.")
@click.option("--policy", required=True, help="The SFT checkpoint.")
@click.option("--reward-model", required=True, help="The reward model's checkpoint.")
@OUTPUT
@LOG_TO
@PUSH_TO_HUB
def rlsf(
    settings: RLSFSettings, prompts: Path, policy: str, reward_model: str, output: Path, progress: Progress
) -> JSONObject:
    """Reinforcement learning from synthetic feedback: PPO, RLOO or GRPO.

    \b
    Example:
      almost-train rlsf --algorithm ppo --prompts runs/prompts/prompts.jsonl --policy runs/sft/model \\
        --reward-model runs/reward/model --output runs/rlsf
    """
    from almost_train.rlsf.run import rlsf as train

    return train(settings, prompts, policy, reward_model, output, progress=progress)
