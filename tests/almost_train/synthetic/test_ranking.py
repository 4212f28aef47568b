"""Pairs by rank: worked cases, and random inputs against an independent statement of the official rules."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from almost_eval.errors import DataError, InputError
from almost_train.synthetic.ranking import RankedAnswer, Ranking, ranked_pairs, read_ranking

ABC: Ranking = (("a",), ("b",), ("c",))


def answers(**texts: int | str | None) -> dict[str, RankedAnswer]:
    """Configuration -> text, or its length, or None for one that broke a rule."""
    return {
        name: RankedAnswer(
            name, "" if text is None else text if isinstance(text, str) else "x" * text, None if text else "bad"
        )
        for name, text in texts.items()
    }


def kept(ranking: Ranking, **texts: int | str | None) -> list[str]:
    return [
        f"{p.chosen.configuration}>{p.rejected.configuration}"
        for p in ranked_pairs("p1", answers(**texts), ranking)
        if p.reason is None
    ]


def reasons(ranking: Ranking, **texts: int | str | None) -> dict[str, str | None]:
    return {
        f"{p.chosen.configuration}>{p.rejected.configuration}": p.reason
        for p in ranked_pairs("p1", answers(**texts), ranking)
    }


class TestByHand:
    def test_each_rank_wins_once_against_the_next(self) -> None:
        assert reasons(ABC, a=100, b=90, c=80) == {"a>b": None, "a>c": "rank_has_pair", "b>c": None}

    def test_a_bad_response_makes_way_for_the_next_rank(self) -> None:
        assert reasons(ABC, a=100, b=None, c=80) == {"a>b": "bad_response", "a>c": None, "b>c": "bad_response"}
        assert kept(ABC, a=None, b=None, c=80) == []

    def test_length_rule(self) -> None:
        # Lengths 10, 100, 100: mean 70, std sqrt(1800) = 42.4, bound 48.8. a is shorter than both, and below it.
        assert reasons(ABC, a=10, b=100, c=100) == {"a>b": "length_rule", "a>c": "length_rule", "b>c": None}

    def test_shorter_but_above_the_bound_stays(self) -> None:
        # 60, 100, 40: mean 66.7, std sqrt(622.2) = 24.9, bound 54.2.
        assert kept(ABC, a=60, b=100, c=40) == ["a>b", "b>c"]

    def test_below_the_bound_but_not_shorter_stays(self) -> None:
        # 10, 100, 10: mean 40, std 42.4, bound 18.8. a is below it; a>b goes, and a>c (of equal length) stays.
        assert reasons(ABC, a=10, b=100, c=10) == {"a>b": "length_rule", "a>c": None, "b>c": None}

    def test_on_the_bound_is_long_enough(self) -> None:
        # 2, 4, 4, 4, 5, 5, 7, 9: mean 5, std 2, bound 4. The 4 may beat the 9; the 2 is below the bound.
        lengths = dict(zip("abcdefgh", (4, 9, 2, 4, 4, 5, 5, 7), strict=True))
        found = reasons(tuple((name,) for name in lengths), **lengths)
        assert found["a>b"] is None
        assert found["c>d"] == "length_rule"

    def test_equal_ranks_make_no_pair_and_win_once_together(self) -> None:
        ranking: Ranking = (("a", "b"), ("c",))
        assert reasons(ranking, a=100, b=90, c=80) == {"a>c": None, "b>c": "rank_has_pair"}
        assert reasons(ranking, a=None, b=90, c=80) == {"a>c": "bad_response", "b>c": None}
        # 10, 100, 100: bound 48.8: a fails, so its rank's other configuration wins.
        assert reasons(ranking, a=10, b=100, c=100) == {"a>c": "length_rule", "b>c": None}

    def test_bad_responses_do_not_count_in_the_lengths(self) -> None:
        # With the 1,000: mean 360; without: 30, 40, mean 35, std 5, bound 32.5, so a (30) is too short.
        ranking: Ranking = (("a",), ("b",), ("c",))
        told = answers(a=30, b=40, c=1000)
        told["c"] = RankedAnswer("c", "x" * 1000, "no_final_stop")
        assert [p.reason for p in ranked_pairs("p1", told, ranking)] == ["length_rule", "bad_response", "bad_response"]

    def test_options(self) -> None:
        found = ranked_pairs("p1", answers(a=10, b=100, c=100), ABC, length_rule=False, one_win_a_rank=False)
        assert [p.reason for p in found] == [None, None, None]


def official(instance: dict[str, str], rubric: list[list[str]]) -> list[tuple[str, str]]:
    """The official comparison rules, stated again: walk down the ranks, let each rank win once where it can.

    Not the shape of the official code, nor of ours: for each rank in turn, look for the first of its configurations
    that has an opponent it may beat.
    """
    valid = {name: text for name, text in instance.items() if text not in ("BAD", "")}
    lengths = [len(text) for text in instance.values() if text != "BAD"]
    if len(valid) < 2:
        return []
    bound = np.mean(lengths) - np.std(lengths) / 2
    found = []
    for rank, group in enumerate(rubric):
        below = [name for lower in rubric[rank + 1 :] for name in lower if name in valid]
        for winner, loser in itertools.product([name for name in group if name in valid], below):
            if len(valid[winner]) >= len(valid[loser]) or len(valid[winner]) >= bound:
                found.append((winner, loser))
                break
    return found


def test_equals_the_official_rules_on_random_inputs() -> None:
    rng = random.Random(0)
    total = 0
    for _ in range(3000):
        names = [f"c{i}" for i in range(rng.randint(2, 7))]
        rubric: list[list[str]] = []
        for name in names:  # a new rank, or one more in the last
            if rubric and rng.random() < 0.35:
                rubric[-1].append(name)
            else:
                rubric.append([name])
        # Few different lengths, so that ties and values on the bound are frequent.
        texts = {name: "BAD" if rng.random() < 0.25 else "x" * rng.choice((4, 5, 7, 9, 20)) for name in names}
        told = {
            name: RankedAnswer(name, "" if t == "BAD" else t, "bad" if t == "BAD" else None)
            for name, t in texts.items()
        }
        pairs = [p for p in ranked_pairs("p1", told, tuple(map(tuple, rubric))) if p.reason is None]
        assert [(p.chosen.configuration, p.rejected.configuration) for p in pairs] == official(texts, rubric)
        total += len(pairs)
    assert total > 3000


class TestRankingFile:
    def test_names_and_groups(self, tmp_path: Path) -> None:
        (tmp_path / "ranking.yaml").write_text("- large\n- [medium-a, medium-b]\n- small\n", encoding="utf-8")
        assert read_ranking(tmp_path / "ranking.yaml") == (("large",), ("medium-a", "medium-b"), ("small",))

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("large: 1", "must be a list of configurations, best first"),
            ("- large\n- [3]", "must be a list of configurations"),
            ("- [large, small]", "has one rank"),
            ("- large\n- [small, large]", "has 'large' twice"),
            ("", "must be a list"),
        ],
    )
    def test_malformed(self, tmp_path: Path, text: str, problem: str) -> None:
        (tmp_path / "ranking.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=problem):
            read_ranking(tmp_path / "ranking.yaml")

    def test_absent_or_no_yaml(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is not there; it lists the configurations"):
            read_ranking(tmp_path / "ranking.yaml")
        (tmp_path / "ranking.yaml").write_text("- [", encoding="utf-8")
        with pytest.raises(DataError, match="is not YAML"):
            read_ranking(tmp_path / "ranking.yaml")
