"""In half precision, the logits that count most are computed again in float32.

A bfloat16 number between 16 and 32 is a multiple of 0.125, and the logits of most models are in that range. Two dot
products a row, of the scored token and of the most likely one, take their rounding away; the errors of all other tokens
are many, small and of either sign, and cancel in the sum. What the layers below have rounded stays: on TruthfulQA the
median distance from float32 falls from 0.10 to 0.06 nats a choice (SmolLM2), from 0.08 to 0.06 (Gemma 3).
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM

HALF = (torch.bfloat16, torch.float16)


class Head:
    """Listens to the output projection of a half-precision model while it runs.

    It does nothing where the projection is no plain linear map, or where the model changes the logits afterwards (a
    scale, a soft cap).
    """

    def __init__(self, model: CausalLM) -> None:
        head = model.get_output_embeddings()
        self._module = head if type(head) is nn.Linear else None
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> Head:
        if self._module is not None:
            self._hook = self._module.register_forward_hook(self._listen)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _listen(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._hidden, self._logits = inputs[0], output

    def exact(self, logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
        """The logit of each (row, id) in float32 (n,), or None where `logits` is all there is.

        Args:
            logits: (rows, vocabulary), a part of what the model returned last.
            rows: (n,) rows of `logits`.
            ids: (n,) tokens.
        """
        head, hidden, whole = self._module, self._hidden, self._logits
        if head is None or hidden is None or whole is None or hidden.dtype not in HALF:
            return None
        if logits.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        first = (logits.storage_offset() - whole.storage_offset()) // whole.shape[-1]
        states = hidden.reshape(-1, hidden.shape[-1])[first + rows].float()  # (n, hidden size)
        exact = (states * head.weight[ids].float()).sum(-1)
        return exact if head.bias is None else exact + head.bias[ids].float()


def corrected(
    head: Head,
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    summaries: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Log p(id | row) in nats and whether it is the row's most likely token, both (n,); None as `Head.exact`.

    Args:
        head: what listened while the logits were made.
        logits: (rows, vocabulary) as the model rounded them.
        rows: (n,) rows to read.
        ids: (n,) tokens to read there.
        summaries: of each row, the log of the sum of exponentials, and the most likely token; both (rows,).
    """
    if (exact := head.exact(logits, rows, ids)) is None:
        return None
    normaliser, likeliest = summaries[0][rows].double(), summaries[1][rows]  # (n,), (n,)
    exact_top = head.exact(logits, rows, likeliest)
    assert exact_top is not None
    target, top = logits[rows, ids].float(), logits[rows, likeliest].float()  # (n,), (n,)
    is_target = likeliest == ids  # (n,)
    change = _gain(exact_top, top, normaliser) + torch.where(is_target, 0.0, _gain(exact, target, normaliser))
    # Logits that round to the same number are told apart by what they were.
    greedy = is_target | ((target == top) & (exact > exact_top))
    return exact.double() - normaliser - torch.log1p(change), greedy


def _gain(exact: torch.Tensor, rounded: torch.Tensor, normaliser: torch.Tensor) -> torch.Tensor:
    """By how much a token's probability grows when its logit is exact, relative to the old normaliser."""
    return (exact.double() - normaliser).exp() - (rounded.double() - normaliser).exp()
