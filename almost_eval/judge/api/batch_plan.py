"""What `--batch --dry-run` says: how many batches, at what share of the price, and what is under way already."""

from __future__ import annotations

from almost_eval.judge.api.batch_files import MAX_BYTES, MAX_REQUESTS
from almost_eval.judge.api.batch_ledger import BatchLedger
from almost_eval.judge.api.cost import Estimate, Price
from almost_eval.judge.api.journal import Journal
from almost_eval.types import JSONObject

_BYTES_AROUND = 500
"""Of a line of the input file, besides its texts."""
_ESCAPED = 1.1
"""Bytes that JSON makes of one."""


def under_way(journal: Journal | None) -> set[str]:
    """Digests of requests that batches of a folder still owe: they are paid for, or will be."""
    if journal is None:
        return set()
    ledger = BatchLedger(journal)
    return ledger.unsettled(ledger.open())


def batch_facts(needed: Estimate, price: Price | None, *, batch: bool) -> JSONObject:
    """Lines of the plan; none where nothing is sent in batches, and nothing was.

    Args:
        needed: what would be sent.
        price: of the judge.
        batch: whether `--batch` is there.
    """
    facts: JSONObject = {"requests_in_a_batch_already": needed.n_under_way} if needed.n_under_way else {}
    if not batch:
        return facts
    size = needed.bytes * _ESCAPED + needed.requests * _BYTES_AROUND
    facts["batches"] = max(-(-needed.requests // MAX_REQUESTS), -int(-size // MAX_BYTES))
    if price is not None:
        unknown = "unknown, so the whole price counts: --price-batch SHARE states it"
        known = f"{price.batch or 1:g} of the price ({price.batch_source})"
        facts["batch_price"] = unknown if price.batch is None else known
    return facts
