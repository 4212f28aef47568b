"""TRL's RLOO and GRPO on our samplers, with the certificate of each step.

TRL 1.16 has a vLLM path of its own (`use_vllm`). It is not taken. It hands weights to vLLM's `load_weights`, which on a
CPU fails (the layers hold packed weights, and no loader). RLOO's drops the log-probabilities of vLLM's. And its
completions have no seeds of their own, so a resumed run would be another one. Here the one method of TRL's trainers
that draws completions is replaced, and what it returns is compared with the trainer's own log-probabilities.

A step beyond the limit is corrected in the advantages, by which both losses are multiplied: RLOO's of a completion by
its truncated weight, GRPO's of a token by the token's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from almost_train.common.lora import set_lora_dropout
from almost_train.rlsf.certificate import SamplerCertificate, certify, truncated_weights
from almost_train.rlsf.job import Job
from almost_train.rlsf.samplers import RolloutSampler, make_sampler

if TYPE_CHECKING:
    from almost_train.rlsf.rollouts import Sampled

Trainer = Any
"""TRL's `GRPOTrainer` or `RLOOTrainer`: what is replaced here is not in their documented interface."""


class SamplerHook:
    """What stands between TRL's trainer and the sampler of a job, which is made when the first completion is drawn."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sampler: RolloutSampler | None = None
        self._drawn: list[Sampled] = []
        self.certificate: SamplerCertificate | None = None
        """Of the newest step, over all processes."""

    def attach(self, trainer: Trainer) -> None:
        """Let the trainer draw here, and compare what was drawn with its own numbers."""
        learn = trainer._generate_and_score_completions

        def generate(prompt_ids: list[list[int]], *_: object) -> Any:
            ids = self._draw(trainer, prompt_ids)
            if self._job.settings.algorithm == "rloo":
                return ids
            return ids, None  # what TRL would do with vLLM's log-probabilities is done below

        def generate_and_score(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            return self._compared(trainer, learn(inputs))

        trainer._generate_single_turn = generate
        trainer._generate_and_score_completions = generate_and_score

    def close(self) -> None:
        """Give back what the sampler holds."""
        if self._sampler is not None:
            self._sampler.close()

    def _draw(self, trainer: Trainer, prompt_ids: list[list[int]]) -> list[list[int]]:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if self._sampler is None:
            self._sampler = make_sampler(self._job)
        self._sampler.sync(policy)
        first = trainer.accelerator.process_index * len(prompt_ids)
        rows = range(first, first + len(prompt_ids))
        prompts = [tuple(ids) for ids in prompt_ids]
        self._drawn = self._sampler.sample(policy, prompts, trainer.state.global_step, rows)
        return [list(sampled.token_ids) for sampled in self._drawn]

    def _compared(self, trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's batch, corrected where sampler and trainer are too far apart."""
        settings, step = self._job.settings, trainer.state.global_step
        mask = batch["completion_mask"].bool()  # (B, T)
        logprobs = self._trainer_logprobs(trainer, batch)
        by_sampler = torch.zeros_like(logprobs)
        for row, sampled in enumerate(self._drawn):
            assert sampled.logprobs is not None
            by_sampler[row, : len(sampled.logprobs)] = torch.tensor(sampled.logprobs)
        gather = trainer.accelerator.gather
        width = int(gather(torch.tensor([mask.shape[1]], device=mask.device)).max())

        def whole(x: Tensor) -> Tensor:
            """Of all processes."""
            return gather(torch.nn.functional.pad(x, (0, width - x.shape[1])))

        self.certificate = certify(
            whole(by_sampler), whole(logprobs), whole(mask), limit=settings.parity_limit, cap=settings.importance_cap
        )
        if refusal := self.certificate.refusal(step, settings.parity_limit, settings.on_parity):
            raise refusal
        if self.certificate.weights is not None:
            if settings.algorithm == "rloo":
                log_ratio = torch.where(mask, logprobs - by_sampler, torch.zeros_like(logprobs)).sum(-1)
                batch["advantages"] = batch["advantages"] * log_ratio.exp().clamp(max=settings.importance_cap)
            else:
                weights = truncated_weights(logprobs, by_sampler, mask, settings.importance_cap)
                batch["advantages"] = batch["advantages"][:, None] * weights
        return batch

    @torch.no_grad()
    def _trainer_logprobs(self, trainer: Trainer, batch: dict[str, Any]) -> Tensor:
        """(B, T) log p of the tokens by the policy in training, nats."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width, rows = batch["completion_ids"].shape[1], self._job.settings.micro_batch_size
        set_lora_dropout(trainer.model, active=False)
        logprobs: Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, width, rows)[0]
        set_lora_dropout(trainer.model, active=True)
        return logprobs.float()
