"""Continues a batch of prompts behind one header, token by token; a row that has ended leaves the batch.

The loop in place of transformers' `generate` for models that take their attention from its registry (`hf_rows.py`).
It differs in what it does not repeat: the header is read once, a prompt with several completions is read once, keys are
never copied from step to step, and logits are computed at the last token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from almost_eval.engines.hf_loglikelihood import AttentionWindow
from almost_eval.engines.hf_rows import HeaderLayers, Rows
from almost_eval.engines.hf_sampling import Sampler

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM

PASS = 2048
"""Tokens of prompts that are read in one pass, empty columns included; one row at least."""

_LEAVE = 8
"""Rows that have ended are dropped once they are one in this many: each time, the keys of the others are copied."""


@dataclass(frozen=True, slots=True)
class Header:
    """What all rows of a batch begin with."""

    layers: HeaderLayers
    """Its keys and values in each layer; empty where nothing is shared."""
    length: int
    """Tokens."""


def continue_rows(
    model: CausalLM,
    header: Header,
    prompts: Sequence[NDArray[np.int32]],
    sampler: Sampler,
    has_ended: Callable[[list[int]], bool],
    max_new_tokens: int,
    window: AttentionWindow,
) -> list[list[int]]:
    """The tokens that follow each prompt, the one that ended it included.

    Args:
        model: a causal LM that passes `hf_rows.refusal`.
        header: what all prompts begin with.
        prompts: token ids of each row, longer than the header. Equal ones are read once.
        sampler: draws the next token of each row.
        has_ended: whether a completion is over, by its tokens so far.
        max_new_tokens: where it is over in any case.
        window: how far back the model's layers look.

    Raises:
        ForeignAttention: the model attends in a way that is not computed here.
    """
    rows, logits = _read(model, header, prompts, max_new_tokens, window)
    completions: list[list[int]] = [[] for _ in prompts]
    held = list(range(len(prompts)))  # the row of each line of the batch
    running = list(range(len(held)))  # the lines that have not ended
    for _ in range(max_new_tokens):
        lines = logits if len(running) == len(held) else logits[running]
        drawn = sampler.draw(lines, [held[line] for line in running])
        for line, token in zip(running, drawn, strict=True):
            completions[held[line]].append(token)
        running = [line for line in running if not has_ended(completions[held[line]])]
        if not running or len(completions[held[running[0]]]) == max_new_tokens:
            break
        if len(held) - len(running) >= max(1, len(held) // _LEAVE):
            rows.keep(torch.tensor(running, device=model.device))
            held, running = [held[line] for line in running], list(range(len(running)))
        last = [completions[row][-1] for row in held]
        logits = rows.forward(torch.tensor(last, device=model.device)[:, None])
    return completions


def _read(
    model: CausalLM,
    header: Header,
    prompts: Sequence[NDArray[np.int32]],
    new_tokens: int,
    window: AttentionWindow,
) -> tuple[Rows, torch.Tensor]:
    """Rows that have read what their prompts hold behind the header, and the logits (B, V) after it."""
    number: dict[bytes, int] = {}
    row_to_text = [number.setdefault(prompt.tobytes(), len(number)) for prompt in prompts]
    texts = [prompts[row_to_text.index(i)][header.length :] for i in range(len(number))]
    lengths = torch.tensor([len(texts[i]) for i in row_to_text], device=model.device)
    rows = Rows(model, header.layers, header.length, window, lengths, int(lengths.max()) + new_tokens)
    logits: torch.Tensor | None = None
    for chosen in _passes([len(text) for text in texts]):
        width = len(texts[chosen[0]])
        ids = np.zeros((len(chosen), width), np.int64)
        for line, i in enumerate(chosen):
            ids[line, width - len(texts[i]) :] = texts[i]
        sizes = torch.tensor([len(texts[i]) for i in chosen], device=model.device)
        part = Rows(model, header.layers, header.length, window, sizes, width)
        after = part.forward(torch.from_numpy(ids).to(model.device))  # (chosen, V)
        into = [row for row, i in enumerate(row_to_text) if i in set(chosen)]
        lines = torch.tensor([chosen.index(row_to_text[row]) for row in into], device=model.device)
        part.keep(lines)
        rows.place(part, torch.tensor(into, device=model.device))
        if logits is None:
            logits = after.new_empty((len(prompts), after.shape[-1]))
        logits[into] = after[lines]
    assert logits is not None
    return rows, logits


def _passes(lengths: Sequence[int]) -> list[list[int]]:
    """Divide texts of these lengths into passes, the longest first, so that neighbours in length are together."""
    passes: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= PASS:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes
