"""What a client did, and what each of its sendings was billed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from almost_eval.judge.api.endpoint import Trouble
from almost_eval.judge.api.journal import BILLED, FREE, UNSURE
from almost_eval.judge.records import Reply, Usage


@dataclass
class ClientStats:
    """What a client did. Sendings are `sent` plus all of `retried`."""

    sent: int = 0
    """Different requests that were sent."""
    replied: int = 0
    """... and got a reply now."""
    cached: int = 0
    """Requests answered by the journal, or by another one of the same call that is identical."""
    retried: Counter[str] = field(default_factory=Counter)
    """Sendings after the first of a request, by the reason of the one before."""
    failed: Counter[str] = field(default_factory=Counter)
    """Requests without a reply, by reason: each counts, identical ones too."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the provider bills them, failures included."""
    unmetered: int = 0
    """Sendings that may be billed though nobody says for how much; in `cost` at their worst case."""
    cost: float | None = None
    """USD of this client's sendings; None where the price is unknown."""
    cost_unsure: float = 0.0
    """Of it, the worst case of the `unmetered`."""
    lost: list[str] = field(default_factory=list)
    """Addresses, of several, that could not be reached to the end, or were left out."""

    def book(self, bill: Bill, cost: float) -> None:
        """Count what a sending was billed.

        Args:
            bill: what is known of it.
            cost: USD, or the most it may be.
        """
        usage = bill.usage or Usage(0, 0)
        self.prompt_tokens += usage.prompt
        self.completion_tokens += usage.completion
        self.unmetered += bill.is_unsure
        if self.cost is not None:
            self.cost += cost
            self.cost_unsure += cost if bill.is_unsure else 0.0


@dataclass(frozen=True, slots=True)
class Bill:
    """What a sending was billed."""

    is_unsure: bool
    """It may have been billed, and nobody says for how much."""
    usage: Usage | None
    """Tokens; None where nobody counted any."""
    cost: float | None
    """USD, where the host states them."""

    @classmethod
    def of(cls, outcome: Reply | Trouble | None) -> Bill:
        """What is known from an outcome; None is a sending that was stopped on its way."""
        if isinstance(outcome, Reply):
            known = any(outcome.usage) or outcome.cost is not None
            return cls(not known, outcome.usage if known else None, outcome.cost)
        if outcome is None:
            return cls(True, None, None)
        unknown = outcome.tokens is None and outcome.cost is None
        return cls(unknown and outcome.may_be_billed, outcome.tokens, outcome.cost)

    @property
    def state(self) -> str:
        """Of the row in the ledger."""
        if self.is_unsure:
            return UNSURE
        return FREE if self.usage is None and self.cost is None else BILLED
