"""Prices, estimates and the budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from replay_server import archive_beside, requests_for

import almost_eval.judge
from almost_eval.errors import InputError
from almost_eval.judge.api.cost import Budget, Price, estimate, estimate_tokens, price_of
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.records import JudgeRequest, Reply
from almost_eval.types import Message

MEASURED = {387: 195, 307: 275, 147: 198, 388: 422, 227: 252, 68: 110, 0: 299, 100: 276, 200: 673, 300: 983, 399: 469}
"""Tokens of the archived prompts by number, counted once with cl100k_base: the hardest to estimate, and others."""


def ask(text: str, judge: str = "gpt-4", max_tokens: int = 100) -> JudgeRequest:
    return JudgeRequest(judge, (Message("user", text),), 0.2, max_tokens)


def test_every_price_says_where_and_when_it_was_read() -> None:
    table = json.loads((Path(almost_eval.judge.__file__).parent / "api" / "prices.json").read_text(encoding="utf-8"))[
        "prices"
    ]
    names = [name for line in table for name in line["models"]]
    assert len(names) == len(set(names))
    assert all(0 < line["input"] <= line["output"] for line in table)
    assert all(line["source"].startswith("https://") and line["date"][:4].isdigit() for line in table)


def test_a_price_is_of_exactly_that_model() -> None:
    known = price_of("gpt-4")
    assert known is not None
    assert (known.input, known.output) == (30.0, 60.0)
    assert price_of("gpt-4-0613") == known
    assert price_of("gpt-4-32k") is None
    assert price_of("gpt-4", 1.0, 2.0) == Price(1.0, 2.0, "--price-in, --price-out", "")
    assert Price(30.0, 60.0, "", "").of(1_000_000, 500_000) == 60.0


@pytest.mark.parametrize("given", [(1.0, None), (None, 1.0), (-1.0, 1.0), (1.0, float("nan"))])
def test_half_a_price_or_a_bad_one(given: tuple[float | None, float | None]) -> None:
    with pytest.raises(InputError, match="--price-in and --price-out"):
        price_of("gpt-4", *given)


def test_tokens_are_estimated_on_the_safe_side(data_root: Path) -> None:
    requests = requests_for(archive_beside(data_root))
    ratios = [estimate_tokens(requests[number]) / true for number, true in MEASURED.items()]
    assert min(ratios) >= 1.0
    assert max(ratios) <= 1.75


@pytest.mark.parametrize(
    ("text", "true"), [("", 0), ("3.14159", 3), ("x = 12", 4), ("a\n\n\nb", 3), ("中文字符", 4), ("abcde", 2)]
)
def test_a_short_text_is_not_estimated_below_its_tokens(text: str, true: int) -> None:
    assert true <= estimate_tokens(ask(text)) - estimate_tokens(ask("")) <= 2 * true + 3


def test_an_estimate_counts_each_request_once_and_no_stored_one(tmp_path: Path) -> None:
    requests = [ask("one"), ask("two"), ask("one")]
    with Journal(tmp_path / "j") as journal:
        whole = estimate(requests, journal=journal)
        assert (whole.requests, whole.completion_tokens) == (2, 200)
        assert whole.price == pytest.approx((whole.prompt_tokens * 30 + 200 * 60) / 1e6)
        journal.put(ask("two"), Reply("9 9", "stop", "m", 1, 1))
        rest = estimate(requests, journal=journal)
    assert rest.requests == 1
    assert rest.prompt_tokens == estimate_tokens(ask("one"))


def test_an_unknown_price_is_unknown() -> None:
    assert estimate([ask("one", "my-judge")]).price is None
    assert estimate([ask("one", "my-judge")], price_in=0.0, price_out=0.0).price == 0.0
    assert estimate([], price_in=1.0, price_out=1.0).price == 0.0


def test_a_bound_needs_a_price() -> None:
    with pytest.raises(InputError, match=r"needs the price of 'my-judge', which is unknown; give --price-in"):
        Budget(1.0, judge="my-judge")
    assert Budget(1.0, 1.0, 1.0, judge="my-judge").price is not None
    assert Budget(judge="my-judge").price is None
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--max-cost must be a number above 0"):
            Budget(bad, judge="gpt-4")


def test_a_reservation_is_given_back_but_for_what_was_used() -> None:
    budget = Budget(1.0, 10.0, 10.0)
    assert budget.reserve(0.6)
    assert not budget.reserve(0.6)
    budget.settle(0.6, 0.1)
    assert budget.reserve(0.6)
    assert (round(budget.spent, 9), round(budget.reserved, 9)) == (0.1, 0.6)


def test_a_run_fits_into_its_own_estimate() -> None:
    requests = [ask(f"{i} " * i, max_tokens=7 * i + 1) for i in range(300)]
    price = estimate(requests).price
    assert price is not None
    budget = Budget(price, judge="gpt-4")
    assert all(budget.reserve(budget.worst(request)) for request in requests)
    assert not budget.reserve(0.01)
