"""The batch that a step of PPO learns from: sampled, scored, measured, and whole on every process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from almost_eval.files import Row
from almost_train.common.processes import from_main
from almost_train.rlsf import ppo
from almost_train.rlsf.certificate import SamplerCertificate, certify
from almost_train.rlsf.log import SAMPLES, refuse_non_finite, sample_row
from almost_train.rlsf.models import completion_values, rescaled
from almost_train.rlsf.ppo import Rollout
from almost_train.rlsf.ppo_models import PPOModels, State
from almost_train.rlsf.rollouts import batch_prompts, collate, completion_logits, conversation, shorten_for_reward
from almost_train.rlsf.samplers import RolloutSampler


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step learns from."""

    rollout: Rollout
    """Of all processes."""
    samples: list[Row]
    """Lines of `samples.jsonl`."""
    state: State
    """With the moments of these rewards."""
    certificate: SamplerCertificate | None
    """Of the sampler, where it is another engine."""


def collect(models: PPOModels, sampler: RolloutSampler, state: State) -> StepBatch:
    """Sample, score and measure the policy as it is now.

    Raises:
        NotFinite: a reward is not finite.
    """
    job, settings, step = models.job, models.settings, state.step
    models.policy.eval()
    models.value.eval()
    share = settings.batch_size // models.processes
    rows = range(models.rank * share, (models.rank + 1) * share)
    everyone = batch_prompts(job.prompts, settings.seed, step, settings.batch_size)
    prompts = [everyone[row] for row in rows]
    # 1. Completions and their rewards.
    with models.spread.whole(models.trained_policy) as policy:
        sampler.sync(policy)
        with models.accelerator.autocast():
            completions = sampler.sample(policy, [prompt.token_ids for prompt in prompts], step, rows)
    dialogues = [prompt.messages for prompt in prompts]
    completions = shorten_for_reward(completions, dialogues, job.reward, job.tokenizer)
    rewards = job.reward.score(
        [conversation(messages, c.text) for messages, c in zip(dialogues, completions, strict=True)]
    )
    samples = [
        sample_row(step, p.id, p.text, c.text, r, c.ended)
        for p, c, r in list(zip(prompts, completions, rewards, strict=True))[:SAMPLES]
    ]
    refuse_non_finite(step, "reward", rewards)
    # 2. Tensors, as wide on every process.
    longest = torch.tensor([max(len(c.token_ids) for c in completions)], device=models.accelerator.device)
    width = int(models.accelerator.gather(longest).max())
    widths = (max(len(p.token_ids) for p in everyone), width)
    ids = [prompt.token_ids for prompt in prompts]
    batch = collate(ids, [c.token_ids for c in completions], job.tokenizer, widths=widths)
    tensors = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": batch.completion_mask,
        "ended": torch.tensor([c.ended for c in completions]),
        "shortened": torch.tensor([c.shortened for c in completions]),
        "rewards": torch.tensor(rewards, dtype=torch.float32),
    }
    if all(c.logprobs is not None for c in completions):
        rows_of_logprobs = [[*(c.logprobs or ()), *[0.0] * (width - len(c.token_ids))] for c in completions]
        tensors["sampler_logprobs"] = torch.tensor(rows_of_logprobs)
    tensors = {name: tensor.to(models.accelerator.device) for name, tensor in tensors.items()}
    gathered = models.accelerator.gather(tensors["rewards"])
    # 3. Moments; a value model that was the reward model begins in the units of the normalised reward.
    if settings.normalise_rewards == "running" or (settings.normalise_rewards == "sft" and step == 0):
        state = replace(state, moments=state.moments.with_batch(gathered))
    if step == 0 and models.value_origin == "reward model" and settings.normalise_rewards != "none":
        head = rescaled(models.spread.tensors(models.trained_value, "head."), state.moments.mean, state.moments.std)
        models.spread.put(models.trained_value, from_main(head))
    # 4. Log-probabilities, entropy and values of the tokens.
    tensors |= _token_numbers(models, tensors, width)
    rollout = Rollout(**{name: models.accelerator.gather(tensor) for name, tensor in tensors.items()})
    # 5. Is the model that sampled the one that is trained?
    certificate = None
    if rollout.sampler_logprobs is not None:
        certificate = certify(
            rollout.sampler_logprobs,
            rollout.logprobs,
            rollout.completion_mask,
            limit=settings.parity_limit,
            cap=settings.importance_cap,
        )
        rollout = replace(rollout, importance_weights=certificate.weights)
    return StepBatch(rollout, samples, state, certificate)


@torch.no_grad()
def _token_numbers(models: PPOModels, tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """(B, T) each: log-probabilities of policy and reference, entropy, values; in micro-batches."""
    parts: dict[str, list[Tensor]] = {"logprobs": [], "reference_logprobs": [], "entropy": [], "values": []}
    for begin in range(0, len(tensors["input_ids"]), models.settings.micro_batch_size):
        some = slice(begin, begin + models.settings.micro_batch_size)
        ids, attention = tensors["input_ids"][some], tensors["attention_mask"][some]
        with models.accelerator.autocast():
            logits = completion_logits(models.policy, ids, attention, width, models.settings.temperature)
            logprobs, entropy = ppo.token_logprobs(logits, ids[:, -width:]), ppo.entropy(logits)
            del logits  # (B, T, V): one at a time
            reference = models.reference_logprobs(ids, attention, width)
            values = completion_values(models.value, ids, attention, width)
        for name, part in zip(parts, (logprobs, reference, entropy, values), strict=True):
            parts[name].append(part.float().masked_fill(~tensors["completion_mask"][some], 0.0))
    return {name: torch.cat(part) for name, part in parts.items()}
