"""The plot of the alignment tax: a benchmark keeps its colour, whatever else was measured."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from almost_eval.compare.tax.tax import MeasuredPolicy, Tax
from almost_eval.report import tax_page
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


def test_rewards_of_two_models_are_not_on_one_axis() -> None:
    """A logit of one reward model says nothing beside a logit of another."""
    own = dataclasses.replace(measured("reward", "kl"), log=[{"step": 0, "reward": 40.0, "kl": 0.0, "length": 9.0}])
    axes = dict(tax_page._panels(own))
    assert list(axes) == ["Mean reward, raw logit", "KL to before, nats an answer", "Length in training, tokens"]
    other = dataclasses.replace(own, log_apart=("reward",))
    titles = [title for title, _ in tax_page._panels(other)]
    assert titles == [*list(axes)[:2], "Reward in training, by its own model", "Length in training, tokens"]
    figure = Figure()
    for tax, highest in ((own, 40.0), (other, 0.6)):
        panel = figure.add_subplot()
        dict(tax_page._panels(tax))["Mean reward, raw logit"](panel)
        assert max(np.max(line.get_ydata()) for line in panel.lines) == highest
    assert "Reward in training" in draw(other)[0]
