"""The losses of preference optimisation, as pure functions of log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from almost_eval.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = ("sigmoid", "ipo")


def preference_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    *,
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair (B,).

    With h = chosen_logratio - rejected_logratio:

    - `sigmoid` (DPO, arXiv 2305.18290, equation 7): -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h). The share s
      of labels is taken to be wrong (conservative DPO).
    - `ipo` (arXiv 2310.12036, equation 17): (h - 1 / (2 beta))^2. It does not push apart what is apart already.

    Args:
        chosen_logratio: (B,) log p(answer) of the policy less that of the reference, nats, summed over the answer's
            tokens.
        rejected_logratio: (B,) the same of the other answer.
        beta: how much a nat away from the reference counts.
        loss: see above.
        label_smoothing: s.

    Raises:
        InputError: no such loss.
    """
    from torch.nn.functional import logsigmoid

    difference = chosen_logratio - rejected_logratio
    if loss == "sigmoid":
        right, wrong = logsigmoid(beta * difference), logsigmoid(-beta * difference)
        return -(1 - label_smoothing) * right - label_smoothing * wrong
    if loss == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    raise InputError(f"no loss {loss!r}; one of {', '.join(LOSSES)}")
