"""The PPO loop: sample, score, compare, update; checkpoints that resume to the same bits.

The parts of a step have a file each: `ppo_batch` samples and measures, `ppo_update` learns, `ppo` is the arithmetic.
What is trained, and how it is saved, is in `ppo_models`.

Departures from TRL's PPO trainer, which TRL has removed:

- The policy and the value model are two models with an optimizer each, spread over the processes as `sharding` says.
- There is no dropout.
- A checkpoint is taken after a step's batch was measured and before its update, so the policy of every checkpoint is
  known to be within the guards' bounds.
- Random numbers depend on (seed, step, row) alone, so a checkpoint holds no state of a generator.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace

from almost_eval.errors import InputError
from almost_eval.files import Row
from almost_eval.types import JSONObject
from almost_train.common.interrupts import ended_at, ended_before_any_step, save_requests
from almost_train.rlsf import checkpoint as checkpoints
from almost_train.rlsf import ppo
from almost_train.rlsf.certificate import certificate_summary
from almost_train.rlsf.job import SAMPLER_SETTINGS, Algorithm, Job, RLSFSettings
from almost_train.rlsf.log import StepLog, batch_row, last_good_step, refuse_non_finite, summary, verdict
from almost_train.rlsf.ppo import Moments, Rollout
from almost_train.rlsf.ppo_batch import collect
from almost_train.rlsf.ppo_models import PPOModels, State
from almost_train.rlsf.ppo_update import update
from almost_train.rlsf.samplers import make_sampler

OWN_SETTINGS = SAMPLER_SETTINGS | frozenset(
    "mini_batch_size sampling_batch_size ppo_epochs value_learning_rate value_clip gamma gae_lambda whiten_advantages "
    "normalise_rewards kl_controller kl_target kl_horizon".split()
)
"""Settings of PPO besides those that every algorithm takes."""


def update_size(settings: RLSFSettings) -> int:
    """Completions of one update of PPO.

    Raises:
        InputError: the batch is not a whole number of mini-batches.
    """
    if settings.batch_size % settings.mini_batch_size:
        raise InputError(
            f"batch_size {settings.batch_size} is not a multiple of mini_batch_size {settings.mini_batch_size}; every "
            "update takes as many completions"
        )
    return settings.mini_batch_size


def train(job: Job) -> JSONObject:
    """Run the loop to its end and save the policy; returns metrics."""
    settings = job.settings
    models, sampler = PPOModels(job), make_sampler(job)
    state = models.resume() or State(0, settings.kl_coefficient, Moments())
    stopped, policy_step = None, settings.steps
    with (
        closing(sampler),
        StepLog(job.output, state.step, active=job.is_first) as log,
        save_requests(settings.save_minutes) as saving,
        job.progress.track("RLSF (PPO)", settings.steps, state.step) as advance,
    ):
        for step in range(state.step, settings.steps + 1):
            began = time.monotonic()
            # 1. Sample, score and measure the policy as it is now.
            batch = collect(models, sampler, state)
            row = _measured(step, batch.rollout, state)
            if batch.certificate:
                row |= batch.certificate.row()
                if refusal := batch.certificate.refusal(step, settings.parity_limit, settings.on_parity):
                    log.step(row)
                    if step:
                        models.save(state)
                    raise refusal
            if step % settings.samples_every == 0 or step == settings.steps:
                log.samples(batch.samples)
            # 2. Go on only within bounds; the batch after the last update is there to be measured.
            stopped = verdict([*log.rows, row], settings.kl_limit, settings.guard_window)
            if stopped:
                policy_step = models.go_back(last_good_step([*log.rows, row], stopped, settings.guard_window))
            if stopped or step == settings.steps:
                log.step(row)
                if settings.keep_state and not stopped:  # before the update of a step that a longer run would make
                    models.save(state)
                break
            save, end = saving.now()
            if step and (save or step % settings.save_every == 0):
                models.save(state)
                saving.saved()
            if end:
                raise ended_at(step) if step else ended_before_any_step()
            if job.keeps(step):
                models.save_policy(step)
            # 3. Update.
            row |= update(models, batch.state, batch.rollout)
            state = _next(settings, batch.state, row)
            seconds = time.monotonic() - began
            tokens = row["length"] * settings.batch_size
            log.step({**row, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)})
            advance(1)
        done = len(log.rows) - 1
        metrics = {"steps": done, "policy_step": policy_step, "stopped": stopped, "value_model": models.value_origin}
        metrics |= summary(log.rows) | certificate_summary(log.rows, settings.parity_limit)
    models.save_policy()
    return metrics


def _measured(step: int, rollout: Rollout, state: State) -> Row:
    mask = rollout.completion_mask
    lengths = mask.sum(-1)
    row = batch_row(step, rollout.rewards.tolist(), lengths.tolist(), rollout.ended.tolist())
    k1 = ppo.masked_sum(ppo.kl_k1(rollout.logprobs, rollout.reference_logprobs), mask)
    k3 = ppo.masked_sum(ppo.kl_k3(rollout.logprobs, rollout.reference_logprobs), mask)
    row |= {"kl": float(k1) / len(mask), "kl_k3": float(k3) / len(mask)}  # nats a completion
    row |= {"cut_for_reward": int(rollout.shortened.sum())}
    refuse_non_finite(step, "KL", [row["kl"]])
    return row | {"entropy": float(ppo.masked_mean(rollout.entropy, mask)), "kl_coefficient": state.kl_coefficient}


def _next(settings: RLSFSettings, state: State, row: Row) -> State:
    coefficient = state.kl_coefficient
    if settings.kl_controller == "adaptive":
        coefficient = ppo.adapted_kl_coefficient(
            coefficient, row["kl"], settings.kl_target, settings.kl_horizon, settings.batch_size
        )
    return replace(state, step=state.step + 1, kl_coefficient=coefficient)


PPO = Algorithm(train, OWN_SETTINGS, update_size, checkpoints.folders)
