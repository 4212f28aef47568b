"""What is seen of a training by TRL's trainers: rewards, the rows of the log, the guards' verdict, kept policies."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from transformers import TrainerCallback

from almost_eval.files import Row
from almost_train.common.interrupts import SaveRequests
from almost_train.common.processes import wait_for_all
from almost_train.common.sealed import seal
from almost_train.rlsf.job import Job, save_policy
from almost_train.rlsf.log import SAMPLES, StepLog, batch_row, refuse_non_finite, sample_row, verdict
from almost_train.rlsf.models import load_saved
from almost_train.rlsf.rollouts import as_sampled, conversation, shorten_for_reward
from almost_train.rlsf.trl_sampling import SamplerHook

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class PolicyWatch(TrainerCallback):
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
        # TRL's KL is the mean over tokens, ours is of a completion; None is how TRL says that it is not finite.
        kl = math.nan if logs["kl"] is None else logs["kl"]
        row |= {"kl": kl * row["length"], "entropy": logs.get("entropy")}
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
            save_policy(self._job, scratch if self._job.settings.lora_rank else load_saved(scratch), step)
            shutil.rmtree(scratch)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """The step that measures the trained policy has no update."""
        if state.global_step == self._job.settings.steps:
            assert self.trainer.model is not None
            self.trainer.model.zero_grad()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Save as the clock or a signal says, and where a run of more steps would go on."""
        save, end = self._saving.now()
        save = save or (self._job.settings.keep_state and state.global_step == self._job.settings.steps)
        control.should_save = control.should_save or (save and state.global_step < state.max_steps)
        control.should_training_stop = control.should_training_stop or end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """The checkpoint is written to its end; the clock starts anew."""
        wait_for_all()  # every process has written its share
        if self._job.is_first:
            seal(self._job.work / f"checkpoint-{state.global_step}")
        self._saving.saved()
