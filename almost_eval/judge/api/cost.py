"""What judging costs: prices by model, an estimate before anything is sent, and a budget that is not exceeded.

Tokens of a prompt are estimated, for no tokenizer is downloaded: `estimate_tokens` counts one token for each four
letters of a word (rounded up), three digits, sign of punctuation, run of other white space, space before a digit, and
0.7 for each byte that is not ASCII. Against cl100k_base (gpt-4's) on the archived answers and reviews this is about
1.5 times the truth (1.2 to 1.7 on the 400 prompts that hold two answers). Letters without vowels or meaning (keys,
hashes) can be three times as many tokens as it says: the budget goes by what the provider counts as soon as it does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from almost_eval.errors import InputError
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.records import JudgeRequest
from almost_eval.types import JSONObject

_PIECES = re.compile(r"[A-Za-z]+|[0-9]{1,3}| (?=[0-9])|[^\S ]+| {2,}|[!-/:-@\[-`{-~]|[^\x00-\x7f]+")
_LETTERS_PER_TOKEN = 4
_TOKENS_PER_WIDE_BYTE = 0.7
_TOKENS_PER_MESSAGE = 4
"""The chat format around a message; another three begin the answer."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens."""

    input: float
    output: float
    source: str
    """Where it was read; `--price-in, --price-out` where the flags state it."""
    date: str
    """When; empty where the flags state it."""

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD for so many tokens."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would send, at most."""

    requests: int
    """Different ones that no stored reply answers."""
    prompt_tokens: int
    """Estimated; see the head of this file."""
    completion_tokens: int
    """As many as the requests allow."""
    price: float | None
    """USD if every reply used all it may; None where the judge's price is unknown."""


def price_of(judge: str, price_in: float | None = None, price_out: float | None = None) -> Price | None:
    """The price that the flags state, else the table's line for exactly this model; None where there is neither.

    Raises:
        InputError: one price without the other, or one below zero.
    """
    if (price_in is None) != (price_out is None):
        raise InputError("--price-in and --price-out go together: USD per million prompt and completion tokens")
    if price_in is not None and price_out is not None:
        if not (0 <= price_in < float("inf") and 0 <= price_out < float("inf")):
            raise InputError("--price-in and --price-out must be 0 or more (USD per million tokens)")
        return Price(price_in, price_out, "--price-in, --price-out", "")
    for line in _table():
        if judge in line["models"]:
            return Price(line["input"], line["output"], line["source"], line["date"])
    return None


def estimate_tokens(request: JudgeRequest) -> int:
    """Tokens of the prompt, estimated on the safe side; see the head of this file."""
    return 3 + sum(_TOKENS_PER_MESSAGE + _text_tokens(message.content) for message in request.messages)


def estimate(
    requests: Iterable[JudgeRequest],
    *,
    price_in: float | None = None,
    price_out: float | None = None,
    journal: Journal | None = None,
) -> Estimate:
    """What asking these would take; nothing is sent. Requests that `journal` can answer are left out.

    Raises:
        InputError: see `price_of`.
    """
    seen: set[str] = set()
    prompt = completion = 0
    total: float | None = 0.0
    for request in requests:
        digest = request.digest
        if digest in seen or (journal is not None and journal.get(digest) is not None):
            continue
        seen.add(digest)
        tokens = estimate_tokens(request)
        prompt += tokens
        completion += request.max_tokens
        price = price_of(request.judge, price_in, price_out)
        total = None if price is None or total is None else total + price.of(tokens, request.max_tokens)
    return Estimate(len(seen), prompt, completion, total)


class Budget:
    """What was spent, and what may be: the worst case of a request is set aside before it is sent.

    Args:
        max_cost: USD; None is no bound.
        price_in: USD per million prompt tokens; with `price_out`, None looks the judge up in the table.
        price_out: USD per million completion tokens.
        judge: the model to look up.
        spent: USD that count already, as of an earlier process of the same run.

    Raises:
        InputError: a bound without a price, or a number out of range.
    """

    def __init__(
        self,
        max_cost: float | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
        *,
        judge: str = "",
        spent: float = 0.0,
    ) -> None:
        self.price = price_of(judge, price_in, price_out)
        if max_cost is not None:
            if not 0 < max_cost < float("inf"):
                raise InputError("--max-cost must be above 0 (USD)")
            if self.price is None:
                raise InputError(
                    f"--max-cost needs the price of {judge or 'the judge'!r}, which is unknown; give --price-in and "
                    "--price-out (USD per million tokens)"
                )
        self.max_cost = max_cost
        self.spent = spent
        """USD, for what the provider counted; and the worst case where it did not, or where a reply was lost."""
        self.reserved = 0.0
        """USD set aside for requests on their way."""
        self.pending = 0
        """How many they are."""

    def worst(self, request: JudgeRequest) -> float:
        """USD that the request may cost, by the estimate of its prompt."""
        return self.price.of(estimate_tokens(request), request.max_tokens) if self.price else 0.0

    def reserve(self, amount: float) -> bool:
        """Set USD aside; False where that could exceed the bound."""
        # A run whose bound is its own estimate must not fail on the last digit of a float.
        if self.max_cost is not None and self.spent + self.reserved + amount > self.max_cost * (1 + 1e-9):
            return False
        self.reserved += amount
        self.pending += 1
        return True

    def settle(self, reserved: float, cost: float) -> None:
        """What was set aside became a cost (0 where nothing was billed)."""
        self.pending -= 1
        self.reserved = self.reserved - reserved if self.pending else 0.0
        self.spent += cost


def _text_tokens(text: str) -> int:
    tokens = 0.0
    for piece in _PIECES.findall(text):
        if not piece.isascii():
            tokens += _TOKENS_PER_WIDE_BYTE * len(piece.encode(errors="replace"))
        elif piece.isalpha():
            tokens += -(-len(piece) // _LETTERS_PER_TOKEN)
        else:
            tokens += 1
    return round(tokens + 0.5)


@cache
def _table() -> list[JSONObject]:
    content = files("almost_eval.judge.api").joinpath("prices.json").read_text(encoding="utf-8")
    return list(json.loads(content)["prices"])
