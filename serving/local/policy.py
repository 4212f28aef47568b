"""A model that answers: the prompt it reads, the room that is left in its context, and how its tokens are drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.models.chat import load_template, special_tokens
from almost_eval.models.stops import stop_strings
from almost_eval.types import Conversation
from serving.gateway.errors import refusal
from serving.local.schema import LocalChat


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
        """The length of the prompt."""
        return len(self.engine.encoder.encode_texts([prompt])[0])

    def sampling(self, request: LocalChat, prompt: str) -> SamplingParams:
        """How to answer the request.

        Raises:
            HTTPException: 400: prompt and answer do not fit the context.
        """
        context, used = self.engine.context_length, self.prompt_tokens(prompt)
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
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        return SamplingParams(
            max_new_tokens=most or room,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            n=request.n or 1,
            stop=tuple(dict.fromkeys((*(text for text in stop if text), *self.stop()))),
            seed=random.getrandbits(31) if request.seed is None else request.seed,
        )
