"""RLOO (arXiv 2402.14740) and GRPO (arXiv 2402.03300) through TRL's trainers, with the prompts, reward, logs and guards
of our PPO.

What differs from PPO, because TRL's trainers work so:

- There is one update a step, over all completions at once.
- Only EOS ends a completion. One that opens the next turn, or does not fit the reward model's context, is sampled to
  EOS or the token limit. It is judged as if it ended there, and takes the EOS penalty. (vLLM ends it at a stop string,
  as in PPO.)
- KL is in TRL's estimator (RLOO: k1 in the reward, GRPO: k3 in the loss).
- Rewards are not normalised: they are compared within a prompt.
- The batch after the last update, which is there to be measured, is a step of TRL's too. Its gradients are dropped.
- Resuming uses the Trainer's own checkpoints, which include a pickle of generator states.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, TrainerCallback

from almost_eval.errors import InputError, TemplateError
from almost_eval.files import Row
from almost_eval.models.chat import special_tokens
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import attention_arguments
from almost_eval.types import JSONObject
from almost_train.common.interrupts import SaveRequests, ended_at, save_requests
from almost_train.common.lora import (
    adapter_to_zero,
    base_dtype,
    layers_named,
    lora_config,
    quantization,
    ready_for_lora,
    set_lora_dropout,
    settle_config,
    train_in_float32,
)
from almost_train.common.schedule import learning_rate_factor
from almost_train.common.seeding import own_random_state
from almost_train.common.trainers import QuietTrainer
from almost_train.rlsf.certificate import certificate_summary
from almost_train.rlsf.job import SAMPLER_SETTINGS, Algorithm, Job, RLSFSettings, save_policy
from almost_train.rlsf.log import (
    SAMPLES,
    StepLog,
    batch_row,
    last_good_step,
    refuse_non_finite,
    sample_row,
    summary,
    verdict,
)
from almost_train.rlsf.models import load_policy
from almost_train.rlsf.rollouts import as_sampled, batch_prompts, conversation, end_ids, shorten_for_reward
from almost_train.rlsf.trl_sampling import SamplerHook

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments


def update_size(settings: RLSFSettings) -> int:
    """Completions of one update of TRL's trainers.

    Raises:
        InputError: settings that TRL cannot follow.
    """
    if settings.batch_size % settings.num_generations:
        raise InputError(
            f"batch_size {settings.batch_size} is not a multiple of num_generations {settings.num_generations}; all "
            "completions of a prompt are in one batch"
        )
    if settings.kl_coefficient == 0:
        raise InputError(
            "TRL measures KL only where it is penalised, and kl_limit needs it; use a kl_coefficient above 0"
        )
    if settings.device.startswith("cuda:"):
        raise InputError(f"TRL takes the first GPU it sees; set CUDA_VISIBLE_DEVICES instead of {settings.device}")
    return settings.batch_size


def train(job: Job) -> JSONObject:
    """Run TRL's trainer to its end and save the policy; returns metrics."""
    settings, work = job.settings, job.work
    last = settings.steps + 1  # as TRL counts: the last of them measures the trained policy, and changes nothing
    begin = max(_checkpoints(work), default=0)
    with (
        own_random_state(),
        StepLog(job.output, begin, active=job.is_first) as log,
        save_requests(settings.save_minutes) as saving,
        closing(SamplerHook(job)) as hook,
        job.progress.track(
            f"RLSF ({settings.algorithm.upper()})", settings.steps, min(begin, settings.steps)
        ) as advance,
    ):
        if (
            begin and job.is_first and job.keeps(begin) and not job.kept(begin).exists()
        ):  # the last step of a shorter run
            save_policy(job, _saved(work / f"checkpoint-{begin}"), begin)
        trainer, watch = _trainer(job, log, advance, saving)
        if settings.sampler != "transformers":
            watch.hook = hook
            hook.attach(trainer)
        # 1. Train, unless an earlier process came to the end, or to where a guard stops, and no further.
        watch.stopped = verdict(log.rows, settings.kl_limit, settings.guard_window)
        if watch.stopped is None and begin < last:
            trainer.train(resume_from_checkpoint=str(work / f"checkpoint-{begin}") if begin else None)
            if watch.stopped is None and trainer.state.global_step < last:
                raise ended_at(trainer.state.global_step)
        # 2. The last policy, or after a guard's stop the last good one.
        policy_step, final = settings.steps, work / f"checkpoint-{last}"
        if watch.stopped is not None:
            # A row describes the policy before its update, and checkpoint n is the policy before row n.
            good = last_good_step(log.rows, watch.stopped, settings.guard_window)
            policy_step = max((at for at in _checkpoints(work) if at <= good), default=0)
            final = work / f"checkpoint-{policy_step}" if policy_step else _first(job, trainer)
        elif begin < last:
            final = work / "final"
            trainer.save_model(str(final))  # gathers what FSDP or DeepSpeed has spread out
        done = min(len(log.rows), settings.steps)  # a guard stops after an update, but at the end
        metrics = {"steps": done, "policy_step": policy_step, "stopped": watch.stopped}
        trainer.accelerator.wait_for_everyone()
        if job.is_first:
            save_policy(job, final if settings.lora_rank else _saved(final))
        return metrics | summary(log.rows) | certificate_summary(log.rows, settings.parity_limit)


class _Watch(TrainerCallback):
    """Collects what the reward function sees, and makes a row of it with what the trainer logs."""

    def __init__(
        self, job: Job, log: StepLog, advance: Callable[[int], None], saving: SaveRequests, ends: frozenset[int]
    ) -> None:
        self.stopped: str | None = None
        """The guard that ended training."""
        self.hook: SamplerHook | None = None
        """Where vLLM draws the completions."""
        self.trainer: Trainer
        """What it watches; set once the trainer is made."""
        self._job, self._log, self._advance, self._ends = job, log, advance, ends
        self._saving = saving
        self._prompts = {prompt.id: prompt for prompt in job.prompts}
        self._pending: list[Row] = []
        self._began = time.monotonic()

    def reward(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        *,
        trainer_state: TrainerState,
        id: list[str],
        **_: object,
    ) -> list[float]:
        """TRL's reward function: raw logits, less the EOS penalty where it is due. `id` is a column."""
        job, settings, step = self._job, self._job.settings, trainer_state.global_step
        sampled = [as_sampled(job.tokenizer, ids, self._ends, settings.stop) for ids in completion_ids]
        asked = [self._prompts[prompt_id] for prompt_id in id]
        answers = shorten_for_reward(sampled, [prompt.messages for prompt in asked], job.reward, job.tokenizer)
        rewards = job.reward.score(
            [conversation(prompt.messages, answer.text) for prompt, answer in zip(asked, answers, strict=True)]
        )
        refuse_non_finite(step, "reward", rewards)
        self._pending += [
            {
                **sample_row(step, prompt.id, prompt.text, answer.text, reward, answer.ended),
                "tokens": len(ids),
                "shortened": answer.shortened,
            }
            for prompt, answer, reward, ids in zip(asked, answers, rewards, completion_ids, strict=True)
        ]
        return [r - settings.eos_penalty * (not a.ended) for r, a in zip(rewards, answers, strict=True)]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Row | None = None,
        **_: object,
    ) -> None:
        """One step is over: its row, its samples, the guards' verdict."""
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        batch = gather_object(self._pending)
        self._pending = []
        settings, step = self._job.settings, state.global_step - 1
        row = batch_row(step, *([sample[key] for sample in batch] for key in ("reward", "tokens", "ended")))
        # TRL's KL is the mean over tokens, ours is of a completion.
        row |= {"kl": logs["kl"] * row["length"], "entropy": logs.get("entropy")}
        row |= {"kl_coefficient": settings.kl_coefficient}
        row |= {"cut_for_reward": sum(sample["shortened"] for sample in batch)}
        row |= self.hook.certificate.row() if self.hook and self.hook.certificate else {}
        refuse_non_finite(step, "KL", [row["kl"]])
        if updated := step < settings.steps:
            refuse_non_finite(step, "loss and gradient", [logs["loss"], logs.get("grad_norm", 0.0)])
            row |= {"policy_loss": logs["loss"], "clip_share": logs.get("clip_ratio/region_mean")}
            row |= {"learning_rate": logs.get("learning_rate")}
        seconds = time.monotonic() - self._began
        row |= {"seconds": round(seconds, 3), "tokens_per_second": round(row["length"] * len(batch) / seconds, 1)}
        self._began = time.monotonic()
        self._log.step(row)
        if step % settings.samples_every == 0 or not updated:
            inner = ("tokens", "shortened")
            self._log.samples([{k: v for k, v in sample.items() if k not in inner} for sample in batch[:SAMPLES]])
        self.stopped = verdict(self._log.rows, settings.kl_limit, settings.guard_window)
        control.should_training_stop = control.should_training_stop or self.stopped is not None
        if self._job.keeps(state.global_step):
            self._keep(state.global_step)
        if updated:
            self._advance(1)

    def _keep(self, step: int) -> None:
        """The policy after this step's update goes to `policies/`."""
        scratch = self._job.work / "kept"
        self.trainer.save_model(str(scratch))  # gathers what FSDP or DeepSpeed has spread out
        if self._job.is_first:
            save_policy(self._job, scratch if self._job.settings.lora_rank else _saved(scratch), step)
            shutil.rmtree(scratch)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """The step that measures the trained policy has no update."""
        if state.global_step == self._job.settings.steps:
            assert self.trainer.model is not None
            self.trainer.model.zero_grad()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Save as the clock or a signal says."""
        save, end = self._saving.now()
        control.should_save = control.should_save or (save and state.global_step < state.max_steps)
        control.should_training_stop = control.should_training_stop or end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """The clock starts anew."""
        self._saving.saved()


def _trainer(job: Job, log: StepLog, advance: Callable[[int], None], saving: SaveRequests) -> tuple[Trainer, _Watch]:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    settings = job.settings
    # 1. Settings under TRL's names. Those whose default in TRL differs from ours are set too.
    arguments: JSONObject = {
        "output_dir": str(job.work),
        "max_steps": settings.steps + 1,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // (settings.micro_batch_size * job.processes),
        "num_generations": settings.num_generations,
        "num_iterations": 1,
        "shuffle_dataset": False,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "beta": settings.kl_coefficient,
        "epsilon": settings.clip,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "disable_dropout": not settings.lora_dropout,  # the policy has none of its own
        "ddp_find_unused_parameters": False,
        "use_cpu": settings.device == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),  # without an accelerator torch warns of it
        "seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "save_total_limit": settings.guard_window // settings.save_every + 3,  # as far back as a guard may go
        "report_to": "none",
        "disable_tqdm": True,
    }
    if settings.algorithm == "rloo":
        arguments["normalize_advantages"] = settings.whiten_advantages
    else:
        arguments["loss_type"] = settings.loss_type
        # Dr. GRPO's second half: a prompt whose completions are rewarded alike counts no more than another.
        arguments["scale_rewards"] = "none" if settings.loss_type == "dr_grpo" else "group"
    config, trainer_class = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[settings.algorithm]
    # 2. Models and data. TRL pads, and so changes the tokenizer: it gets a copy.
    policy = load_policy(job.policy, "cpu", base_dtype(settings, bf16=settings.bf16), quantization(settings))
    watch = _Watch(job, log, advance, saving, frozenset(end_ids(policy, job.tokenizer)))

    class PolicyTrainer(QuietTrainer, trainer_class):  # type: ignore[misc, valid-type]
        """TRL's, with our learning rate. The adapter's dropout is for updates alone, not for samples."""

        def _generate_and_score_completions(self, inputs: list[Row]) -> JSONObject:
            set_lora_dropout(self.model, active=False)
            batch: JSONObject = super()._generate_and_score_completions(inputs)
            set_lora_dropout(self.model, active=True)
            return batch

    with layers_named(settings):
        trainer = PolicyTrainer(
            model=ready_for_lora(policy, settings),
            reward_funcs=watch.reward,
            args=config(**arguments),
            train_dataset=_dataset(job),
            processing_class=copy.deepcopy(job.tokenizer),
            callbacks=[watch],
            # TRL puts it on: with an adapter of its own making, its reference is the base with the adapter off.
            peft_config=lora_config(settings, "CAUSAL_LM") if settings.lora_rank else None,
        )
    trainer.rate_factor = lambda step: (
        learning_rate_factor(step, settings.steps, settings.warmup_ratio, settings.schedule)
        if step < settings.steps
        else 0.0
    )
    if settings.lora_rank:
        settle_config(trainer.model, job.policy.path)
    if settings.is_quantized:
        train_in_float32(trainer.model)
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    return trainer, watch


def _dataset(job: Job) -> Dataset:
    """The prompts of all steps in our order, as one epoch: in a second, TRL's own order would not resume as it was."""
    from datasets import Dataset

    bos, texts = special_tokens(job.tokenizer).get("bos_token", ""), {}
    for prompt in job.prompts:
        # TRL lets the tokenizer add its BOS, also where the template has written one.
        forms = (prompt.rendered, prompt.rendered.lstrip().removeprefix(bos))
        text = next((f for f in forms if tuple(job.tokenizer(text=f)["input_ids"]) == prompt.token_ids), None)
        if text is None:
            raise TemplateError(
                f"TRL would give the policy other tokens for prompt {prompt.id} than the chat template does (the "
                "tokenizer adds BOS or EOS in its own way); use --algorithm ppo"
            )
        texts[prompt.token_ids] = text
    size = job.settings.batch_size // job.settings.num_generations
    return Dataset.from_list(
        [
            {"prompt": texts[prompt.token_ids], "id": prompt.id}
            for step in range(job.settings.steps + 1)
            for prompt in batch_prompts(job.prompts, job.settings.seed, step, size)
        ]
    )


# --- checkpoints ---


def _checkpoints(work: Path) -> list[int]:
    """Steps of the Trainer's checkpoints that were written to their end, oldest first."""
    steps = []
    for state in work.glob("checkpoint-*/trainer_state.json"):  # written last
        with suppress(ValueError):
            json.loads(state.read_text(encoding="utf-8"))
            steps.append(int(state.parent.name.split("-")[1]))
    return sorted(steps)


def _folders(work: Path) -> list[Path]:
    return [work / f"checkpoint-{step}" for step in _checkpoints(work)]


def _first(job: Job, trainer: Trainer) -> Path:
    """A folder with the policy that training began with."""
    if not job.settings.lora_rank:
        return job.policy.path
    assert trainer.model is not None
    adapter_to_zero(trainer.model)
    trainer.save_model(str(job.work / "first"))
    return job.work / "first"


def _saved(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **attention_arguments(find_checkpoint(str(folder)))
    )


RLOO = Algorithm(train, SAMPLER_SETTINGS | {"num_generations", "whiten_advantages"}, update_size, _folders)
GRPO = Algorithm(train, SAMPLER_SETTINGS | {"num_generations", "loss_type"}, update_size, _folders)
