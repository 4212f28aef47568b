"""What engines share: the base of those that hold a checkpoint, and two functions.

The base encodes jointly, and refuses what does not fit the context. `collected` puts the parts of answers together, and
`encode_rolling` cuts a text that is longer than the context into windows (perplexity).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeVar, Unpack

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, SamplingParams
from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest, Ids, TokenEncoder
from almost_eval.errors import InputError
from almost_eval.models.checkpoint import Checkpoint, context_length
from almost_eval.models.held import HeldCheckpoint, HeldOptions, shorter_context
from almost_eval.types import EngineReport, LoglikelihoodRequest

Part = TypeVar("Part")


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


def collected(
    parts: Iterable[tuple[tuple[int, int], Part]], sizes: Mapping[int, int]
) -> Iterator[tuple[int, list[Part]]]:
    """Yield (index, its parts in their order) as soon as the last of them is there.

    Args:
        parts: (index, number of the part) and the part, in any order.
        sizes: index -> how many parts it has.
    """
    there: dict[int, dict[int, Part]] = {}
    for (index, number), part in parts:
        there.setdefault(index, {})[number] = part
        if len(there[index]) == sizes[index]:
            whole = there.pop(index)
            yield index, [whole[i] for i in range(len(whole))]


def encode_rolling(encoder: TokenEncoder, request: LoglikelihoodRequest, context_length: int) -> EncodedRequest:
    """The one text of a rolling request, each token scored once, in lm-eval's windows."""
    (ids,) = encoder.encode_texts(request.continuations)
    windows = rolling_windows(ids, encoder.stand_in(), context_length)
    return EncodedRequest(request, tuple(EncodedContinuation(*window) for window in windows))


def rolling_windows(ids: Ids, first: Ids, size: int) -> list[tuple[Ids, Ids]]:
    """Cut a text into (context, scored) pieces of at most `size` input positions, as lm-eval does.

    The first piece is conditioned on `first` (BOS), each other on one token of the text, the last on as many as fit.
    A text without tokens has no piece.
    """
    if not len(ids):
        return []
    windows = [(first, ids[:size])]
    for begin in range(size, len(ids), size):
        end = min(begin + size, len(ids))
        windows.append((ids[end - size - 1 : begin], ids[begin:end]))
    return windows
