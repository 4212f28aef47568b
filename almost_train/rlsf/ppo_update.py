"""The updates of PPO: every epoch over a batch, in mini-batches, each of them one step of policy and value model.

Losses are divided by the tokens of the whole mini-batch, so micro-batches and processes change only the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from almost_eval.files import Row
from almost_train.common.lora import set_lora_dropout
from almost_train.common.schedule import learning_rate_factor
from almost_train.rlsf import ppo
from almost_train.rlsf.log import refuse_non_finite
from almost_train.rlsf.models import completion_values
from almost_train.rlsf.ppo import Rollout
from almost_train.rlsf.ppo_models import PPOModels, State
from almost_train.rlsf.rollouts import completion_logprobs


def update(models: PPOModels, state: State, rollout: Rollout) -> Row:
    """All epochs over a batch; what they did, as columns of the log.

    Raises:
        NotFinite: a loss or a gradient is not finite.
    """
    settings, mask = models.settings, rollout.completion_mask
    scores = rollout.rewards
    if settings.normalise_rewards != "none":
        scores = (scores - state.moments.mean) / state.moments.std
    scores = scores - settings.eos_penalty * (~rollout.ended).to(scores.dtype)
    kl = ppo.kl_k1(rollout.logprobs, rollout.reference_logprobs)
    shaped = ppo.shaped_rewards(scores, kl, mask, state.kl_coefficient)
    target = ppo.gae(shaped, rollout.values, mask, settings.gamma, settings.gae_lambda)
    advantages = ppo.whiten(target.advantages, mask) if settings.whiten_advantages else target.advantages
    if settings.gradient_checkpointing:
        models.policy.train()
        models.value.train()
    totals, updates = torch.zeros(5, device=mask.device), 0
    first_error, minis = 0.0, settings.batch_size // settings.mini_batch_size
    for epoch in range(settings.ppo_epochs):
        order = np.random.default_rng((settings.seed, state.step, settings.batch_size + epoch))
        for rows in np.split(order.permutation(settings.batch_size), minis):
            rate = _set_rates(models, state.step * settings.ppo_epochs * minis + updates)
            with _lora_dropout(models, state.step, updates):
                sums, error = _mini_batch(models, state.step, rollout, advantages, target.returns, rows)
            totals += sums
            first_error = error if updates == 0 else first_error
            updates += 1
    clipped, value_clipped, tokens, policy_loss, value_loss = totals.tolist()
    return {
        "score": float(scores.mean()),
        "policy_loss": policy_loss / updates,
        "value_loss": value_loss / updates,
        "clip_share": clipped / tokens,
        "value_clip_share": value_clipped / tokens,
        "explained_variance": ppo.explained_variance(rollout.values, target.returns, mask),
        "first_ratio_error": first_error,
        "learning_rate": rate,
    }


def _mini_batch(
    models: PPOModels, step: int, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: NDArray[np.int64]
) -> tuple[Tensor, float]:
    """One update of both models. Returns sums over all processes, and the largest ratio error."""
    settings, weights = models.settings, rollout.importance_weights
    tokens = float(rollout.completion_mask[rows].sum())
    mine = rows[models.rank :: models.processes]
    sums, error = torch.zeros(5, device=advantages.device), 0.0
    for begin in range(0, len(mine), settings.micro_batch_size):
        some, last = mine[begin : begin + settings.micro_batch_size], begin + settings.micro_batch_size >= len(mine)
        mask, width = rollout.completion_mask[some], rollout.completion_mask.shape[1]
        ids, attention = rollout.input_ids[some], rollout.attention_mask[some]
        with ExitStack() as stack:
            for trained in models.models:
                stack.enter_context(models.spread.accumulating(trained, last=last))
            with models.accelerator.autocast():
                logprobs = completion_logprobs(models.policy, ids, attention, width, settings.temperature)
            policy = ppo.policy_loss(
                logprobs,
                rollout.logprobs[some],
                advantages[some],
                mask,
                settings.clip,
                tokens,
                None if weights is None else weights[some],
            )
            # Data parallelism takes the mean over processes; the loss is a share of the whole already.
            models.spread.backward(models.trained_policy, policy.loss * models.processes, last=last)
            with models.accelerator.autocast():
                values = completion_values(models.value, ids, attention, width)
            value = ppo.value_loss(values, rollout.values[some], returns[some], mask, settings.value_clip, tokens)
            models.spread.backward(models.trained_value, value.loss * models.processes, last=last)
        sums += torch.stack([policy.clipped, value.clipped, mask.sum(), policy.loss.detach(), value.loss.detach()])
        error = max(error, float(policy.largest_ratio_error))
    sums = models.accelerator.reduce(sums, "sum")
    refuse_non_finite(step, "loss", sums.tolist())
    for trained in models.models:
        models.spread.update(trained, lambda norm: refuse_non_finite(step, "gradient", [norm]))
    return sums, error


@contextmanager
def _lora_dropout(models: PPOModels, step: int, update: int) -> Iterator[None]:
    """Inside, the adapters drop their inputs, by numbers that depend on seed, step, update and process alone."""
    if not models.settings.lora_dropout:
        yield
        return
    draw = np.random.default_rng((models.settings.seed, step, update, models.rank)).integers(2**62)
    with torch.random.fork_rng():
        torch.manual_seed(int(draw))
        for trained in models.models:
            set_lora_dropout(trained.plain, active=True)
        yield
    for trained in models.models:
        set_lora_dropout(trained.plain, active=False)


def _set_rates(models: PPOModels, update: int) -> float:
    s = models.settings
    total = s.steps * s.ppo_epochs * (s.batch_size // s.mini_batch_size)
    factor = learning_rate_factor(update, total, s.warmup_ratio, s.schedule)
    for trained in models.models:
        models.spread.set_rate(trained, factor)
    return models.trained_policy.rate * factor
