"""The base of the engines that hold a checkpoint: joint encoding, and the refusal of what does not fit the context."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Unpack

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, SamplingParams
from almost_eval.engines.prefix import EncodedRequest, Ids, TokenEncoder
from almost_eval.engines.rolling import encode_rolling
from almost_eval.errors import InputError
from almost_eval.models.checkpoint import Checkpoint, context_length
from almost_eval.models.held import HeldCheckpoint, HeldOptions, shorter_context
from almost_eval.types import EngineReport, LoglikelihoodRequest


class CheckpointEngine(HeldCheckpoint, LoglikelihoodEngine, GenerationEngine):
    """A causal language model in this process; a subclass computes it. Config and tokenizer load at once.

    Args:
        max_length: a context length below the model's own.
        sizes: name of a flag -> its value; each must be 1 or more, or None.
        model: see `HeldCheckpoint`.
        held: see `HeldOptions`.

    Raises:
        InputError: an unknown dtype, a size below 1, or a `max_length` beyond the model's own.
        ModelError: see `find_checkpoint`.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        max_length: int | None,
        sizes: dict[str, int | None],
        **held: Unpack[HeldOptions],
    ) -> None:
        for flag, size in {"max length": max_length, **sizes}.items():
            if size is not None and size < 1:
                raise InputError(f"{flag} is {size}; it must be 1 or more")
        super().__init__(model, **held)
        self._report = EngineReport()
        own = context_length(self.checkpoint.config, self.tokenizer)
        self._context_length = shorter_context(own, max_length)
        self.check_tensors("AutoModelForCausalLM")

    @property
    def context_length(self) -> int:
        """Tokens the model can attend to."""
        return self._context_length

    @property
    def report(self) -> EngineReport:
        """What the last `stream` did."""
        return self._report

    @cached_property
    def encoder(self) -> TokenEncoder:
        """Joint encoding on this tokenizer."""
        return TokenEncoder(self.tokenizer)

    def encode(self, requests: Sequence[LoglikelihoodRequest]) -> list[EncodedRequest]:
        """Token ids of every request. Loads no weights."""
        whole = iter(self.encoder.encode([request for request in requests if not request.rolling]))
        return [
            encode_rolling(self.encoder, request, self.context_length) if request.rolling else next(whole)
            for request in requests
        ]

    def _refuse_long(self, requests: Sequence[EncodedRequest]) -> int:
        """Positions of the longest request.

        Raises:
            InputError: it does not fit; nothing is cut.
        """
        longest = max(request.n_positions for request in requests)
        if longest > self.context_length:
            raise InputError(f"a request of {longest} tokens does not fit the context of {self.context_length}")
        return longest

    def _prompt_ids(self, prompts: Sequence[str], params: SamplingParams) -> list[Ids]:
        """Token ids of each prompt.

        Raises:
            InputError: one that leaves no room for `max_new_tokens`.
        """
        ids = [prompt if len(prompt) else self.encoder.stand_in() for prompt in self.encoder.encode_texts(prompts)]
        longest = max(len(prompt) for prompt in ids)
        if longest + params.max_new_tokens > self.context_length:
            raise InputError(
                f"a prompt of {longest} tokens and {params.max_new_tokens} new ones do not fit the context of "
                f"{self.context_length}; lower max_new_tokens"
            )
        return ids
