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
from pathlib import Path

from almost_eval.errors import DataError, InputError, RunError
from almost_eval.models.checkpoint import context_length, find_checkpoint, refuse_adapter
from almost_eval.progress import Progress
from almost_eval.types import Conversation, JSONObject
from almost_train.common.formats import read_prompt_rows
from almost_train.common.interrupts import what_is_kept
from almost_train.common.lora import BASE, base_dtype, check_lora
from almost_train.common.merge import whole_base
from almost_train.common.processes import WORK, is_main, shared_stage, world_size
from almost_train.common.stage import model_input
from almost_train.common.tables import read_any
from almost_train.common.trainers import keep_template
from almost_train.rlsf.job import Job, RLSFSettings, check_settings
from almost_train.rlsf.log import NotFinite


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
        the policy is then the newest checkpoint before it broke out, `metrics["policy_step"]`.

    Raises:
        InputError: settings that do not go together, prompts or models that cannot be used.
        RunError: a loss or a reward that is not finite.
    """
    algorithm = check_settings(settings)
    check_lora(settings, settings.device)
    settings = replace(settings, micro_batch_size=check_shares(settings, algorithm.update_size(settings)))
    table = read_any(prompts)
    source = read_prompt_rows(table)
    inputs: dict[str, Path | str] = {
        "prompts": table.input,
        "policy": model_input(policy),
        "reward_model": model_input(reward_model),
    }
    with shared_stage(output, "rlsf", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result
        job = _prepare(settings, source.records, policy, reward_model, output, progress or Progress())
        try:
            metrics = algorithm.train(job)
        except NotFinite as error:
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
        }
        return stage.finish(metrics, {"policy": output / "policy", "samples": output / "samples.jsonl"})


# --- before any weight is loaded ---


def check_shares(settings: RLSFSettings, update: int) -> int:
    """Completions of one pass of a process: `micro_batch_size`, or less where an update has fewer for each process.

    Args:
        settings: of the run.
        update: completions of one update.

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
    output: Path,
    progress: Progress,
) -> Job:
    checkpoint = find_checkpoint(policy)
    reward_checkpoint = find_checkpoint(reward_model, architectures=("SequenceClassification", "RewardModel"))
    if settings.is_quantized and settings.algorithm == "ppo":
        refuse_adapter(reward_checkpoint, f"the value model of --quantize {settings.quantize}")
    from almost_eval.models.loading import load_tokenizer
    from almost_eval.models.tensors import check_weights
    from almost_eval.rewards.hf import HFRewardModel
    from almost_train.rlsf.rollouts import RolloutPrompt, conversation, read_prompts

    tokenizer = load_tokenizer(checkpoint)
    check_weights(checkpoint, "AutoModelForCausalLM")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {policy} has no EOS token, so no completion could end; set eos_token")
    template = keep_template(tokenizer)
    reward = HFRewardModel(reward_checkpoint, device=_own_device(settings.device))
    # A prompt with no room for an answer is left out and counted, by the measure of either model. An answer of
    # max_new_tokens may be longer in the reward model's tokens: `shorten_for_reward` ends it where they are used up.
    room = context_length(checkpoint.config, tokenizer) - settings.max_new_tokens
    reward_room = reward.context_length - settings.max_new_tokens
    every = read_prompts(prompts, tokenizer, template)
    judged = reward.lengths([conversation(prompt.messages, "") for prompt in every])
    kept: list[RolloutPrompt] = []
    dropped: list[RolloutPrompt] = []
    for prompt, length in zip(every, judged, strict=True):
        fits = len(prompt.token_ids) <= room and length <= reward_room
        (kept if fits else dropped).append(prompt)
    if not kept:
        raise DataError(
            f"none of {len(every)} prompts leaves room for max_new_tokens {settings.max_new_tokens} in the context of "
            f"{room + settings.max_new_tokens} (policy) or {reward.context_length} (reward model)"
        )
    # A new adapter must name weights that are on disk, and TRL reads its reference from the policy's folder.
    held = base_dtype(settings, bf16=settings.bf16)
    if settings.lora_rank:
        checkpoint = whole_base(checkpoint, output / BASE, held)
    elif settings.algorithm != "ppo":
        checkpoint = whole_base(checkpoint, output / WORK / BASE, held)
    return Job(
        settings=settings,
        prompts=kept,
        prompts_too_long=[prompt.id for prompt in dropped],
        policy=checkpoint,
        tokenizer=tokenizer,
        template=template,
        reward=reward,
        output=output,
        processes=world_size(),
        is_first=is_main(),
        progress=progress if is_main() else Progress(),
    )


def _own_device(device: str) -> str:
    """The reward model's device: beside the policy that this process trains."""
    import torch

    if device == "auto" and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device
