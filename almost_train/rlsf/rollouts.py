"""Completions sampled from a policy in training, and what models say of their tokens.

A token is drawn from the whole distribution at the sampling temperature by inverting its cumulative distribution at a
number that is handed in: no global generator is touched, the batch does not change a draw, and the log-probabilities
that PPO compares are those of the very distribution that was sampled (top-p would make them another's).

A completion ends with EOS. One that opens the next turn itself ends with that stop string's last token; its text is cut
before the stop string, and like one that ran out of tokens it has not ended, which `eos_penalty` is for.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from almost_eval.files import Row
from almost_eval.models import stops
from almost_eval.models.chat import ChatTemplate, encode_text, special_tokens
from almost_eval.types import Conversation, Message
from almost_train.rlsf.ppo import token_logprobs

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, as the policy reads it."""

    id: str
    text: str
    """The user's words."""
    rendered: str
    """With the chat template and the generation prompt."""
    token_ids: TokenIds


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion."""

    token_ids: TokenIds
    """At least one; EOS included where there is one, a stop string's tokens too, and nothing after."""
    text: str
    """Without special tokens and the whitespace around it: what the reward model reads."""
    ended: bool
    """Whether it ends in EOS."""


def read_prompts(rows: Sequence[Row], tokenizer: Any, template: ChatTemplate) -> list[Prompt]:
    """The prompts of `prompts.jsonl`, each one user turn written by the template with its generation prompt."""
    tokens = special_tokens(tokenizer)
    prompts = []
    for row in rows:
        conversation = (Message("user", row["prompt"].strip()),)
        rendered = template.render(conversation, add_generation_prompt=True, special_tokens=tokens)
        prompts.append(Prompt(row["id"], row["prompt"], rendered, tuple(encode_text(tokenizer, rendered))))
    return prompts


def batch_prompts(prompts: Sequence[Prompt], seed: int, step: int, size: int) -> list[Prompt]:
    """The prompts of a step: all are used once, in a seeded order, before any is used again in another order."""
    chosen = []
    for number in range(step * size, (step + 1) * size):
        epoch, place = divmod(number, len(prompts))
        chosen.append(prompts[int(_permutation(seed, epoch, len(prompts))[place])])
    return chosen


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> Any:
    return np.random.default_rng((seed, epoch)).permutation(n)


def conversation(prompt: str, answer: str) -> Conversation:
    """What the reward model is to judge."""
    return (Message("user", prompt.strip()), Message("assistant", answer))


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a completion: the tokenizer's EOS and those of the model's generation settings."""
    return sorted(stops.end_ids(model.generation_config.eos_token_id, tokenizer))


# --- sampling ---


def uniforms(seed: int, step: int, rows: Sequence[int], tokens: int) -> Tensor:
    """(B, tokens) numbers in [0, 1), float64, each row from a generator of its own keyed by (seed, step, row).

    So a row of a step draws the same on one process as on many.
    """
    return torch.from_numpy(np.stack([np.random.default_rng((seed, step, row)).random(tokens) for row in rows]))


class _Draw(LogitsProcessor):
    """Leaves of every row only the token that its next uniform number picks."""

    def __init__(self, numbers: Tensor, prompt_length: int, temperature: float) -> None:
        self._numbers = numbers  # (B, T)
        self._prompt_length = prompt_length
        self._temperature = temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        at = input_ids.shape[1] - self._prompt_length
        # Summed in float64 where there is one: over a large vocabulary, float32 loses the unlikely tokens.
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        below = torch.softmax(scores.to(exact) / self._temperature, dim=-1).cumsum(-1)  # (B, V)
        point = self._numbers[:, at : at + 1].to(exact).to(scores.device) * below[:, -1:]
        token = torch.searchsorted(below, point, right=True).clamp(max=scores.shape[-1] - 1)  # (B, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)  # type: ignore[return-value]


class _Stops(StoppingCriteria):
    """Ends a row once its completion holds a stop string; looks at its last tokens only."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompt_length = prompt_length
        self._tail = max(len(text.encode()) for text in stop) + 8  # a token is at least a byte

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        tails = input_ids[:, max(self._prompt_length, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True)
        found = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)  # type: ignore[return-value]


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    numbers: Tensor,
    *,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    max_rows: int = 64,
) -> list[Sampled]:
    """One completion of each prompt, in order.

    Args:
        model: a transformers causal LM; its generation settings are not looked at, but for EOS.
        tokenizer: its tokenizer.
        prompts: token ids, at least one each.
        numbers: (B, T) uniform in [0, 1); T is the most tokens a completion may have. See `uniforms`.
        temperature: the logits are divided by it.
        stop: strings before which a completion is cut.
        max_rows: prompts in one batch.
    """
    ends = end_ids(model, tokenizer)
    pad = _pad_id(tokenizer)
    completions = []
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends)  # no repetition penalty, no top-k of the checkpoint's
    try:
        for begin in range(0, len(prompts), max_rows):
            batch = prompts[begin : begin + max_rows]
            width = max(len(ids) for ids in batch)
            input_ids, mask = _left_padded(batch, width, pad)
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=numbers.shape[1],
                do_sample=False,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([_Draw(numbers[begin : begin + max_rows], width, temperature)]),
                stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, stop, width)] if stop else []),
            )
            completions += [as_sampled(tokenizer, ids[width:], frozenset(ends), stop) for ids in output.tolist()]
    finally:
        model.generation_config = own
    return completions


def as_sampled(tokenizer: Any, ids: list[int], ends: frozenset[int], stop: Sequence[str]) -> Sampled:
    """A completion from what was generated (with padding after its end), the ids in `ends` and the stop strings."""
    last = next((at for at, token in enumerate(ids) if token in ends), None)
    body = ids[:last]
    text = str(tokenizer.decode(body, skip_special_tokens=True))
    cut = stops.first_stop(text, stop)
    if cut is not None:
        # The tokens that opened the next turn stay: they are what the penalty for not ending is for. Without them it
        # would fall on the answer's last word, and going on would never be unlearnt.
        kept = 1
        while not any(end in tokenizer.decode(body[:kept], skip_special_tokens=True) for end in stop):
            kept += 1
        return Sampled(tuple(body[:kept]), text[:cut].strip(), False)
    return Sampled(tuple(ids if last is None else ids[: last + 1]), text.strip(), last is not None)


# --- tensors ---


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts and completions as tensors."""

    input_ids: Tensor
    """(B, P + T) prompts padded on the left to P, then completions padded on the right to T."""
    attention_mask: Tensor
    """(B, P + T) 1 on real tokens."""
    completion_mask: Tensor
    """(B, T) True on a token of the completion."""


def collate(
    prompts: Sequence[TokenIds], completions: Sequence[TokenIds], tokenizer: Any, *, widths: tuple[int, int] = (0, 0)
) -> Batch:
    """Tensors of at least `widths` = (P, T): processes that share a batch need the same."""
    pad = _pad_id(tokenizer)
    left, mask = _left_padded(prompts, max(widths[0], *(len(ids) for ids in prompts)), pad)
    width = max(widths[1], *(len(ids) for ids in completions))
    right = torch.full((len(completions), width), pad, dtype=torch.long)  # (B, T)
    completion_mask = torch.zeros((len(completions), width), dtype=torch.bool)
    for row, ids in enumerate(completions):
        right[row, : len(ids)] = torch.tensor(ids)
        completion_mask[row, : len(ids)] = True
    return Batch(torch.cat([left, right], 1), torch.cat([mask, completion_mask.long()], 1), completion_mask)


def _left_padded(prompts: Sequence[TokenIds], width: int, pad: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)  # (B, P)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)  # (B, P) 1 on real tokens
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _pad_id(tokenizer: Any) -> int:
    # Never attended to and never scored, so any id will do.
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def positions(attention_mask: Tensor) -> Tensor:
    """(B, L) places of the tokens, the first real one at 0: transformers counts the padding too unless told."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def known_options(model: Any, **options: Any) -> dict[str, Any]:
    """The options that the model's `forward` takes."""
    names = inspect.signature(getattr(model, "module", model).forward).parameters
    return {name: value for name, value in options.items() if name in names}


def completion_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float) -> Tensor:
    """Logits (B, tokens, V), float32, divided by the temperature, from which each of the last `tokens` was drawn."""
    options = known_options(
        model, position_ids=positions(attention_mask), logits_to_keep=tokens + 1, use_cache=False
    )  # the prompt's logits are never made where the model can leave them out
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
    return logits[:, -tokens - 1 : -1].float() / temperature


def completion_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float
) -> Tensor:
    """Log p(a|s) (B, tokens) of the last `tokens` of each row, nats."""
    logits = completion_logits(model, input_ids, attention_mask, tokens, temperature)
    return token_logprobs(logits, input_ids[:, -tokens:])
