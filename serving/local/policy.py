"""A request to the local server, and the model that answers it.

What a request may hold: anything else is refused, since it would be ignored. And of the model the prompt it reads, the
room that is left in its context, and how its tokens are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.models.chat import load_template, special_tokens, stop_strings
from almost_eval.types import Conversation, Message
from serving.gateway.candidates import GREEDY
from serving.gateway.errors import refusal
from serving.gateway.schema import StreamOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LocalTurn(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class LocalChat(BaseModel):
    """What `/v1/chat/completions` takes."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[LocalTurn], Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class LocalClassify(BaseModel):
    """What `/classify` takes."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[LocalTurn], Field(min_length=1)]
    model: str | None = None
    add_generation_prompt: bool = False


def conversation_of(turns: Sequence[LocalTurn]) -> Conversation:
    """The messages of a request as this toolkit's own."""
    return tuple(Message(turn.role, turn.content) for turn in turns)


def refuse_endless(text: str, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Refuse a text that no context of so many tokens holds. To count the tokens of 4 MB takes up to a minute.

    Raises:
        HTTPException: 400: it has more characters than so many tokens.
    """
    most = context * _longest_token(tokenizer)
    if len(text) > most:
        raise refusal(
            400,
            f"the context of {context} tokens is full: the conversation has {len(text):,} characters, and {most:,} at "
            "most can fit; shorten it",
            "context_length_exceeded",
            param="messages",
        )


@cache
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token, or more: where tokens are bytes, each byte is written as a character."""
    return max(map(len, tokenizer.get_vocab()))


@dataclass(frozen=True, slots=True)
class Policy:
    """A model that answers, under the name it is served as."""

    name: str
    engine: HFEngine

    def prompt(self, conversation: Conversation) -> str:
        """What the model reads."""
        template = load_template("auto", self.engine.tokenizer)
        assert template is not None
        tokens = special_tokens(self.engine.tokenizer)
        return template.render(conversation, add_generation_prompt=True, special_tokens=tokens)

    def stop(self) -> tuple[str, ...]:
        """The strings at which an answer is over: those of the built-in format that the model uses."""
        template = load_template("auto", self.engine.tokenizer)
        assert template is not None
        return stop_strings(template)

    def prompt_tokens(self, prompt: str) -> int:
        """The length of the prompt.

        Raises:
            HTTPException: 400: it is longer than whatever fits the context.
        """
        refuse_endless(prompt, self.engine.tokenizer, self.engine.context_length)
        return len(self.engine.encoder.encode_texts([prompt])[0])

    def sampling(self, request: LocalChat, used: int) -> SamplingParams:
        """How to answer a request whose prompt has `used` tokens.

        Raises:
            HTTPException: 400: prompt and answer do not fit the context.
        """
        context = self.engine.context_length
        room = context - used
        most = request.max_completion_tokens or request.max_tokens
        if room < (most or 1):
            new = f"{most} new ones" if most else "an answer"
            raise refusal(
                400,
                f"the context of {context} tokens is full: the conversation has {used} and leaves no room for {new}; "
                "shorten it, or ask for less",
                "context_length_exceeded",
                param="messages",
            )
        temperature = request.temperature
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        return SamplingParams(
            max_new_tokens=most or room,
            temperature=1.0 if temperature is None else temperature if temperature >= GREEDY else 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            n=request.n or 1,
            stop=tuple(dict.fromkeys((*(text for text in stop if text), *self.stop()))),
            seed=random.getrandbits(31) if request.seed is None else request.seed,
        )
