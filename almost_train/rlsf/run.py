"""RLSF, reinforcement learning from synthetic feedback: the SFT policy learns to raise the reward model's score of its
answers, less a penalty for its KL to the SFT policy.

ALMoST's third step (arXiv 2305.13735), whose code its authors did not release. PPO is our own loop (`loop`, `ppo`);
RLOO and GRPO are TRL's trainers (`trl`), with the same prompts, reward, logs, guards and result.

Runs under `accelerate launch`: every size in the settings is that of all processes together, so a run on two processes
is the run on one, up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import DataError, InputError, RunError
from almost_eval.models.chat import ChatTemplate
from almost_eval.models.checkpoint import Checkpoint, context_length, find_checkpoint, refuse_adapter
from almost_eval.progress import Progress
from almost_eval.types import Conversation, JSONObject
from almost_train.common.formats import Records, read_prompt_rows
from almost_train.common.interrupts import what_is_kept
from almost_train.common.lora import check_lora
from almost_train.common.merge import training_base
from almost_train.common.processes import SharedStage, is_main, shared_stage, world_size
from almost_train.common.schedule import learning_rate_factor
from almost_train.common.special_text import SpecialText, without_special
from almost_train.common.stage import model_input
from almost_train.common.tables import read_any
from almost_train.common.templates import keep_template
from almost_train.rlsf.job import Job, RLSFSettings, check_settings
from almost_train.rlsf.log import NotFinite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from almost_eval.rewards.hf import HFRewardModel
    from almost_train.rlsf.rollouts import RolloutPrompt


def rlsf(
    settings: RLSFSettings,
    prompts: Path | str,
    policy: str,
    reward_model: str,
    output: Path,
    *,
    progress: Progress | None = None,
) -> JSONObject:
    """Train a policy on the reward model's scores of its own answers.

    Args:
        settings: how.
        prompts: a file or a data set of the hub, in any format of `almost_train.common.formats`; one turn or several.
        policy: the SFT checkpoint: where training starts, and what KL is measured from.
        reward_model: a sequence classifier with one label; raw logits.
        output: gets `policy/` (a Hugging Face folder with tokenizer and chat template), `log.jsonl`, `samples.jsonl`,
            and with `keep_every` the same as `policy/` in `policies/step-000020/`, ...
        progress: where to report to.

    Returns:
        The stage's result. `metrics["stopped"]` is None, or the guard that ended training: `kl`, `reward_hacking`;
        the policy is then the newest checkpoint before it broke out, `metrics["policy_step"]`. Else `state/` holds
        the last checkpoint (`keep_state`), and the same call with more steps goes on from it.

    Raises:
        InputError: settings that do not go together, prompts or models that cannot be used.
        RunError: a loss or a reward that is not finite.
    """
    algorithm = check_settings(settings)
    check_lora(settings, settings.device)
    settings = replace(settings, micro_batch_size=check_shares(settings, algorithm.update_size(settings)))
    source, inputs = read_inputs(prompts, policy, reward_model)
    with shared_stage(output, "rlsf", settings, inputs, grows=("steps",)) as stage:
        if stage.result is not None:
            return stage.result
        earlier = stage.grown.get("steps", [])
        if earlier and progress and is_main():
            progress.notice(growth_note(settings, earlier))
        job = _prepare(settings, source.records, policy, reward_model, stage, progress or Progress())
        try:
            metrics = algorithm.train(job)
        except NotFinite as error:
            if error.untrained:
                raise RunError(
                    f"{error}; nothing was learned before: weights of the policy or the reward model are not finite, "
                    "or overflow; a lower learning rate does not help, other weights (or float32) do"
                ) from None
            raise RunError(
                f"{error}; {what_is_kept(algorithm.checkpoints(job.work))}; going on would end here again: choose "
                "another --output with a lower learning rate, or without bf16"
            ) from None
        metrics = {
            "algorithm": settings.algorithm,
            **metrics,
            "format": source.format,
            "prompts": len(job.prompts),
            "prompts_too_long": len(job.prompts_too_long),
            "prompts_too_long_ids": job.prompts_too_long[:20],
            **({"prompts_special": job.prompts_special} if job.prompts_special else {}),
        }
        if earlier:
            metrics |= {"steps_before": earlier, "as_never_stopped": as_never_stopped(settings, earlier)}
        state = last_checkpoint(job.work, settings.steps) if settings.keep_state and not metrics["stopped"] else None
        return stage.finish(metrics, {"policy": output / "policy", "samples": output / "samples.jsonl"}, state)


# --- before any weight is loaded ---


def read_inputs(
    prompts: Path | str, policy: str, reward_model: str
) -> tuple[Records[tuple[str, Conversation]], dict[str, Path | str]]:
    """The prompts, and what a stage that samples answers to them is made of."""
    table = read_any(prompts)
    inputs = {"prompts": table.input, "policy": model_input(policy), "reward_model": model_input(reward_model)}
    return read_prompt_rows(table), inputs


def check_shares(settings: RLSFSettings, update: int) -> int:
    """Completions of one pass of a process: `micro_batch_size`, or less where an update has fewer for each process.

    Raises:
        InputError: the processes cannot share an update in whole passes.
    """
    processes = world_size()
    micro = min(settings.micro_batch_size, max(1, update // processes))
    if update % (micro * processes):
        raise InputError(
            f"an update of {update} completions does not divide among {processes} processes with micro_batch_size "
            f"{micro}; choose one that {update} is a multiple of"
        )
    return micro


def _prepare(
    settings: RLSFSettings,
    prompts: Sequence[tuple[str, Conversation]],
    policy: str,
    reward_model: str,
    stage: SharedStage,
    progress: Progress,
) -> Job:
    checkpoint = find_checkpoint(policy)
    reward_checkpoint = find_checkpoint(reward_model, architectures=("SequenceClassification", "RewardModel"))
    if settings.is_quantized and settings.algorithm == "ppo":
        refuse_adapter(reward_checkpoint, f"the value model of --quantize {settings.quantize}")
    from almost_eval.models.loading import load_tokenizer
    from almost_eval.models.tensors import check_weights

    tokenizer = load_tokenizer(checkpoint)
    check_weights(checkpoint, "AutoModelForCausalLM")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {policy} has no EOS token, so no completion could end; set eos_token")
    template = stage.dated(keep_template(tokenizer))
    reward = dated_judge(reward_checkpoint, settings.device, stage, dtype=settings.reward_dtype)
    prompts, others = plain_prompts(prompts, tokenizer, template, skip=settings.skip_special)
    kept, dropped = fitting_prompts(prompts, checkpoint, tokenizer, template, reward, settings.max_new_tokens)
    # A new adapter must name weights that are on disk, and TRL reads its reference from the policy's folder.
    checkpoint = training_base(
        checkpoint, stage.folder, settings, bf16=settings.bf16, whole=settings.algorithm != "ppo"
    )
    return Job(
        settings=settings,
        prompts=kept,
        prompts_too_long=dropped,
        prompts_special=others,
        policy=checkpoint,
        tokenizer=tokenizer,
        template=template,
        reward=reward,
        output=stage.folder,
        processes=world_size(),
        is_first=is_main(),
        progress=progress if is_main() else Progress(),
    )


def plain_prompts(
    prompts: Sequence[tuple[str, Conversation]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    skip: bool,
) -> tuple[list[tuple[str, Conversation]], int]:
    """(prompts whose texts hold no special token, how many others); see `without_special`."""
    special = SpecialText.of(tokenizer, template)
    plain, others = without_special(prompts, special, lambda one: one[1], lambda one: f"prompt {one[0]}", skip=skip)
    if not plain:
        raise DataError(f"all of {len(others)} prompts hold special tokens of the policy; none is left to answer")
    return plain, len(others)


def fitting_prompts(
    prompts: Sequence[tuple[str, Conversation]],
    policy: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    reward: HFRewardModel,
    max_new_tokens: int,
) -> tuple[list[RolloutPrompt], list[str]]:
    """Prompts with room for an answer by the measure of either model, and the ids of the others.

    An answer of `max_new_tokens` may be longer in the reward model's tokens: `shorten_for_reward` ends it where they
    are used up.

    Raises:
        DataError: none has room.
    """
    from almost_train.rlsf.rollouts import conversation, read_prompts

    room = context_length(policy.config, tokenizer) - max_new_tokens
    reward_room = reward.context_length - max_new_tokens
    every = read_prompts(prompts, tokenizer, template)
    judged = reward.lengths([conversation(prompt.messages, "") for prompt in every])
    kept: list[RolloutPrompt] = []
    dropped: list[str] = []
    for prompt, length in zip(every, judged, strict=True):
        if len(prompt.token_ids) <= room and length <= reward_room:
            kept.append(prompt)
        else:
            dropped.append(prompt.id)
    if not kept:
        raise DataError(
            f"none of {len(every)} prompts leaves room for max_new_tokens {max_new_tokens} in the context of "
            f"{room + max_new_tokens} (policy) or {reward.context_length} (reward model)"
        )
    return kept, dropped


def dated_judge(checkpoint: Checkpoint, device: str, stage: SharedStage, *, dtype: str = "auto") -> HFRewardModel:
    """The reward model, beside the policy that this process trains; its template keeps the stage's date."""
    import torch

    from almost_eval.rewards.hf import HFRewardModel

    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    judge = HFRewardModel(checkpoint, dtype=dtype, device=device)
    judge.template = stage.dated(judge.template, "reward_template")
    return judge


# --- more steps for a run that has ended or was killed ---
#
# The schedule is that of the new number of steps, from the step at which the run goes on. The steps before had the
# rates of the old number. Where these are the same (a constant rate, and no warm-up or one of the same length), the
# result is that of a run which was never stopped; elsewhere it is not, and one line says so.


def as_never_stopped(settings: RLSFSettings, earlier: Sequence[int]) -> bool:
    """Whether all updates had the learning rate that a run of `settings.steps`, the new number, gives them.

    `earlier` are the numbers of steps that the run had before, ascending.
    """
    updates = 1
    if settings.algorithm == "ppo":
        updates = settings.ppo_epochs * (settings.batch_size // settings.mini_batch_size)

    def factor(update: int, steps: int) -> float:
        return learning_rate_factor(update, steps * updates, settings.warmup_ratio, settings.schedule)

    return all(
        factor(update, steps) == factor(update, settings.steps)
        for before, steps in pairwise([0, *earlier])
        for update in range(before * updates, steps * updates)
    )


def growth_note(settings: RLSFSettings, earlier: Sequence[int]) -> str:
    """One line for the user; see `as_never_stopped`."""
    old, new = earlier[-1], settings.steps
    if as_never_stopped(settings, earlier):
        return f"{old} steps become {new}: the learning rates are those of a run of {new} steps from its start"
    return (
        f"{old} steps become {new}: the steps done had the learning rate of a run of {old} (warm-up and schedule), the "
        f"others have that of a run of {new}; the result is not that of one run of {new} steps"
    )


def last_checkpoint(work: Path, steps: int) -> Path | None:
    """The checkpoint after all steps, from which a run with more steps goes on."""
    names = (f"step-{steps:06d}", f"checkpoint-{steps}")  # PPO's, and that of TRL's trainers
    return next((work / name for name in names if (work / name).is_dir()), None)
