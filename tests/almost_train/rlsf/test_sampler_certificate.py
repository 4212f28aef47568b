"""The certificate and the weights of truncated importance sampling, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from almost_train.rlsf.certificate import certificate_summary, certify, truncated_weights
from almost_train.rlsf.ppo import policy_loss

MASK = torch.tensor([[True, True, True], [True, False, False]])
# p by the trainer: 0.5, 0.4, 0.9; 0.3. By the sampler: 0.5, 0.1, 0.9; 0.6. What stands outside the mask is not read.
TRAINER = torch.tensor([[0.5, 0.4, 0.9], [0.3, 1.0, 1.0]]).log()
SAMPLER = torch.tensor([[0.5, 0.1, 0.9], [0.6, 0.0, 0.0]]).log()


def test_ratios_are_cut_off_at_the_cap() -> None:
    # 0.5 / 0.5 = 1, 0.4 / 0.1 = 4, cut to 2, 0.9 / 0.9 = 1; 0.3 / 0.6 = 0.5. Outside the mask: 1.
    weights = truncated_weights(TRAINER, SAMPLER, MASK, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 1.0], [0.5, 1.0, 1.0]]))
    torch.testing.assert_close(truncated_weights(TRAINER, SAMPLER, MASK, 9.0)[0, 1], torch.tensor(4.0))


def test_the_largest_gap_is_what_the_step_says() -> None:
    certificate = certify(SAMPLER, TRAINER, MASK, limit=0.01, cap=2.0)
    assert certificate.largest == pytest.approx(math.log(4))  # of the second token
    assert certificate.mean == pytest.approx((math.log(4) + math.log(2)) / 4)
    assert (certificate.tokens, certificate.truncated) == (4, 0.25)
    assert certificate.mean_weight == pytest.approx((1 + 2 + 1 + 0.5) / 4)
    assert certificate.weights is not None
    assert certificate.row() == {
        "sampler_gap": certificate.largest,
        "sampler_gap_mean": certificate.mean,
        "sampler_tokens": 4,
        "importance_weight": certificate.mean_weight,
        "importance_truncated": 0.25,
    }


def test_within_the_limit_nothing_is_corrected() -> None:
    certificate = certify(SAMPLER, TRAINER, MASK, limit=1.4, cap=2.0)  # log 4 is 1.386
    assert certificate.weights is None
    assert (certificate.mean_weight, certificate.truncated) == (1.0, 0.0)
    assert certificate.refusal(3, 1.4, "stop") is None


def test_beyond_the_limit_a_run_stops_where_that_was_chosen() -> None:
    certificate = certify(SAMPLER, TRAINER, MASK, limit=0.01, cap=2.0)
    assert certificate.refusal(3, 0.01, "correct") is None
    assert "step 3: sampler and trainer differ by 1.39 nats" in str(certificate.refusal(3, 0.01, "stop"))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_never_corrected(value: float) -> None:
    broken = SAMPLER.clone()
    broken[0, 0] = value
    certificate = certify(broken, TRAINER, MASK, limit=0.01, cap=2.0)
    assert certificate.largest == math.inf
    assert "without bound" in str(certificate.refusal(0, 0.01, "correct"))


def test_a_weight_multiplies_its_token_in_the_loss() -> None:
    advantages = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, 0.0]])
    logprobs = TRAINER.clone().requires_grad_()
    weights = truncated_weights(TRAINER, SAMPLER, MASK, 2.0)
    loss = policy_loss(logprobs, TRAINER, advantages, MASK, 0.2, 4.0, weights).loss
    # All ratios to the old policy are 1: -(1 x 1 + 2 x 2 + 1 x 3 + 0.5 x -4) / 4 tokens.
    assert float(loss) == pytest.approx(-6 / 4)
    loss.backward()
    expected = -(weights * advantages) / 4
    torch.testing.assert_close(logprobs.grad, torch.where(MASK, expected, torch.zeros_like(expected)))
    plain: Tensor = policy_loss(TRAINER, TRAINER, advantages, MASK, 0.2, 4.0).loss
    assert float(plain) == pytest.approx(-2 / 4)


def test_the_summary_names_the_largest_and_the_steps_beyond() -> None:
    rows = [{"sampler_gap": gap} for gap in (1e-6, 0.5, 0.02)]
    assert certificate_summary(rows, 0.01) == {"sampler_gap_largest": 0.5, "steps_beyond_parity_limit": 2}
    assert certificate_summary([{"reward": 1.0}], 0.01) == {}
