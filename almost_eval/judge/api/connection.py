"""How a judge behind an API is reached, and at what price. Imported where the options are read: nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from almost_eval.judge.api.cost import StatedPrices


@dataclass(frozen=True, slots=True)
class Connection:
    """How a model behind an API is reached. None of it decides a verdict but the address. Fields are named as flags."""

    judge_base_url: str | None = None
    """The endpoint, up to and including `/v1`, several by commas; None is OpenAI's, or `OPENAI_BASE_URL`."""
    timeout: float = 120.0
    """Seconds that one reply may take."""
    concurrency: int = 32
    """Requests on their way at a time, at most."""
    max_cost: float | None = None
    """USD, or None for no bound."""
    price_in: float | None = None
    """USD per million prompt tokens; None is the table's."""
    price_out: float | None = None
    """USD per million completion tokens."""
    price_cached: float | None = None
    """USD per million prompt tokens that are read from a cache; None is `price_in`."""
    price_reasoning: float | None = None
    """USD per million completion tokens that are spent on thinking; None is `price_out`."""
    price_batch: float | None = None
    """What a batch costs of the price, as a share of 1; None is the table's."""
    batch: bool | None = None
    """Whether requests go through the provider's batch API."""
    batch_wait: float | None = None
    """Seconds to wait for batches at most; None waits until they end."""

    @property
    def prices(self) -> StatedPrices:
        """Prices by the names that `price_of`, `estimate` and `Budget` take."""
        return {
            "price_in": self.price_in,
            "price_out": self.price_out,
            "price_cached": self.price_cached,
            "price_reasoning": self.price_reasoning,
            "price_batch": self.price_batch,
        }
