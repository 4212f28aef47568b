"""The PPO loop: sample, score, compare, update; checkpoints that resume to the same bits.

Departures from TRL's PPO trainer, which TRL has removed:

- The policy and the value model are two models with an optimizer each.
- Losses are divided by the tokens of the whole mini-batch, so micro-batches and processes change only the rounding.
- There is no dropout.
- A checkpoint is taken after a step's batch was measured and before its update, so the policy of every checkpoint is
  known to be within the guards' bounds.
- Random numbers depend on (seed, step, row) alone, so a checkpoint holds no state of a generator.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn

from almost_eval.errors import InputError
from almost_eval.files import Row
from almost_eval.types import JSONObject
from almost_train.common.interrupts import ended_at, ended_before_any_step, save_requests
from almost_train.common.lora import (
    adapter_off,
    adapter_to_zero,
    add_lora,
    base_dtype,
    quantization,
    set_lora_dropout,
)
from almost_train.common.schedule import learning_rate_factor
from almost_train.rlsf import checkpoint as checkpoints
from almost_train.rlsf import ppo
from almost_train.rlsf.certificate import SamplerCertificate, certificate_summary, certify
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
from almost_train.rlsf.models import completion_values, load_policy, load_value_model
from almost_train.rlsf.ppo import Moments, Rollout
from almost_train.rlsf.rollouts import (
    batch_prompts,
    collate,
    completion_logits,
    completion_logprobs,
    conversation,
    shorten_for_reward,
)
from almost_train.rlsf.samplers import make_sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_SETTINGS = SAMPLER_SETTINGS | frozenset(
    "mini_batch_size sampling_batch_size ppo_epochs value_learning_rate value_clip gamma gae_lambda whiten_advantages "
    "normalise_rewards kl_controller kl_target kl_horizon".split()
)
"""Settings of PPO besides those that every algorithm takes."""


@dataclass(frozen=True, slots=True)
class State:
    """What changes from step to step, beside the weights."""

    step: int
    kl_coefficient: float
    moments: Moments
    """Of the raw rewards, for `normalise_rewards`."""


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
    loop = _Loop(job)
    state = loop.resume() or State(0, settings.kl_coefficient, Moments())
    stopped, policy_step = None, settings.steps
    with (
        closing(loop.sampler),
        StepLog(job.output, state.step, active=job.is_first) as log,
        save_requests(settings.save_minutes) as saving,
        job.progress.track("RLSF (PPO)", settings.steps, state.step) as advance,
    ):
        for step in range(state.step, settings.steps + 1):
            began = time.monotonic()
            # 1. Sample, score and measure the policy as it is now.
            batch = loop.collect(state)
            row = _measured(step, batch.rollout, state)
            if batch.certificate:
                row |= batch.certificate.row()
                if refusal := batch.certificate.refusal(step, settings.parity_limit, settings.on_parity):
                    log.step(row)
                    if step:
                        loop.save(state)
                    raise refusal
            if step % settings.samples_every == 0 or step == settings.steps:
                log.samples(batch.samples)
            # 2. Go on only within bounds; the batch after the last update is there to be measured.
            stopped = verdict([*log.rows, row], settings.kl_limit, settings.guard_window)
            if stopped:
                policy_step = loop.go_back(last_good_step([*log.rows, row], stopped, settings.guard_window))
            if stopped or step == settings.steps:
                log.step(row)
                if settings.keep_state and not stopped:  # before the update of a step that a longer run would make
                    loop.save(state)
                break
            save, end = saving.now()
            if step and (save or step % settings.save_every == 0):
                loop.save(state)
                saving.saved()
            if end:
                raise ended_at(step) if step else ended_before_any_step()
            if job.is_first and job.keeps(step):
                save_policy(job, copy.deepcopy(loop.plain_policy) if settings.bf16 else loop.plain_policy, step)
            # 3. Update.
            row |= loop.update(batch.state, batch.rollout)
            state = _next(settings, batch.state, row)
            seconds = time.monotonic() - began
            tokens = row["length"] * settings.batch_size
            log.step({**row, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)})
            advance(1)
        done = len(log.rows) - 1
        metrics = {"steps": done, "policy_step": policy_step, "stopped": stopped, "value_model": loop.value_origin}
        metrics |= summary(log.rows) | certificate_summary(log.rows, settings.parity_limit)
    if job.is_first:
        save_policy(job, loop.plain_policy)
    loop.accelerator.wait_for_everyone()
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


class _Loop:
    """The models of one process, and what is done with them."""

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self.job, self.settings = job, settings
        if job.processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier stage of this process left behind
            if settings.device.startswith("cuda:"):
                torch.cuda.set_device(settings.device)
        precision = "bf16" if settings.bf16 else "no"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=settings.device == "cpu")
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise InputError(
                f"PPO trains two models at once, which {kind.value} is not set up for here; launch it with plain data "
                "parallelism, or use --algorithm rloo or grpo"
            )
        device = str(self.accelerator.device)
        held = base_dtype(settings, bf16=settings.bf16)
        bits = quantization(settings)
        policy: PreTrainedModel = load_policy(job.policy, device, held, bits)
        value, self.value_origin = load_value_model(job.reward, job.policy, job.tokenizer, device, bits)
        # The policy that training begins with: the base of an adapter, or a copy.
        self.reference: nn.Module | None = None
        if settings.lora_rank:
            base = job.policy.path
            policy = add_lora(policy, settings, base, kind="CAUSAL_LM", seed=settings.seed)
            value.trunk = add_lora(
                value.trunk if bits else nn.Module.to(value.trunk, held),
                settings,
                base,
                kind="FEATURE_EXTRACTION",
                seed=settings.seed + 1,
            )
        else:
            self.reference = load_policy(job.policy, device).requires_grad_(False)
        if settings.gradient_checkpointing:
            for model in (policy, value.trunk):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rates = (settings.learning_rate, settings.value_learning_rate or settings.learning_rate)
        optimizers = [
            torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=settings.weight_decay
            )
            for model, rate in zip((policy, value), rates, strict=True)
        ]
        self.rates, self.plain_policy, self.plain_value = rates, policy, value
        self.policy, self.value, *self.optimizers = self.accelerator.prepare(policy, value, *optimizers)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.sampler = make_sampler(job)

    # --- sampling ---

    def collect(self, state: State) -> StepBatch:
        """The batch of a step, whole on every process."""
        settings, step = self.settings, state.step
        self.policy.eval()
        self.value.eval()
        share = settings.batch_size // self.processes
        rows = range(self.rank * share, (self.rank + 1) * share)
        everyone = batch_prompts(self.job.prompts, settings.seed, step, settings.batch_size)
        prompts = [everyone[row] for row in rows]
        # 1. Completions and their rewards.
        self.sampler.sync(self.plain_policy)
        with self.accelerator.autocast():
            completions = self.sampler.sample(self.plain_policy, [prompt.token_ids for prompt in prompts], step, rows)
        dialogues = [prompt.messages for prompt in prompts]
        completions = shorten_for_reward(completions, dialogues, self.job.reward, self.job.tokenizer)
        rewards = self.job.reward.score(
            [conversation(messages, c.text) for messages, c in zip(dialogues, completions, strict=True)]
        )
        samples = [
            sample_row(step, p.id, p.text, c.text, r, c.ended)
            for p, c, r in list(zip(prompts, completions, rewards, strict=True))[:SAMPLES]
        ]
        refuse_non_finite(step, "reward", rewards)
        # 2. Tensors, as wide on every process.
        width = self._most(max(len(c.token_ids) for c in completions))
        widths = (max(len(p.token_ids) for p in everyone), width)
        ids = [prompt.token_ids for prompt in prompts]
        batch = collate(ids, [c.token_ids for c in completions], self.job.tokenizer, widths=widths)
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
        tensors = {name: tensor.to(self.accelerator.device) for name, tensor in tensors.items()}
        gathered = self.accelerator.gather(tensors["rewards"])
        # 3. Moments; a value model that was the reward model begins in the units of the normalised reward.
        if settings.normalise_rewards == "running" or (settings.normalise_rewards == "sft" and step == 0):
            state = replace(state, moments=state.moments.with_batch(gathered))
        if step == 0 and self.value_origin == "reward model" and settings.normalise_rewards != "none":
            self.plain_value.rescale(state.moments.mean, state.moments.std)
        # 4. Log-probabilities, entropy and values of the tokens.
        tensors |= self._token_numbers(tensors, width)
        rollout = Rollout(**{name: self.accelerator.gather(tensor) for name, tensor in tensors.items()})
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
    def _token_numbers(self, tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
        """(B, T) each: log-probabilities of policy and reference, entropy, values; in micro-batches."""
        parts: dict[str, list[Tensor]] = {"logprobs": [], "reference_logprobs": [], "entropy": [], "values": []}
        for begin in range(0, len(tensors["input_ids"]), self.settings.micro_batch_size):
            some = slice(begin, begin + self.settings.micro_batch_size)
            ids, attention = tensors["input_ids"][some], tensors["attention_mask"][some]
            with self.accelerator.autocast():
                logits = completion_logits(self.policy, ids, attention, width, self.settings.temperature)
                logprobs, entropy = ppo.token_logprobs(logits, ids[:, -width:]), ppo.entropy(logits)
                del logits  # (B, T, V): one at a time
                reference = self._reference_logprobs(ids, attention, width)
                values = completion_values(self.value, ids, attention, width)
            for name, part in zip(parts, (logprobs, reference, entropy, values), strict=True):
                parts[name].append(part.float().masked_fill(~tensors["completion_mask"][some], 0.0))
        return {name: torch.cat(part) for name, part in parts.items()}

    def _reference_logprobs(self, ids: Tensor, attention: Tensor, width: int) -> Tensor:
        """(B, T) log p of the policy that training began with, nats."""
        temperature = self.settings.temperature
        if self.reference is not None:
            return completion_logprobs(self.reference, ids, attention, width, temperature)
        with adapter_off(self.plain_policy):
            return completion_logprobs(self.plain_policy, ids, attention, width, temperature)

    def _most(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    # --- updating ---

    def update(self, state: State, rollout: Rollout) -> Row:
        """All epochs over a batch; what they did."""
        settings, mask = self.settings, rollout.completion_mask
        scores = rollout.rewards
        if settings.normalise_rewards != "none":
            scores = (scores - state.moments.mean) / state.moments.std
        scores = scores - settings.eos_penalty * (~rollout.ended).to(scores.dtype)
        kl = ppo.kl_k1(rollout.logprobs, rollout.reference_logprobs)
        shaped = ppo.shaped_rewards(scores, kl, mask, state.kl_coefficient)
        target = ppo.gae(shaped, rollout.values, mask, settings.gamma, settings.gae_lambda)
        advantages = ppo.whiten(target.advantages, mask) if settings.whiten_advantages else target.advantages
        if settings.gradient_checkpointing:
            self.policy.train()
            self.value.train()
        totals, updates = torch.zeros(5, device=mask.device), 0
        first_error, minis = 0.0, settings.batch_size // settings.mini_batch_size
        for epoch in range(settings.ppo_epochs):
            order = np.random.default_rng((settings.seed, state.step, settings.batch_size + epoch))
            for rows in np.split(order.permutation(settings.batch_size), minis):
                rate = self._set_rates(state.step * settings.ppo_epochs * minis + updates)
                with self._lora_dropout(state.step, updates):
                    sums, error = self._mini_batch(state.step, rollout, advantages, target.returns, rows)
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
        self, step: int, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: NDArray[np.int64]
    ) -> tuple[Tensor, float]:
        """One update of both models. Returns sums over all processes, and the largest ratio error."""
        settings, weights = self.settings, rollout.importance_weights
        tokens = float(rollout.completion_mask[rows].sum())
        mine = rows[self.rank :: self.processes]
        sums, error = torch.zeros(5, device=advantages.device), 0.0
        for begin in range(0, len(mine), settings.micro_batch_size):
            some, last = mine[begin : begin + settings.micro_batch_size], begin + settings.micro_batch_size >= len(mine)
            mask, width = rollout.completion_mask[some], rollout.completion_mask.shape[1]
            ids, attention = rollout.input_ids[some], rollout.attention_mask[some]
            with ExitStack() as stack:
                if not last:  # gradients are summed over processes once, with the last micro-batch
                    stack.enter_context(self.accelerator.no_sync(self.policy))
                    stack.enter_context(self.accelerator.no_sync(self.value))
                with self.accelerator.autocast():
                    logprobs = completion_logprobs(self.policy, ids, attention, width, settings.temperature)
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
                self.accelerator.backward(policy.loss * self.processes)
                with self.accelerator.autocast():
                    values = completion_values(self.value, ids, attention, width)
                value = ppo.value_loss(values, rollout.values[some], returns[some], mask, settings.value_clip, tokens)
                self.accelerator.backward(value.loss * self.processes)
            sums += torch.stack([policy.clipped, value.clipped, mask.sum(), policy.loss.detach(), value.loss.detach()])
            error = max(error, float(policy.largest_ratio_error))
        sums = self.accelerator.reduce(sums, "sum")
        norms = [
            float(self.accelerator.clip_grad_norm_(m.parameters(), settings.max_grad_norm))
            for m in (self.policy, self.value)
        ]
        refuse_non_finite(step, "loss and gradient", [*sums.tolist(), *norms])
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return sums, error

    @contextmanager
    def _lora_dropout(self, step: int, update: int) -> Iterator[None]:
        """Inside, the adapters drop their inputs, by numbers that depend on seed, step, update and process alone."""
        if not self.settings.lora_dropout:
            yield
            return
        draw = np.random.default_rng((self.settings.seed, step, update, self.rank)).integers(2**62)
        with torch.random.fork_rng():
            torch.manual_seed(int(draw))
            for model in (self.plain_policy, self.plain_value):
                set_lora_dropout(model, active=True)
            yield
        for model in (self.plain_policy, self.plain_value):
            set_lora_dropout(model, active=False)

    def _set_rates(self, update: int) -> float:
        s = self.settings
        total = s.steps * s.ppo_epochs * (s.batch_size // s.mini_batch_size)
        factor = learning_rate_factor(update, total, s.warmup_ratio, s.schedule)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        return self.rates[0] * factor

    # --- checkpoints ---

    def save(self, state: State) -> None:
        """A checkpoint of this moment; older ones that no guard would go back to are removed."""
        if self.job.is_first:
            oldest_wanted = state.step - self.settings.guard_window
            checkpoints.save(self.job.work, state.step, self._trained(), asdict(state), oldest_wanted)

    def resume(self) -> State | None:
        """The newest checkpoint's state, with its weights loaded; None where there is none."""
        earlier = checkpoints.stored(self.job.work)
        if not earlier:
            return None
        numbers = checkpoints.load(earlier[-1][1], self._trained())
        return State(numbers["step"], numbers["kl_coefficient"], Moments(**numbers["moments"]))

    def go_back(self, step: int) -> int:
        """Load the policy of the newest checkpoint up to `step`, else the one training began with; returns its step."""
        self.accelerator.wait_for_everyone()
        good = [(at, folder) for at, folder in checkpoints.stored(self.job.work) if at <= step]
        if good:
            checkpoints.load_weights(self.plain_policy, good[-1][1] / "policy.safetensors")
            return good[-1][0]
        if self.reference is None:
            adapter_to_zero(self.plain_policy)
            return 0
        with torch.no_grad():
            for mine, first in zip(self.plain_policy.parameters(), self.reference.parameters(), strict=True):
                mine.copy_(first)
        return 0

    def _trained(self) -> list[checkpoints.TrainedModel]:
        policy, value = (optimizer.optimizer for optimizer in self.optimizers)
        return [
            checkpoints.TrainedModel("policy", self.plain_policy, policy),
            checkpoints.TrainedModel("value", self.plain_value, value),
        ]


PPO = Algorithm(train, OWN_SETTINGS, update_size, checkpoints.folders)
