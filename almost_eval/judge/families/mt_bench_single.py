"""FastChat's prompts of MT-Bench for one answer: a mark from 1 to 10, after the reasons. See `mt_bench.py`."""

from __future__ import annotations

from pathlib import Path

from almost_eval.data.sources import DataSource
from almost_eval.judge.families.mt_bench import official_wording
from almost_eval.judge.prompts import PromptFamily, Wording


def official(data: DataSource) -> Wording:
    """FastChat's prompts for one answer."""
    return official_wording(data, "single")


FAMILY = PromptFamily(
    title="one answer by itself: a mark from 1 to 10, after the reasons",
    form="rating",
    builtin=Path(__file__).with_suffix(".yaml"),
    official=official,
)
