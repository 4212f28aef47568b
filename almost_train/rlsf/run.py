"""RLSF, reinforcement learning from synthetic feedback: the SFT policy, the reward model's opinion, a KL penalty.

ALMoST's third step (arXiv 2305.13735), which its authors did not release. PPO is our own loop (`rlsf_ppo`, `ppo`);
RLOO and GRPO are TRL's trainers (`rlsf_trl`), with the same prompts, reward, logs, guards and result.

Runs under `accelerate launch`: every size in the settings is that of all processes together, so a run on two processes
is the run on one, up to rounding.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import DataError, InputError
from almost_eval.files import read_rows
from almost_eval.models.chat import ChatTemplate, load_template
from almost_eval.models.checkpoint import Checkpoint, context_length, find_checkpoint
from almost_eval.progress import Progress
from almost_train.common.config import option
from almost_train.common.processes import WORK, is_main, shared_stage, world_size
from almost_train.common.stage import model_input

if TYPE_CHECKING:
    from almost_eval.rewards.hf import HFRewardModel
    from almost_train.rlsf.rollouts import Prompt

ALGORITHMS = ("ppo", "rloo", "grpo")


@dataclass(frozen=True, slots=True)
class RLSFSettings:
    """How the policy is trained. Sizes are in completions, over all processes."""

    algorithm: str = option("ppo", "PPO (own loop), or RLOO or GRPO (TRL's).", choices=ALGORITHMS)
    steps: int = option(500, "Batches of completions to sample and learn from.", least=1)
    batch_size: int = option(64, "Completions sampled in a step.", least=1)
    mini_batch_size: int = option(16, "Completions in one update (PPO; RLOO and GRPO make one update a step).", least=1)
    micro_batch_size: int = option(4, "Completions in one forward and backward pass of a process.", least=1)
    sampling_batch_size: int = option(32, "Completions sampled at once by a process (PPO).", least=1)
    num_generations: int = option(4, "Completions of one prompt that are compared (RLOO, GRPO).", least=2)
    ppo_epochs: int = option(4, "Passes over a batch (PPO).", least=1)
    learning_rate: float = option(1e-6, "Peak, AdamW, of the policy.", above=0)
    value_learning_rate: float | None = option(None, "Of the value model; as the policy's where not given.", above=0)
    schedule: str = option("constant", "Learning rate after warm-up.", choices=("constant", "linear", "cosine"))
    warmup_ratio: float = option(0.03, "Share of the updates over which the learning rate rises.", least=0, most=1)
    weight_decay: float = option(0.0, "AdamW's.", least=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", above=0)
    max_new_tokens: int = option(256, "Longest completion, tokens.", least=1)
    temperature: float = option(1.0, "Of sampling, and of every log-probability.", above=0)
    stop: tuple[str, ...] = option(
        ("\n\nHuman:", "\n\nAssistant:"), "Text that ends a completion, besides EOS; it earns the penalty."
    )
    clip: float = option(0.2, "Probability ratios count up to 1 +- this.", above=0)
    value_clip: float = option(0.2, "A value may usefully move by this in a step (PPO).", above=0)
    gamma: float = option(1.0, "Discount of a token (PPO).", least=0, most=1)
    gae_lambda: float = option(0.95, "Of generalised advantage estimation (PPO).", least=0, most=1)
    whiten_advantages: bool = option(True, "Scale advantages to mean 0, deviation 1 over a batch (PPO, RLOO).")
    kl_coefficient: float = option(0.1, "Reward for a nat of KL to the SFT policy, taken off.", least=0)
    kl_controller: str = option(
        "adaptive", "Keep KL near its target, or the coefficient (PPO).", choices=("adaptive", "fixed")
    )
    kl_target: float = option(6.0, "Nats a completion (PPO, adaptive).", above=0)
    kl_horizon: float = option(10000.0, "Completions over which the coefficient may change by a fifth.", above=0)
    kl_limit: float = option(50.0, "Stop where the KL of a completion is beyond this, nats.", above=0)
    guard_window: int = option(
        20, "Stop where over so many steps the reward rises and the length-adjusted reward falls; 0: never.", least=0
    )
    normalise_rewards: str = option(
        "running",
        "Shift and scale rewards by mean and deviation: so far, or of the first batch, the SFT policy's (PPO).",
        choices=("running", "sft", "none"),
    )
    eos_penalty: float = option(1.0, "Taken off the (normalised) reward of a completion without EOS.", least=0)
    seed: int = option(0, "Of prompt order, sampling and mini-batches.", least=0)
    bf16: bool = option(False, "Compute in bfloat16; master weights stay float32.")
    gradient_checkpointing: bool = option(False, "Compute activations twice, keep few of them.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1.")
    save_every: int = option(20, "Steps between checkpoints.", least=1)
    samples_every: int = option(10, "Steps between entries of samples.jsonl.", least=1)
    keep_every: int = option(
        0, "Steps between policies kept in policies/, each a whole model, for almost-eval tax; 0: none.", least=0
    )


@dataclass(frozen=True, slots=True)
class Job:
    """What a run is about, checked; no weight is loaded yet."""

    settings: RLSFSettings
    prompts: list[Prompt]
    prompts_too_long: list[str]
    """Ids of prompts that leave no room for an answer."""
    policy: Checkpoint
    tokenizer: Any
    template: ChatTemplate
    reward: HFRewardModel
    output: Path
    processes: int
    is_first: bool
    """Whether this process is the one that writes."""
    progress: Progress

    @property
    def work(self) -> Path:
        """Checkpoints to resume from; removed at the end."""
        return self.output / WORK

    def keeps(self, step: int) -> bool:
        """Whether the policy after `step` steps is one to keep; the last is, anyway."""
        every = self.settings.keep_every
        return bool(every and 0 < step < self.settings.steps and step % every == 0)


def rlsf(
    settings: RLSFSettings,
    prompts: Path,
    policy: str,
    reward_model: str,
    output: Path,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a policy on the reward model's opinion of its own answers.

    Args:
        settings: how.
        prompts: `prompts.jsonl`: `id`, `prompt`.
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
    _refuse_settings(settings, world_size())
    inputs: dict[str, Path | str] = {
        "prompts": prompts,
        "policy": model_input(policy),
        "reward_model": model_input(reward_model),
    }
    with shared_stage(output, "rlsf", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result
        job = _prepare(settings, prompts, policy, reward_model, output, progress or Progress())
        metrics = _trainer(settings.algorithm)(job)
        metrics = {
            "algorithm": settings.algorithm,
            **metrics,
            "prompts": len(job.prompts),
            "prompts_too_long": len(job.prompts_too_long),
            "prompts_too_long_ids": job.prompts_too_long[:20],
            "processes": job.processes,
        }
        return stage.finish(metrics, {"policy": output / "policy", "samples": output / "samples.jsonl"})


def _trainer(algorithm: str) -> Callable[[Job], dict[str, Any]]:
    if algorithm == "ppo":
        from almost_train.rlsf.loop import train
    else:  # TRL is imported where it is used
        from almost_train.rlsf.trl import train
    return train


# --- before any weight is loaded ---


def _refuse_settings(settings: RLSFSettings, processes: int) -> None:
    if "" in settings.stop:
        raise InputError("an empty stop string would end every completion at once; leave it out")
    if settings.algorithm == "ppo":
        update = settings.mini_batch_size
        if settings.batch_size % update:
            raise InputError(
                f"batch_size {settings.batch_size} is not a multiple of mini_batch_size {update}; every update takes "
                "as many completions"
            )
    else:
        update = settings.batch_size
        if update % settings.num_generations:
            raise InputError(
                f"batch_size {update} is not a multiple of num_generations {settings.num_generations}; all completions "
                "of a prompt are in one batch"
            )
        if settings.kl_coefficient == 0:
            raise InputError(
                "TRL measures KL only where it is penalised, and kl_limit needs it; use a kl_coefficient above 0"
            )
        if settings.device.startswith("cuda:"):
            raise InputError(f"TRL takes the first GPU it sees; set CUDA_VISIBLE_DEVICES instead of {settings.device}")
    if update % (settings.micro_batch_size * processes):
        raise InputError(
            f"an update of {update} completions does not divide among {processes} processes with micro_batch_size "
            f"{settings.micro_batch_size}; choose one that {update} is a multiple of"
        )


def _prepare(
    settings: RLSFSettings,
    prompts: Path,
    policy: str,
    reward_model: str,
    output: Path,
    progress: Progress,
) -> Job:
    rows = read_rows(prompts, {"id": str, "prompt": str})
    checkpoint = find_checkpoint(policy)
    reward_checkpoint = find_checkpoint(reward_model, architectures=("SequenceClassification", "RewardModel"))
    from almost_eval.models.loading import load_tokenizer
    from almost_eval.rewards.hf import HFRewardModel
    from almost_train.rlsf.rollouts import conversation, read_prompts

    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {policy} has no EOS token, so no completion could end; set eos_token")
    template = load_template("auto", tokenizer)
    assert template is not None  # only `none` is
    reward = HFRewardModel(reward_checkpoint, device=_own_device(settings.device))
    # A prompt with no room for an answer is left out and counted, by the measure of either model.
    room = context_length(checkpoint.config, tokenizer) - settings.max_new_tokens
    reward_room = reward.context_length - settings.max_new_tokens
    given = read_prompts(rows, tokenizer, template)
    judged = reward.lengths([conversation(prompt.text, "") for prompt in given])
    kept: list[Prompt] = []
    dropped: list[Prompt] = []
    for prompt, length in zip(given, judged, strict=True):
        fits = len(prompt.token_ids) <= room and length <= reward_room and prompt.token_ids
        (kept if fits else dropped).append(prompt)
    if not kept:
        raise DataError(
            f"no prompt of {prompts} can be used: {len(given)} in all, {len(dropped)} of them empty or leaving no room "
            f"for max_new_tokens {settings.max_new_tokens} in the context of {room + settings.max_new_tokens} (policy) "
            f"or {reward.context_length} (reward model)"
        )
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


# --- at the end ---


def save_policy(job: Job, model: Any, step: int | None = None) -> None:
    """`policy/`, or that of a step, whole or not at all: weights, configuration, tokenizer and chat template.

    With `bf16` the model itself is converted: pass a copy of one that goes on training.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder = job.output / "policy" if step is None else job.output / "policies" / f"step-{step:06d}"
    scratch = job.work / "policy"
    shutil.rmtree(scratch, ignore_errors=True)
    if not job.tokenizer.chat_template:
        job.tokenizer.chat_template = job.template.source
    (model.to(torch.bfloat16) if job.settings.bf16 else model).save_pretrained(scratch)
    job.tokenizer.save_pretrained(scratch)
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
