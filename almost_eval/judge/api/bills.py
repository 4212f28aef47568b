"""What a client did, and what each of its sendings was billed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from almost_eval.errors import InputError
from almost_eval.judge.api.cost import Budget
from almost_eval.judge.api.endpoint import JudgeEndpoint, Trouble
from almost_eval.judge.api.journal import BILLED, FREE, STANDARD, UNSURE, Journal
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
        """Count what a sending was billed: `cost` is USD, or the most it may be."""
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


@dataclass(frozen=True, slots=True)
class JudgeMeans:
    """What all calls of one client share."""

    journal: Journal
    """Where each reply is stored before it is handed on."""
    budget: Budget
    stats: ClientStats
    """Counted up as things are done."""
    random: random.Random
    """Of the jitter."""
    concurrency: int
    """Requests on their way at a time, at most."""
    max_attempts: int
    """Sendings of one request, the first included."""
    notice: Callable[[str], None]
    """Takes a line that the user must see at once."""

    def book(self, bill: Bill, worst: float, tier: str = STANDARD) -> float:
        """Count what a sending was billed; USD, at most `worst` where nobody says for how much."""
        cost = worst if bill.is_unsure else self.budget.cost(bill.usage or Usage(0, 0), tier)
        cost = cost if bill.cost is None else bill.cost
        self.stats.book(bill, cost)
        return cost

    def keep_exchange(self, endpoint: JudgeEndpoint, refusal: Trouble) -> None:
        """Tell and remember what an endpoint refuses, once: later processes send it so from the start."""
        if refusal.message:  # else another request has told it already
            self.notice(f"the endpoint {endpoint.base_url} refuses a parameter: {refusal.message} from now on")
            self.journal.take_note(endpoint.name, dict(endpoint.parameters.changes))

    def unbounded(self, endpoint: JudgeEndpoint) -> InputError | None:
        """What ends a run whose budget needs a bound on the tokens of a reply, where an endpoint takes none."""
        if self.budget.max_cost is None or endpoint.parameters.is_bounded:
            return None
        words = "takes no bound on the tokens of a reply, so that --max-cost cannot be kept; leave it out"
        return InputError(f"the endpoint {endpoint.base_url} {words}")
