"""RLOO (arXiv 2402.14740) and GRPO (arXiv 2402.03300) through TRL's trainers, with the prompts, reward, logs and guards
of our PPO.

What differs from PPO, because TRL's trainers work so:

- There is one update a step, over all completions at once.
- A completion that does not fit the reward model's context is learnt from to its end. It is judged as if it ended
  there, and takes the EOS penalty.
- KL is in TRL's estimator (RLOO: k1 in the reward, GRPO: k3 in the loss).
- Rewards are not normalised: they are compared within a prompt.
- The batch after the last update, which is there to be measured, is a step of TRL's too. Its gradients are dropped.
- Resuming uses the Trainer's own checkpoints, which include a pickle of generator states.

The trainer is made in `trl_trainer`; `trl_watch` is what it tells us of each step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import InputError
from almost_eval.types import JSONObject
from almost_train.common.interrupts import ended_at, save_requests
from almost_train.common.lora import adapter_to_zero
from almost_train.common.processes import main_alone
from almost_train.common.sealed import undamaged
from almost_train.common.seeding import own_random_state
from almost_train.common.trainers import labelled_positions_alone
from almost_train.rlsf.certificate import certificate_summary
from almost_train.rlsf.job import SAMPLER_SETTINGS, Algorithm, Job, RLSFSettings, save_policy
from almost_train.rlsf.log import StepLog, last_good_step, summary, verdict
from almost_train.rlsf.models import load_saved
from almost_train.rlsf.trl_sampling import SamplerHook
from almost_train.rlsf.trl_trainer import make_trainer

if TYPE_CHECKING:
    from transformers import Trainer


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
    begin = main_alone(lambda: _step_of(undamaged(_folders(work), job.progress.notice)))
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
            save_policy(job, load_saved(work / f"checkpoint-{begin}"), begin)
        trainer, watch = make_trainer(job, log, advance, saving)
        if settings.sampler != "transformers":
            watch.hook = hook
            hook.attach(trainer)
        # 1. Train, unless an earlier process came to the end, or to where a guard stops, and no further.
        watch.stopped = verdict(log.rows, settings.kl_limit, settings.guard_window)
        if watch.stopped is None and begin < last:
            with labelled_positions_alone():
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
            save_policy(job, final if settings.lora_rank else load_saved(final))
        return metrics | summary(log.rows) | certificate_summary(log.rows, settings.parity_limit)


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


def _step_of(folders: Sequence[Path]) -> int:
    """Steps of the last of these checkpoints; 0 for none."""
    return int(folders[-1].name.split("-")[1]) if folders else 0


def _first(job: Job, trainer: Trainer) -> Path:
    """A folder with the policy that training began with."""
    if not job.settings.lora_rank:
        return job.policy.path
    assert trainer.model is not None
    adapter_to_zero(trainer.model)
    trainer.save_model(str(job.work / "first"))
    return job.work / "first"


RLOO = Algorithm(train, SAMPLER_SETTINGS | {"num_generations", "whiten_advantages"}, update_size, _folders)
GRPO = Algorithm(train, SAMPLER_SETTINGS | {"num_generations", "loss_type"}, update_size, _folders)
