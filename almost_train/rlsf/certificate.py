"""The sampler-trainer certificate: whether the model that sampled is the model that is trained, measured in every step.

A policy that samples on another engine than it trains on is sampled by slightly other weights: other kernels, another
number format, or weights that were not transferred. PPO, RLOO and GRPO take the difference for part of the update. So
each step compares log p of every sampled token by the sampler with log p by the trainer, before anything is learnt. The
largest difference goes into the log. Beyond a limit the step is corrected or refused.

Correction: truncated importance sampling (Ionides 2008; Yao et al. 2025 for samplers of other engines): a token's loss
is multiplied by min(p_trainer / p_sampler, cap), a constant. It is exact where the cap is not reached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from almost_eval.errors import RunError
from almost_eval.files import Row
from almost_eval.types import JSONObject


@dataclass(frozen=True, slots=True)
class SamplerCertificate:
    """How far apart sampler and trainer are on the tokens of one step."""

    largest: float
    """The largest |log p(sampler) - log p(trainer)|, nats; infinite where a number is not finite."""
    mean: float
    """Its mean over the tokens, nats."""
    tokens: int
    """How many were compared."""
    weights: Tensor | None
    """(B, T) `truncated_weights` of a step beyond the limit; None where nothing needs correcting."""
    mean_weight: float
    """Mean of the weights over the tokens."""
    truncated: float
    """Share of the tokens whose weight is the cap."""

    def row(self) -> Row:
        """What the log of a step says."""
        return {
            "sampler_gap": self.largest,
            "sampler_gap_mean": self.mean,
            "sampler_tokens": self.tokens,
            "importance_weight": self.mean_weight,
            "importance_truncated": self.truncated,
        }

    def refusal(self, step: int, limit: float, on_parity: str) -> RunError | None:
        """Why the run must end here: it was to stop beyond the limit, or nothing can be corrected. None to go on."""
        if self.largest == math.inf:
            return RunError(f"step {step}: sampler and trainer differ without bound on a token, beyond any correction")
        if self.largest > limit and on_parity == "stop":
            return RunError(
                f"step {step}: sampler and trainer differ by {self.largest:.3g} nats on a token, beyond --parity-limit "
                f"{limit:g}; what was saved is kept: find out why, or go on with --on-parity correct"
            )
        return None


def certify(
    sampler_logprobs: Tensor, logprobs: Tensor, completion_mask: Tensor, *, limit: float, cap: float
) -> SamplerCertificate:
    """Compare both on the tokens of the completions; beyond the limit, with the weights that correct the step.

    Args:
        sampler_logprobs: (B, T) log p of each token by the engine that drew it, nats.
        logprobs: (B, T) the same by the model in training, before the update.
        completion_mask: (B, T) True on a token of the completion.
        limit: the largest difference that is let pass, nats.
        cap: the largest weight.
    """
    gaps = (sampler_logprobs - logprobs).abs()[completion_mask].double()  # (tokens,)
    gaps = torch.where(gaps.isfinite(), gaps, torch.full_like(gaps, math.inf))
    largest = float(gaps.max())
    if largest <= limit:
        return SamplerCertificate(largest, float(gaps.mean()), len(gaps), None, 1.0, 0.0)
    weights = truncated_weights(logprobs, sampler_logprobs, completion_mask, cap)
    of_tokens = weights[completion_mask]
    truncated = (of_tokens >= cap).double().mean()
    return SamplerCertificate(
        largest, float(gaps.mean()), len(gaps), weights, float(of_tokens.mean()), float(truncated)
    )


def truncated_weights(logprobs: Tensor, sampler_logprobs: Tensor, completion_mask: Tensor, cap: float) -> Tensor:
    """(B, T) min(p_trainer / p_sampler, cap) of each token; 1 where `completion_mask` is False. See `certify`."""
    log_ratio = torch.where(completion_mask, logprobs - sampler_logprobs, torch.zeros_like(logprobs))
    return log_ratio.exp().clamp(max=cap)


def certificate_summary(rows: Sequence[Row], limit: float) -> JSONObject:
    """Metrics of a whole run; empty where the model in training sampled."""
    gaps = [row["sampler_gap"] for row in rows if row.get("sampler_gap") is not None]
    if not gaps:
        return {}
    return {"sampler_gap_largest": max(gaps), "steps_beyond_parity_limit": sum(gap > limit for gap in gaps)}
