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
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypedDict, Unpack

from almost_eval.errors import InputError
from almost_eval.judge.api.journal import BATCH, STANDARD, Journal, Ledger, LedgerEntry
from almost_eval.judge.records import JudgeRequest, Usage
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
    cached: float | None = None
    """Of prompt tokens that the provider reads from its cache; None is `input`."""
    reasoning: float | None = None
    """Of completion tokens that are spent on thinking; None is `output`."""
    written: float | None = None
    """Of prompt tokens that the provider writes to its cache; None is `input`."""
    batch: float | None = None
    """What a batch costs of it, as a share of 1; None is unknown, and counts as the whole."""
    batch_source: str = ""
    """Where that was read."""

    def share(self, tier: str) -> float:
        """Of the price, what a sending of this tier costs."""
        return self.batch if tier == BATCH and self.batch is not None else 1.0

    def of(self, prompt: int, completion: int, cached: int = 0, reasoning: int = 0, written: int = 0) -> float:
        """USD for so many tokens; the fields of a `Usage`."""
        read = self.input if self.cached is None else self.cached
        thought = self.output if self.reasoning is None else self.reasoning
        write = self.input if self.written is None else self.written
        fresh = (prompt - cached - written) * self.input + (completion - reasoning) * self.output
        return (fresh + cached * read + written * write + reasoning * thought) / 1e6

    def at_most(self, prompt: int, completion: int) -> float:
        """USD for so many tokens, whichever of them are read from a cache, written to one, or spent on thinking."""
        dearest = max(self.input, self.cached or 0.0, self.written or 0.0)
        return (prompt * dearest + completion * max(self.output, self.reasoning or 0.0)) / 1e6


class RarerPrices(TypedDict, total=False):
    """What the flags state besides the two that go together; None is the table's."""

    price_cached: float | None
    price_reasoning: float | None
    price_batch: float | None


class StatedPrices(RarerPrices, total=False):
    """What the flags state."""

    price_in: float | None
    price_out: float | None


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
    bytes: int = 0
    """Of the texts that would be sent, as UTF-8."""
    n_under_way: int = 0
    """Different requests beside these that were sent already, and have no reply yet."""


def price_of(
    judge: str,
    price_in: float | None = None,
    price_out: float | None = None,
    price_cached: float | None = None,
    price_reasoning: float | None = None,
    price_batch: float | None = None,
) -> Price | None:
    """The price that the flags state, else the table's line for exactly this model; None where there is neither.

    Raises:
        InputError: one price without the other, or one below zero; a share of a batch that is no share.
    """
    priced = (line for line in _content()["prices"] if judge in line["models"] and "input" in line)
    line: JSONObject | None = next(priced, None)
    batch, batch_source = (line.get("batch"), line.get("batch_source", "")) if line else (None, "")
    if price_batch is not None:
        if not 0 <= price_batch <= 1:
            raise InputError("--price-batch must be from 0 to 1: what a batch costs of the price, such as 0.5")
        batch, batch_source = price_batch, "--price-batch"
    if (price_in is None) != (price_out is None):
        raise InputError("--price-in and --price-out go together: USD per million prompt and completion tokens")
    if price_in is None and (price_cached is not None or price_reasoning is not None):
        raise InputError("--price-cached and --price-reasoning go with --price-in and --price-out")
    if price_in is not None and price_out is not None:
        every = [price for price in (price_in, price_out, price_cached, price_reasoning) if price is not None]
        if not all(0 <= price < float("inf") for price in every):
            raise InputError("--price-in and --price-out must be 0 or more (USD per million tokens)")
        stated = "--price-in, --price-out"
        factor = line["written"] / line["input"] if line and "written" in line else None
        written = None if factor is None else price_in * factor
        return Price(price_in, price_out, stated, "", price_cached, price_reasoning, written, batch, batch_source)
    if line is None:
        return None
    cached, thinking, written = line.get("cached"), line.get("reasoning"), line.get("written")
    source, day = line["source"], line["date"]
    return Price(line["input"], line["output"], source, day, cached, thinking, written, batch, batch_source)


@dataclass(frozen=True, slots=True)
class Retirement:
    """When a maker shuts a judge down."""

    date: str
    """The day, as in 2026-10-23."""
    successor: str
    """What its maker names in its place."""
    source: str
    """Where it was read, and when."""

    def words(self, judge: str, today: str) -> str:
        """In a sentence."""
        when = f"was shut down on {self.date}" if self.date <= today else f"will be shut down on {self.date}"
        return f"{judge} {when}; its maker names {self.successor} in its place"


def retirement_of(judge: str) -> Retirement | None:
    """When this judge goes, or went, as the table says; None where it says nothing."""
    for line in _content()["retirements"]:
        if judge in line["models"]:
            return Retirement(line["date"], line["successor"], f"{line['source']} {line['read']}")
    return None


def estimate_tokens(request: JudgeRequest) -> int:
    """Tokens of the prompt, estimated on the safe side; see the head of this file."""
    return 3 + sum(_TOKENS_PER_MESSAGE + _text_tokens(message.content) for message in request.messages)


def estimate(
    requests: Iterable[JudgeRequest],
    *,
    journal: Journal | None = None,
    less: Container[str] = (),
    ahead: int | None = None,
    **prices: Unpack[StatedPrices],
) -> Estimate:
    """What asking these would take; nothing is sent. Requests that `journal` can answer are left out.

    Args:
        requests: what would be sent.
        journal: of the folder, where there is one.
        less: digests of requests that were sent already, and are paid for.
        ahead: how many are sent by themselves before the rest goes into a batch; None where there is none.
        prices: see `price_of`.

    Raises:
        InputError: see `price_of`.
    """
    seen: set[str] = set()
    waiting: set[str] = set()
    prompt = completion = size = 0
    total: float | None = 0.0
    for request in requests:
        digest = request.digest
        if digest in seen or (journal is not None and journal.get(digest) is not None):
            continue
        if digest in less:
            waiting.add(digest)
            continue
        seen.add(digest)
        tokens = estimate_tokens(request)
        prompt += tokens
        completion += request.max_tokens
        size += sum(len(message.content.encode(errors="replace")) for message in request.messages)
        price = price_of(request.judge, **prices)
        if price is None or total is None:
            total = None
        else:
            tier = STANDARD if ahead is None or len(seen) <= ahead else BATCH
            total += price.at_most(tokens, request.max_tokens) * price.share(tier)
    return Estimate(len(seen), prompt, completion, total, size, len(waiting))


class Budget:
    """What was spent, and what may be: the worst case of a request is set aside before it is sent.

    Args:
        max_cost: USD; None is no bound.
        price_in: see `price_of`, as for the other prices.
        price_out: see there.
        judge: the model to look up.
        more: the other prices.

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
        **more: Unpack[RarerPrices],
    ) -> None:
        self.price = price_of(judge, price_in, price_out, **more)
        if max_cost is not None:
            if not 0 < max_cost < float("inf"):
                raise InputError("--max-cost must be a number above 0 (USD); without it there is no bound")
            if self.price is None:
                raise InputError(
                    f"--max-cost needs the price of {judge or 'the judge'!r}, which is unknown; give --price-in and "
                    "--price-out (USD per million tokens)"
                )
        self.max_cost = max_cost
        self.spent = 0.0
        """USD, for what the provider counted; and the worst case where it did not, or where a reply was lost."""
        self.reserved = 0.0
        """USD set aside for requests on their way."""
        self.pending = 0
        """How many they are."""

    def worst(self, request: JudgeRequest, tier: str = STANDARD) -> float:
        """USD that the request may cost, by the estimate of its prompt."""
        return self.price.at_most(*self.most(request)[:2]) * self.price.share(tier) if self.price else 0.0

    @staticmethod
    def most(request: JudgeRequest) -> Usage:
        """Tokens that the request may take, by the estimate of its prompt."""
        return Usage(estimate_tokens(request), request.max_tokens)

    def cost(self, usage: Usage, tier: str = STANDARD) -> float:
        """USD for tokens that a provider counted; 0 where the price is unknown."""
        return self.price.of(*usage) * self.price.share(tier) if self.price else 0.0

    def of_ledger(self, ledger: Ledger) -> tuple[float, float]:
        """USD that a folder's sendings were billed, and the most that those may have taken of which nobody says."""
        sums = [0.0, 0.0]
        for entry in ledger.entries:
            sums[entry.is_unsure] += self._of_entry(entry)
        return sums[0], sums[1]

    def _of_entry(self, entry: LedgerEntry) -> float:
        if entry.stated is not None:
            return entry.stated
        if self.price is None:
            return 0.0
        if entry.is_unsure:
            return self.price.at_most(*entry.usage[:2]) * self.price.share(entry.tier)
        return self.cost(entry.usage, entry.tier)

    def is_known(self, ledger: Ledger) -> bool:
        """Whether USD can be said of all that a ledger holds: by a price, or as the host states them."""
        return self.price is not None or all(entry.stated is not None for entry in ledger.entries)

    def reserve(self, amount: float) -> bool:
        """Set USD aside; False where that could exceed the bound."""
        # A run whose bound is its own estimate must not fail on the last digit of a float.
        if self.max_cost is not None and self.spent + self.reserved + amount > self.max_cost * (1 + 1e-9):
            return False
        self.reserved += amount
        self.pending += 1
        return True

    def too_dear(self, worst: float) -> str:
        """Why a request is not sent that may cost so many USD."""
        return f"not sent: it may cost {worst:.4f} USD, and {self.spent:.4f} USD are spent"

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
def _content() -> JSONObject:
    content = files("almost_eval.judge.api").joinpath("prices.json").read_text(encoding="utf-8")
    return dict(json.loads(content))
