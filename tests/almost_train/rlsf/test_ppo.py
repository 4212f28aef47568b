"""Every formula on numbers a reader can check by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from almost_train.rlsf import ppo
from almost_train.rlsf.sharding import Replicas

MASK = torch.tensor([[True, True, False]])


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


# --- means ---


def test_masked_mean_and_variance() -> None:
    x = rows([1.0, 3.0, 100.0])
    # (1 + 3) / 2 = 2; ((1 - 2)^2 + (3 - 2)^2) / 2 = 1
    assert ppo.masked_sum(x, MASK) == 4
    assert ppo.masked_mean(x, MASK) == 2
    assert ppo.masked_variance(x, MASK) == 1


def test_what_is_masked_out_may_be_nan() -> None:
    assert ppo.masked_mean(rows([1.0, 3.0, math.nan]), MASK) == 2


def test_the_mean_of_no_token_is_0() -> None:
    assert ppo.masked_mean(rows([1.0, 2.0, 3.0]), torch.zeros(1, 3, dtype=torch.bool)) == 0


def test_whiten() -> None:
    # mean 2, std 1: (1 - 2) / 1 = -1, (3 - 2) / 1 = 1; masked out: 0
    close(ppo.whiten(rows([1.0, 3.0, 100.0]), MASK, epsilon=0.0), [[-1, 1, 0]])


def test_whitening_equal_numbers_gives_0() -> None:
    close(ppo.whiten(rows([2.0, 2.0, 5.0]), MASK), [[0, 0, 0]])


# --- distributions ---


def test_logprobs_and_entropy_of_a_fair_and_a_biased_coin() -> None:
    logits = rows([0.0, 0.0], [math.log(3), 0.0]).unsqueeze(0)  # (1, 2, 2): p = (1/2, 1/2), (3/4, 1/4)
    close(ppo.token_logprobs(logits, torch.tensor([[0, 1]])), [[math.log(0.5), math.log(0.25)]])
    biased = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    close(ppo.entropy(logits), [[math.log(2), biased]])


def test_an_impossible_token_adds_no_entropy() -> None:
    close(ppo.entropy(torch.tensor([[[0.0, -math.inf, 0.0]]], dtype=torch.float64)), [[math.log(2)]])


def test_kl_estimators() -> None:
    p, q = rows([math.log(0.5)]), rows([math.log(0.25)])
    close(ppo.kl_k1(p, q), [[math.log(2)]])  # log(0.5 / 0.25)
    close(ppo.kl_k3(p, q), [[0.5 - 1 + math.log(2)]])  # q/p = 0.5; 0.5 - 1 - log 0.5
    close(ppo.kl_k3(p, p), [[0]])


def test_both_estimators_have_the_kl_as_their_expectation() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    kl = float((p * (p / q).log()).sum())
    for estimator in (ppo.kl_k1, ppo.kl_k3):
        assert float((p * estimator(p.log(), q.log())).sum()) == pytest.approx(kl)


# --- rewards and advantages ---


def test_the_score_goes_to_the_last_token_and_the_kl_to_each() -> None:
    kl = rows([0.5, -1.0, 9.0], [1.0, 1.0, 1.0])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # 0.1 a nat. First: -0.05, 0.1 + 2 = 2.1, nothing. Second: -0.1, -0.1, -0.1 - 1 = -1.1.
    actual = ppo.shaped_rewards(torch.tensor([2.0, -1.0]), kl, mask, kl_coefficient=0.1)
    close(actual, [[-0.05, 2.1, 0], [-0.1, -0.1, -1.1]])


def test_gae_by_hand() -> None:
    # gamma 0.5, lambda 0.5. d2 = 1 - 2 = -1 (the end); d1 = 0 + 0.5 x 2 - 4 = -3. A2 = -1; A1 = -3 + 0.25 x -1 = -3.25.
    result = ppo.gae(rows([0.0, 1.0, 7.0]), rows([4.0, 2.0, 9.0]), MASK, gamma=0.5, lam=0.5)
    close(result.advantages, [[-3.25, -1, 0]])
    close(result.returns, [[0.75, 1, 0]])


def test_gae_with_gamma_and_lambda_1_is_the_return_minus_the_value() -> None:
    result = ppo.gae(rows([1.0, 2.0, 3.0]), rows([0.5, 0.5, 0.5]), torch.ones(1, 3).bool(), gamma=1.0, lam=1.0)
    close(result.returns, [[6, 5, 3]])
    close(result.advantages, [[5.5, 4.5, 2.5]])


def test_gae_equals_a_plain_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths, gamma, lam = [7, 1, 3, 5], 0.9, 0.8
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    actual = ppo.gae(rewards, values, mask, gamma, lam).advantages
    for b, length in enumerate(lengths):
        value = [*values[b, :length].tolist(), 0.0]
        delta = [float(rewards[b, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(7):
            plain = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert float(actual[b, t]) == pytest.approx(plain, abs=1e-12)


# --- losses ---


def test_policy_loss_by_hand() -> None:
    # Ratios 1.5 and 0.5, clip 0.2. A = 1: min(1.5, 1.2) = 1.2, clipped. A = -1: min(-0.5, -0.8) = -0.8, clipped.
    # Loss -(1.2 - 0.8) / 2 = -0.2.
    result = ppo.policy_loss(rows([math.log(1.5), math.log(0.5), 8.0]), rows([0, 0, 0]), rows([1, -1, 5]), MASK, 0.2, 2)
    assert float(result.loss) == pytest.approx(-0.2)
    assert float(result.clipped) == 2
    assert float(result.largest_ratio_error) == pytest.approx(0.5)


def test_policy_loss_does_not_clip_what_makes_up_for_a_mistake() -> None:
    # Ratio 1.5 at A = -1: min(-1.5, -1.2) = -1.5 counts in full, so the probability can come down again.
    result = ppo.policy_loss(rows([math.log(1.5)]), rows([0]), rows([-1]), torch.ones(1, 1).bool(), 0.2, 1)
    assert float(result.loss) == pytest.approx(1.5)
    assert float(result.clipped) == 0


def test_value_loss_by_hand() -> None:
    # Old 0, new 1, clip 0.2 -> 0.2. Return 1: max(0, 0.64) = 0.64, clipped. Return -1: max(4, 1.44) = 4.
    # (0.64 + 4) / 2 / 2 = 1.16
    result = ppo.value_loss(rows([1, 1, 1]), rows([0, 0, 0]), rows([1, -1, 9]), MASK, 0.2, 2)
    assert float(result.loss) == pytest.approx(1.16)
    assert float(result.clipped) == 1


def numeric_gradient(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(x)
    for place in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[place] = step
        above, below = function(x + shift.view_as(x)), function(x - shift.view_as(x))
        gradient.view(-1)[place] = (above - below) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", ["policy", "value"])
def test_gradients_equal_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, old, target = (torch.randn(3, 5, generator=generator, dtype=torch.float64) * 0.3 for _ in range(3))
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    function = ppo.policy_loss if name == "policy" else ppo.value_loss

    def loss(at: Tensor) -> Tensor:
        return function(at, old, target, mask, 0.2, float(mask.sum())).loss

    at = x.clone().requires_grad_(True)
    loss(at).backward()
    assert at.grad is not None
    torch.testing.assert_close(at.grad, numeric_gradient(loss, x), atol=1e-8, rtol=1e-6)
    assert not at.grad[~mask].any()


def test_an_infinity_outside_the_completion_does_not_reach_the_gradient() -> None:
    logprobs = rows([0.1, 0.2, 1e4]).requires_grad_(True)
    ppo.policy_loss(logprobs, rows([0, 0, -1e4]), rows([1, 1, 1]), MASK, 0.2, 2).loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_micro_batches_add_up_to_the_mini_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    x, old, target = (torch.randn(4, 3, generator=generator, dtype=torch.float64) * 0.2 for _ in range(3))
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    for function in (ppo.policy_loss, ppo.value_loss):
        whole = function(x, old, target, mask, 0.2, 9).loss
        parts = [function(x[i : i + 1], old[i : i + 1], target[i : i + 1], mask[i : i + 1], 0.2, 9) for i in range(4)]
        torch.testing.assert_close(sum(part.loss for part in parts), whole)


def test_explained_variance() -> None:
    returns = rows([1.0, 3.0, 50.0])
    assert ppo.explained_variance(returns, returns, MASK) == 1
    assert ppo.explained_variance(rows([7.0, 7.0, 0.0]), returns, MASK) == 0  # a constant explains nothing
    # R - V = (0.5, 1.5): variance 0.25 of 1
    assert ppo.explained_variance(rows([0.5, 1.5, 0.0]), returns, MASK) == pytest.approx(0.75)
    assert math.isnan(ppo.explained_variance(returns, rows([2.0, 2.0, 0.0]), MASK))


# --- from step to step ---


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 640)),  # 10 % above
        (60.0, 0.1 * (1 + 0.2 * 64 / 640)),  # bounded at 20 %
        (0.0, 0.1 * (1 - 0.2 * 64 / 640)),
    ],
)
def test_adaptive_kl_coefficient(kl: float, expected: float) -> None:
    assert ppo.adapted_kl_coefficient(0.1, kl, target=6.0, horizon=640, completions=64) == pytest.approx(expected)


def test_running_moments_equal_those_of_all_numbers() -> None:
    # 1, 2, 3 then 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3
    moments = ppo.Moments().with_batch(torch.tensor([1.0, 2.0, 3.0])).with_batch(torch.tensor([6.0]))
    assert (moments.count, moments.mean, moments.squares) == (4, pytest.approx(3), pytest.approx(14))
    assert moments.std == pytest.approx(math.sqrt(14 / 3))


def test_the_deviation_of_equal_numbers_is_harmless() -> None:
    assert ppo.Moments().std == 1
    assert ppo.Moments().with_batch(torch.tensor([2.0, 2.0])).std == 1


def test_weight_decay_leaves_norms_and_biases_alone() -> None:
    # A step of AdamW with no gradient but zeros: a weight becomes w (1 - rate x decay) = 1 x (1 - 0.1 x 0.5).
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    spread = Replicas(cast("Any", None), weight_decay=0.5, max_grad_norm=1.0)
    spread._optimizer(model, rate=0.1).step()
    weight, *others = [parameter.flatten().tolist() for parameter in model.parameters()]
    assert weight == pytest.approx([0.95] * 4)
    assert others == [[1.0] * 2] * 3
