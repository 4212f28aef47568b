"""Wins, ties and losses, and length, on reviews that can be counted by hand."""

from pathlib import Path
from typing import Any

import pytest
from report_fixtures import sample, write_run

from almost_eval.report.judged import length_bins, outcomes
from almost_eval.report.runs import LoadedRun, load_runs
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["report_fixtures"]

SETTINGS = {"systems": {"baseline": {"name": "base"}, "model": {"name": "mine"}}}


def review(question: int, order: str, score: float | None, *, mine: int = 10, other: int = 20) -> SampleRecord:
    lengths = [other, mine] if order == "forward" else [mine, other]
    group = "math" if question > 2 else "general"
    systems: dict[str, Any] = {"order": order, "baseline": "base", "model": "mine"}
    stored = sample(f"{question}/{order}", group=group, cluster=f"{question}", **systems)
    reason = "unparsed" if score is None else None
    return SampleRecord(stored, {"lengths": lengths, "review": "text", "winner": "1"}, Score(score, reason))


def judged(folder: Path, records: list[SampleRecord], *, task: str = "vicuna", **results: Any) -> LoadedRun:
    write_run(
        folder,
        records,
        task=task,
        protocol="gpt-4",
        headline="win_rate",
        spec={"settings": SETTINGS, "requires": "judge"},
        results=results,
    )
    (run,) = load_runs([folder]).runs
    return run


def test_by_hand(tmp_path: Path) -> None:
    run = judged(
        tmp_path / "run",
        [
            review(1, "forward", 1.0),
            review(1, "reverse", 1.0),
            review(2, "forward", 0.5),
            review(2, "reverse", 1.0, mine=30),
            review(3, "forward", 0.0),
            review(3, "reverse", None),
        ],
    )
    assert run.label == "mine"
    assert run.baseline_system == "base"
    every, forward, reverse, general, maths = outcomes(run)
    assert (every.wins, every.ties, every.losses, every.unscored, every.n) == (3, 1, 1, 1, 5)
    assert (forward.wins, forward.ties, forward.losses, forward.unscored) == (1, 1, 1, 0)
    assert (reverse.wins, reverse.ties, reverse.losses, reverse.unscored) == (2, 0, 0, 1)
    assert (general.label, general.wins, maths.label, maths.losses) == ("general", 3, "math", 1)
    assert length_bins(run) == []  # too few to say anything


def test_length_bins(tmp_path: Path) -> None:
    records = [review(i, "forward", float(i >= 20), mine=10 if i < 20 else 80) for i in range(40)]
    first, *_, last = length_bins(judged(tmp_path / "run", records))
    assert (first.ratio, first.share.value) == (pytest.approx(0.5), 0.0)
    assert (last.ratio, last.share.value) == (pytest.approx(4.0), 1.0)


def test_a_judged_run_is_known_by_what_it_requires(tmp_path: Path) -> None:
    other = judged(tmp_path / "other", [review(1, "forward", 1.0)], task="questions")
    assert other.judged
    write_run(tmp_path / "check", [], task="judge-check", spec={"requires": "judge"})  # of a judge, no systems
    write_run(tmp_path / "plain", [], task="vicuna")
    runs = load_runs([tmp_path / name for name in ("other", "check", "plain")])
    assert [run.judged for run in runs.runs] == [True, False, False]
    assert [benchmark.label for benchmark in runs.benchmarks] == [
        "Questions vs base · judge gpt-4",
        "judge-check · choice",
        "vicuna · choice",
    ]
