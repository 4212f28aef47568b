"""Completions sampled from a policy in training, and the log-probabilities of their tokens.

A token is drawn from the whole distribution at the sampling temperature: the caller passes a uniform number, and the
cumulative distribution is inverted at it. So no global generator is used, and a draw does not depend on its batch. The
log-probabilities that PPO compares are those of the distribution that was sampled; with top-p they would not be.

A completion ends with EOS. One that opens the next turn itself ends with the last token of that stop string, and its
text is cut before the stop string. Such a completion has not ended, like one that ran out of tokens: `eos_penalty` is
for both.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from almost_eval.engines.hf_generation import StopStrings
from almost_eval.engines.hf_loglikelihood import padded_left
from almost_eval.errors import TemplateError
from almost_eval.models import stops
from almost_eval.models.chat import ChatTemplate, dialogue_text, encode_text, special_tokens
from almost_eval.types import Conversation, Message
from almost_train.rlsf.header_sampling import inverted, sample_behind_headers
from almost_train.rlsf.ppo import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from almost_eval.rewards.hf import HFRewardModel

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RolloutPrompt:
    """One prompt, as the policy reads it."""

    id: str
    messages: Conversation
    """The dialogue up to the answer; the last message is the user's."""
    rendered: str
    """With the chat template and the generation prompt."""
    token_ids: TokenIds

    @property
    def text(self) -> str:
        """As a person reads it: the user's words, or all turns where there are more."""
        return self.messages[0].content if len(self.messages) == 1 else dialogue_text(self.messages)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion."""

    token_ids: TokenIds
    """At least one; EOS included where there is one, a stop string's tokens too, and nothing after."""
    text: str
    """Without special tokens and the whitespace around it: what the reward model reads."""
    ended: bool
    """Whether it ends in EOS."""
    shortened: bool = False
    """Whether it ends where the reward model's context is full."""
    logprobs: tuple[float, ...] | None = None
    """Log p of each token by another engine that drew it, nats; None where the model in training drew."""


def read_prompts(
    rows: Sequence[tuple[str, Conversation]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
) -> list[RolloutPrompt]:
    """Each (id, dialogue) as the template writes it with its generation prompt.

    Raises:
        TemplateError: a dialogue that the template refuses, with its id.
    """
    tokens = special_tokens(tokenizer)
    prompts = []
    for id, messages in rows:
        try:
            rendered = template.render(messages, add_generation_prompt=True, special_tokens=tokens)
        except TemplateError as error:
            raise TemplateError(f"prompt {id}: {error}") from None
        prompts.append(RolloutPrompt(id, messages, rendered, tuple(encode_text(tokenizer, rendered))))
    return prompts


def batch_prompts(prompts: Sequence[RolloutPrompt], seed: int, step: int, size: int) -> list[RolloutPrompt]:
    """The prompts of a step: all are used once, in a seeded order, before any is used again in another order."""
    chosen = []
    for number in range(step * size, (step + 1) * size):
        epoch, place = divmod(number, len(prompts))
        chosen.append(prompts[int(_permutation(seed, epoch, len(prompts))[place])])
    return chosen


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(n)


def conversation(prompt: Conversation, answer: str) -> Conversation:
    """What the reward model is to judge."""
    return (*prompt, Message("assistant", answer))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's EOS and those of the model's generation settings."""
    return sorted(stops.end_ids(model.generation_config.eos_token_id, tokenizer))


# --- sampling ---


def uniforms(seed: int, step: int, rows: Sequence[int], tokens: int) -> Tensor:
    """(B, tokens) numbers in [0, 1), float64, each row from a generator of its own keyed by (seed, step, row).

    So a row of a step draws the same on one process as on many.
    """
    return torch.from_numpy(np.stack([np.random.default_rng((seed, step, row)).random(tokens) for row in rows]))


class _Draw(LogitsProcessor):
    """Leaves in every row only the token at which its next uniform number inverts the cumulative distribution."""

    def __init__(self, numbers: Tensor, prompt_length: int, temperature: float) -> None:
        self._numbers = numbers  # (B, T)
        self._prompt_length = prompt_length
        self._temperature = temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        at = input_ids.shape[1] - self._prompt_length
        token = inverted(scores, self._numbers[:, at : at + 1], self._temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)  # type: ignore[return-value]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    numbers: Tensor,
    *,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    max_rows: int = 64,
) -> list[Sampled]:
    """One completion of each prompt, in order. Prompts that begin alike are read once, the rest as they come.

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
    generate = cast(Any, model).generate  # transformers types it for a protocol of its own
    own = model.generation_config
    drawn = dict(
        sample_behind_headers(
            model, tokenizer, prompts, numbers, frozenset(ends), temperature=temperature, stop=stop, max_rows=max_rows
        )
    )
    left = [number for number in range(len(prompts)) if number not in drawn]
    model.generation_config = GenerationConfig(eos_token_id=ends)  # no repetition penalty, no top-k of the checkpoint's
    try:
        for begin in range(0, len(left), max_rows):
            chosen = left[begin : begin + max_rows]
            batch = [prompts[number] for number in chosen]
            input_ids, mask = padded_left(batch, pad)
            width = input_ids.shape[1]
            output: Tensor = generate(  # (B, P + T)
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=numbers.shape[1],
                do_sample=False,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([_Draw(numbers[chosen], width, temperature)]),
                stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, stop, width)] if stop else []),
            )
            drawn |= dict(zip(chosen, (ids[width:] for ids in output.tolist()), strict=True))
    finally:
        model.generation_config = own
    return [as_sampled(tokenizer, drawn[number], frozenset(ends), stop) for number in range(len(prompts))]


def as_sampled(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: frozenset[int], stop: Sequence[str]
) -> Sampled:
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


def shorten_for_reward(
    completions: Sequence[Sampled],
    prompts: Sequence[Conversation],
    reward: HFRewardModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Sampled]:
    """The completions; one that the reward model could not read whole ends where that model's context is full.

    Counted in the reward model's tokens: the two tokenizers may differ, and even with one the text may be encoded in
    more tokens than were sampled. What is left is a sample of the policy with fewer new tokens. It has not ended, like
    one that ran out of `max_new_tokens`. The reward model has room for each prompt with an empty answer.
    """
    lengths = reward.lengths([conversation(prompt, c.text) for prompt, c in zip(prompts, completions, strict=True)])
    return [
        c if length <= reward.context_length else _shortened(c, prompt, reward, tokenizer)
        for c, prompt, length in zip(completions, prompts, lengths, strict=True)
    ]


def _shortened(
    completion: Sampled, prompt: Conversation, reward: HFRewardModel, tokenizer: PreTrainedTokenizerBase
) -> Sampled:
    def text(tokens: int) -> str:
        return str(tokenizer.decode(list(completion.token_ids[:tokens]), skip_special_tokens=True)).strip()

    # Bisection: so many tokens fit, so many do not.
    fits, too_many = 0, len(completion.token_ids)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if reward.lengths([conversation(prompt, text(middle))])[0] <= reward.context_length:
            fits = middle
        else:
            too_many = middle
    kept = max(fits, 1)
    logprobs = None if completion.logprobs is None else completion.logprobs[:kept]
    return Sampled(completion.token_ids[:kept], text(fits), ended=False, shortened=True, logprobs=logprobs)


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
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    tokenizer: PreTrainedTokenizerBase,
    *,
    widths: tuple[int, int] = (0, 0),
) -> Batch:
    """Tensors of at least `widths` = (P, T): processes that share a batch need the same."""
    pad = _pad_id(tokenizer)
    left, mask = padded_left(prompts, pad, widths[0])
    width = max(widths[1], *(len(ids) for ids in completions))
    right = torch.full((len(completions), width), pad, dtype=torch.long)  # (B, T)
    completion_mask = torch.zeros((len(completions), width), dtype=torch.bool)
    for row, ids in enumerate(completions):
        right[row, : len(ids)] = torch.tensor(ids)
        completion_mask[row, : len(ids)] = True
    return Batch(torch.cat([left, right], 1), torch.cat([mask, completion_mask.long()], 1), completion_mask)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Never attended to and never scored, so any id will do.
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def positions(attention_mask: Tensor) -> Tensor:
    """(B, L) position of each token, the first real one at 0. By default transformers would count the padding too."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def known_options(model: nn.Module, **options: object) -> dict[str, Any]:
    """The options that the model's `forward` takes."""
    names = inspect.signature(getattr(model, "module", model).forward).parameters
    return {name: value for name, value in options.items() if name in names}


def completion_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float
) -> Tensor:
    """Logits (B, tokens, V), float32, divided by the temperature, from which each of the last `tokens` was drawn."""
    options = known_options(
        model, position_ids=positions(attention_mask), logits_to_keep=tokens + 1, use_cache=False
    )  # the prompt's logits are never made where the model can leave them out
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
    return logits[:, -tokens - 1 : -1].float() / temperature


def completion_logprobs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float
) -> Tensor:
    """Log p(a|s) (B, tokens) of the last `tokens` of each row, nats."""
    logits = completion_logits(model, input_ids, attention_mask, tokens, temperature)
    return token_logprobs(logits, input_ids[:, -tokens:])
