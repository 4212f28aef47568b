"""The plot of the alignment tax: a benchmark keeps its colour, whatever else was measured."""

import pytest

from almost_eval.compare.tax.tax import MeasuredPolicy, Tax
from almost_eval.report.tax_page import draw, html

COLOURS = {"hhh": "#0b62a4", "truthfulqa": "#b5522b", "mmlu": "#3b7d3a", "oracle": "#7a4fa3"}


def measured(*names: str) -> Tax:
    metric = {"value": 0.5, "stderr": 0.1, "ci95": [0.4, 0.6], "n": 9, "unscored": 0}
    policies = [MeasuredPolicy(f"p{step}", "m", step, None, dict.fromkeys(names, metric)) for step in (0.0, 1.0)]
    return Tax(policies, "checkpoints", [], [], "A sentence <b>.", "KL")


@pytest.mark.parametrize("names", [tuple(COLOURS), ("mmlu", "oracle"), ("truthfulqa",), ("oracle",)])
def test_colours_stay_with_their_benchmark(names: tuple[str, ...]) -> None:
    svg, png = draw(measured(*names))
    assert {name for name, colour in COLOURS.items() if colour in svg} == set(names)
    assert png.startswith(b"\x89PNG")


def test_the_page_escapes_what_a_run_says() -> None:
    tax = measured("hhh")
    page = html(tax, draw(tax)[0])
    assert "A sentence &lt;b&gt;." in page
    assert page.count("<svg") == 1
