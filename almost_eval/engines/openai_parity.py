"""Whether endpoints that are to share a run serve the same model: their log-probabilities of one short text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from almost_eval.errors import InputError

if TYPE_CHECKING:
    import openai

TEXT = "The capital of France is Paris, and 12 times 12 is 144. Otters eat fish; they"
TOLERANCE = 0.1
"""Nats by which a log-probability may differ: several times what half precision on two kinds of hardware does, and less
than what a few steps of training do to some token of the text."""


def compare_endpoints(model: str, clients: Sequence[tuple[str, openai.OpenAI]]) -> None:
    """Refuse an endpoint (address as it is shown, client) whose log-probabilities are not those of the others.

    Raises:
        InputError: one differs from the others, which is named; or one does not tell, so that nobody knows.
    """
    answers = {shown: _logprobs(model, client) for shown, client in clients}
    if silent := [shown for shown, answer in answers.items() if not answer]:
        raise InputError(
            f"the endpoint {silent[0]} tells no log-probabilities, so it cannot be compared with the others: give one "
            "base_url, or a proxy that stands before your servers"
        )
    if broken := [shown for shown, answer in answers.items() if not all(map(math.isfinite, answer.values()))]:
        raise InputError(
            f"the endpoint {broken[0]} gives log-probabilities that are no numbers (nan or infinite): its weights or "
            "its number format are broken; mend it, or leave it out"
        )
    first = next(iter(answers.values()))
    if any(answer.keys() != first.keys() for answer in answers.values()):
        counts = ", ".join(f"{shown}: {' '.join(list(answer)[:3])} ..." for shown, answer in answers.items())
        raise InputError(f"the endpoints do not serve the same {model}: they expect other tokens ({counts})")
    rows = np.array([list(answer.values()) for answer in answers.values()])  # (endpoints, tokens)
    off = float((rows.max(axis=0) - rows.min(axis=0)).max())
    if off > TOLERANCE:
        middle = np.array([median(column) for column in rows.T.tolist()])  # what most say
        which = int(np.abs(rows - middle).max(axis=1).argmax())
        raise InputError(
            f"the endpoint {list(answers)[which]} gives other log-probabilities than the rest (by {off:.3g} nats on a "
            f"probe; {TOLERANCE} are allowed): serve the same weights in the same number format, or leave it out"
        )


def _logprobs(model: str, client: openai.OpenAI) -> Mapping[str, float]:
    """Place and token -> log-probability, of the text where the server repeats it, else of the most likely next token.

    Empty where it tells none.
    """
    import openai

    for echo in (True, False):
        try:
            answer = client.completions.create(
                model=model, prompt=TEXT, max_tokens=1, temperature=0.0, logprobs=1, echo=echo
            )
            logprobs = answer.choices[0].logprobs
            tokens, values = list(logprobs.tokens or []), list(logprobs.token_logprobs or [])  # type: ignore[union-attr]
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.NotFoundError):
            continue
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError):
            return {}
        if echo:  # the last one is written, not read: two may be as likely
            tokens, values = tokens[:-1], values[:-1]
        known = zip(tokens, values, strict=False)
        logprob_of = {f"{at}:{token!r}": float(value) for at, (token, value) in enumerate(known) if value is not None}
        if logprob_of:
            return logprob_of
    return {}
