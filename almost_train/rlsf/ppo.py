"""Proximal policy optimisation on completions: the arithmetic alone, no model and no state.

Sources: PPO (Schulman et al., arXiv 1707.06347), generalised advantage estimation (arXiv 1506.02438), the KL-shaped
reward and the adaptive KL coefficient of Ziegler et al. (arXiv 1909.08593), the k1 and k3 estimators of Schulman's
note "Approximating KL divergence". The losses are sums over tokens divided by a count that the caller passes. So a
batch that is cut into micro-batches, or spread over processes, has the gradient of the whole.

Shapes: B completions, T token positions of the longest. `completion_mask` (B, T) is True on a token of the completion,
its EOS included; completions begin at position 0. Log-probabilities and KL are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled completions, and each model's numbers for their tokens; 0 where `completion_mask` is False."""

    input_ids: Tensor
    """(B, P + T) prompts padded on the left to P, then completions padded on the right to T."""
    attention_mask: Tensor
    """(B, P + T) 1 on real tokens."""
    completion_mask: Tensor
    """(B, T) True on a token of the completion."""
    ended: Tensor
    """(B,) True where the completion ends in EOS."""
    shortened: Tensor
    """(B,) True where the completion ends because the reward model's context is full."""
    logprobs: Tensor
    """(B, T) log p(a|s) of the policy that sampled, at the sampling temperature, nats."""
    reference_logprobs: Tensor
    """(B, T) the same of the policy before training, nats."""
    entropy: Tensor
    """(B, T) entropy of the next token under the policy that sampled, nats."""
    values: Tensor
    """(B, T) V(s) before each token, in units of the normalised reward."""
    rewards: Tensor
    """(B,) raw logits of the reward model."""
    sampler_logprobs: Tensor | None = None
    """(B, T) log p(a|s) by another engine that sampled, nats; None where the policy in training did."""
    importance_weights: Tensor | None = None
    """(B, T) what each token counts in the policy's loss, of `certificate.truncated_weights`; None is 1."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """By how much each token was better than expected, and the targets of the value model."""

    advantages: Tensor
    """(B, T)"""
    returns: Tensor
    """(B, T) advantages + values: the target of the value model."""


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """Loss of one batch, of either model."""

    loss: Tensor
    """Scalar, to be minimised."""
    clipped: Tensor
    """Scalar: tokens at which the clipped term was the one that counted."""


@dataclass(frozen=True, slots=True)
class PolicyLoss(ClippedLoss):
    """That of the policy."""

    largest_ratio_error: Tensor
    """Scalar: max |p / p_old - 1|."""


# --- means under a mask ---


def masked_sum(x: Tensor, completion_mask: Tensor) -> Tensor:
    """Scalar: sum of x (B, T) over the tokens of the completions; what stands elsewhere may be NaN."""
    return torch.where(completion_mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, completion_mask: Tensor) -> Tensor:
    """Scalar: mean of x (B, T) over the tokens of the completions; 0 where there is none."""
    return masked_sum(x, completion_mask) / completion_mask.sum().clamp(min=1)


def masked_variance(x: Tensor, completion_mask: Tensor) -> Tensor:
    """Scalar: variance of x (B, T) over the tokens of the completions, divided by their number."""
    return masked_mean((x - masked_mean(x, completion_mask)) ** 2, completion_mask)


def whiten(x: Tensor, completion_mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """X (B, T) shifted and scaled to mean 0 and deviation 1 over the tokens of the completions; 0 elsewhere."""
    scaled = (x - masked_mean(x, completion_mask)) * torch.rsqrt(masked_variance(x, completion_mask) + epsilon)
    return torch.where(completion_mask, scaled, torch.zeros_like(x))


# --- distributions ---


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log p(token) in nats (B, T) from logits (B, T, V) already divided by the temperature, and token ids (B, T)."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy (B, T) in nats of the distributions that logits (B, T, V) stand for; a token at -inf adds nothing."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return -torch.where(logprobs.isneginf(), torch.zeros_like(logprobs), logprobs.exp() * logprobs).sum(-1)


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(B, T) log p - log q at the sampled tokens: unbiased for KL(p || q), may be negative."""
    return logprobs - reference_logprobs


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(B, T) q/p - 1 - log(q/p) at the sampled tokens: unbiased for KL(p || q), never negative, less variance."""
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


# --- rewards and advantages ---


def shaped_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards (B, T): -coefficient x KL at every token, and the score at the last token of each completion.

    Args:
        scores: (B,) reward of each whole completion.
        kl: (B, T) `kl_k1` of each token; k1, whose gradient as a reward is that of the KL.
        completion_mask: (B, T), at least one True in a row.
        kl_coefficient: reward units for one nat.
    """
    rewards = torch.where(completion_mask, -kl_coefficient * kl, torch.zeros_like(kl))
    last = completion_mask.sum(-1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores.unsqueeze(-1).to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, completion_mask: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation; a completion's last token is the end, whose next state is worth 0.

    A_t = sum over k >= 0 of (gamma lam)^k d_{t+k}, with d_t = r_t + gamma V_{t+1} - V_t.

    Args:
        rewards: (B, T)
        values: (B, T) V(s) before each token.
        completion_mask: (B, T)
        gamma: discount of a token.
        lam: 0 is one-step, 1 is the return minus the value.
    """
    mask = completion_mask.to(values.dtype)
    values = values * mask
    advantages = torch.zeros_like(values)
    after = torch.zeros_like(values[:, 0])  # (B,) A_{t+1}
    for t in range(values.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(after)
        delta = rewards[:, t] + gamma * following - values[:, t]
        after = (delta + gamma * lam * after) * mask[:, t]
        advantages[:, t] = after
    return Advantages(advantages, advantages + values)


# --- losses ---


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    clip: float,
    tokens: float,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Sum over tokens of w max(-A r, -A clip(r, 1 - c, 1 + c)) / `tokens`, with r = p / p_old.

    Args:
        logprobs: (B, T) of the policy in training, nats.
        old_logprobs: (B, T) of the policy that sampled, nats.
        advantages: (B, T)
        completion_mask: (B, T)
        clip: c
        tokens: what the sum is divided by: the tokens of the whole mini-batch, of which this may be a part.
        weights: (B, T) w, constants, of `certificate.truncated_weights`; None is 1.
    """
    # 0 outside the mask before `exp`: an infinity there would be NaN in the gradient even where it is not counted.
    log_ratio = torch.where(completion_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip, 1 + clip)
    terms = torch.maximum(plain, bounded)
    return PolicyLoss(
        loss=masked_sum(terms if weights is None else weights * terms, completion_mask) / tokens,
        clipped=masked_sum((bounded > plain).to(ratio.dtype), completion_mask).detach(),
        largest_ratio_error=(ratio - 1).abs().max().detach(),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, clip: float, tokens: float
) -> ClippedLoss:
    """Sum over tokens of max((V - R)^2, (V_clipped - R)^2) / 2 / `tokens`, V_clipped within `clip` of the old value.

    Args:
        values: (B, T) of the value model in training.
        old_values: (B, T) at sampling time.
        returns: (B, T)
        completion_mask: (B, T)
        clip: how far a value may usefully move, in reward units.
        tokens: see `policy_loss`.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, bounded = (values - returns) ** 2, (near - returns) ** 2
    return ClippedLoss(
        loss=masked_sum(torch.maximum(plain, bounded), completion_mask) / 2 / tokens,
        clipped=masked_sum((bounded > plain).to(values.dtype), completion_mask).detach(),
    )


def explained_variance(values: Tensor, returns: Tensor, completion_mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the tokens: 1 is a perfect value model, 0 as good as a constant.

    NaN where the returns do not vary.
    """
    spread = float(masked_variance(returns, completion_mask))
    return 1 - float(masked_variance(returns - values, completion_mask)) / spread if spread > 0 else math.nan


# --- what changes from step to step ---


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float, completions: int) -> float:
    """The next KL coefficient (Ziegler et al., section 2.2): coefficient x (1 + e n / horizon), e in [-0.2, 0.2].

    Args:
        coefficient: the present one.
        kl: mean KL of a completion in this step, nats.
        target: the KL to be kept, nats a completion.
        horizon: completions over which the coefficient would change by a factor of e^0.2.
        completions: n of this step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * completions / horizon)


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of all numbers seen."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of (x - mean)^2."""

    def with_batch(self, x: Tensor) -> Moments:
        """Moments with the numbers x (B,) added (Chan, Golub and LeVeque's pairwise update)."""
        x = x.double()
        n, mean = x.numel(), float(x.mean())
        count, shift = self.count + n, mean - self.mean
        squares = self.squares + float(((x - mean) ** 2).sum()) + shift**2 * self.count * n / count
        return Moments(count, self.mean + shift * n / count, squares)

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 where it is not known or 0, so that dividing by it is harmless."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 1e-16 else 1.0
