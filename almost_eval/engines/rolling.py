"""Rolling requests: the whole of a text is scored, however long, in windows of the model's context (perplexity)."""

from __future__ import annotations

from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest, Ids, TokenEncoder
from almost_eval.types import LoglikelihoodRequest


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
