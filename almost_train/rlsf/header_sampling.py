"""Prompts that begin alike are read once: the evaluation's shared headers, with the draws of reinforcement learning.

A step's prompts share a system prompt, a few-shot header or everything, where a prompt stands in a batch several times.
What a group of them shares is computed for one row, and all rows go on from it (`almost_eval.engines.hf_decoding`). The
draws are those of `rollouts.sample`, so in float32 the text is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from almost_eval.engines.header_groups import header_groups
from almost_eval.engines.hf_decoding import Header, continue_rows
from almost_eval.engines.hf_generation import StopStrings
from almost_eval.engines.hf_header import LEAST, SharedHeader
from almost_eval.engines.hf_loglikelihood import AttentionWindow, out_of_memory
from almost_eval.engines.hf_rows import refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def inverted(scores: Tensor, points: Tensor, temperature: float) -> Tensor:
    """(B, 1) token at which the cumulative distribution of logits `scores` (B, V) passes `points` (B, 1) in [0, 1)."""
    # Summed in float64 where there is one: over a large vocabulary, float32 loses the unlikely tokens.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    below = torch.softmax(scores.to(exact) / temperature, dim=-1).cumsum(-1)  # (B, V)
    point = points.to(exact).to(scores.device) * below[:, -1:]
    return torch.searchsorted(below, point, right=True).clamp(max=scores.shape[-1] - 1)


class InverseDraw:
    """Draws a row's next token by its next uniform number (B, T); see `inverted`."""

    def __init__(self, numbers: Tensor, temperature: float) -> None:
        self._numbers = numbers
        self._temperature = temperature
        self._drawn = [0] * len(numbers)

    def draw(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """A token after each of the logits (b, V), which belong to these rows."""
        points = torch.stack([self._numbers[row, self._drawn[row]] for row in rows])[:, None]
        for row in rows:
            self._drawn[row] += 1
        tokens: list[int] = inverted(logits, points, self._temperature)[:, 0].tolist()
        return tokens


def sample_behind_headers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    numbers: Tensor,
    ends: frozenset[int],
    *,
    temperature: float,
    stop: Sequence[str],
    max_rows: int,
) -> Mapping[int, list[int]]:
    """Number of a prompt -> the tokens drawn after it, for the prompts that share a header; the others are left out.

    None is handled where the model, a causal LM or one with an adapter of PEFT, does not allow it. `ends` are tokens
    that end a completion; the others are as `rollouts.sample` takes them.
    """
    plain: Any = cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model
    longest = max(len(ids) for ids in prompts) + numbers.shape[1]
    header = SharedHeader(plain)
    if not _is_whole(plain) or refusal(plain):
        return {}
    header.prepare(longest)
    ids = [np.array(prompt, np.int32) for prompt in prompts]
    window = AttentionWindow.of(plain.config, longest)
    stops = StopStrings(tokenizer, stop, 0)
    drawn: dict[int, list[int]] = {}
    for group in header_groups(ids, numbers.shape[1]):
        if group.shared < LEAST or len(group.prompts) == 1:
            continue
        layers = header.layers(ids[group.prompts[0]][: group.shared])
        if layers is None:
            return drawn
        for begin in range(0, len(group.prompts), max_rows):
            batch = group.prompts[begin : begin + max_rows]
            rows = continue_rows(
                plain,
                Header(layers, group.shared),
                [ids[number] for number in batch],
                InverseDraw(numbers[list(batch)], temperature),
                lambda tokens: tokens[-1] in ends or stops.end(tokens),
                numbers.shape[1],
                window,
            )
            try:
                for row, tokens in rows:
                    drawn[batch[row]] = tokens
            except Exception as error:  # models refuse a cache and masks that are not their own in many ways
                if out_of_memory(error):
                    raise
                return drawn
    return drawn


def _is_whole(model: torch.nn.Module) -> bool:
    """Whether a process can run the model alone: what FSDP or DeepSpeed spread out is gathered by all together."""
    return not any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()) and not any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )
