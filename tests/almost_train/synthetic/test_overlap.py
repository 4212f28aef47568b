"""ROUGE-L: by hand, and the compiled filter against the textbook one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from overlap_plain import Exhaustive, prompts

from almost_eval.errors import InputError
from almost_train.synthetic.overlap import Overlap, OverlapIndex, tokens


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of two token sequences, by the textbook recursion: the plain path, against which `OverlapIndex` is tested."""
    row = [0] * (len(other) + 1)
    for token in one:
        diagonal = 0
        for j, against in enumerate(other, 1):
            diagonal, row[j] = row[j], diagonal + 1 if token == against else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(one) + len(other)) if one and other else 0.0


def test_tokens_are_words_and_marks() -> None:
    assert tokens("Don't café_2 STOP... 東京!") == ["don", "'", "t", "cafe", "_", "2", "stop", *"...", "東", "京", "!"]


def test_by_hand() -> None:
    # LCS of "how do i bake bread" (5) and "how do i eat more bread" (6): how do i bread = 4; F1 = 8 / 11.
    assert rouge_l("how do i bake bread".split(), "how do i eat more bread".split()) == 8 / 11
    assert rouge_l([], ["a"]) == 0.0


def test_equals_rouge_score() -> None:
    """Google's package, which lm-eval brings: same LCS, on the same tokens."""
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer")

    class Ours:
        def tokenize(self, text: str) -> list[str]:
            return tokens(text)

    scorer = scorer_module.RougeScorer(["rougeL"], tokenizer=Ours())
    one, other = "What is the best way to learn chess?", "What would be a good way to teach chess, in your view?"
    assert scorer.score(one, other)["rougeL"].fmeasure == pytest.approx(rouge_l(tokens(one), tokens(other)), abs=1e-12)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_the_index_equals_the_plain_path(threshold: float) -> None:
    rng = random.Random(0)
    index, kept = OverlapIndex(threshold), list[str]()
    for _ in range(400):
        text = " ".join(rng.choice("abcdefghijkl") for _ in range(rng.randint(0, 12)))
        best = max((rouge_l(tokens(text), tokens(other)) for other in kept), default=0.0)
        found = index.nearest(text)
        assert (found is not None) == (best >= threshold), text
        if found is not None:
            assert found.score == best == rouge_l(tokens(text), tokens(kept[found.number]))
        else:
            kept.append(text)
            index.add(text)


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.8])
def test_every_decision_is_that_of_the_exhaustive_comparison(threshold: float) -> None:
    assert_same_decisions(1_000, threshold)


@pytest.mark.slow
def test_every_decision_on_ten_thousand_prompts_is_that_of_the_exhaustive_comparison() -> None:
    assert_same_decisions(10_000, 0.5)


def assert_same_decisions(count: int, threshold: float) -> None:
    """Until `count` prompts are judged; the nearest prompt and its score are part of the decision."""
    index, plain = OverlapIndex(threshold), Exhaustive(threshold)
    repeated = 0
    for text in prompts(count):
        nearest = index.nearest(text)
        assert nearest == plain.nearest(text), text
        if nearest is None:
            index.add(text)
            plain.add(text)
        repeated += nearest is not None
    assert count / 50 < repeated < count  # both decisions were put to the test


def test_at_the_threshold_is_a_repetition() -> None:
    index = OverlapIndex(0.5)
    index.add("a b c d")
    assert index.nearest("a b x y") == Overlap(0, 0.5)  # 2 * 2 / 8
    assert index.nearest("a b x y z") is None  # 2 * 2 / 9


def test_more_tokens_than_the_basic_plane_holds() -> None:
    """Codes pass through the surrogates (U+D800) and on: each is still one token."""
    index = OverlapIndex(1.0)
    texts = [" ".join(f"w{i}" for i in range(at, at + 1000)) for at in range(0, 70_000, 1000)]
    for text in texts:
        index.add(text)
    assert index.nearest(texts[60]) == Overlap(60, 1.0)
    assert index.nearest(texts[60].replace("w60500 ", "")) is None


def test_threshold_out_of_bounds() -> None:
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        OverlapIndex(0.0)
