"""The test double keeps the contract of the real engines."""

from __future__ import annotations

import doctest
import math

import pytest

from almost_eval.engines import scripted
from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, SamplingParams
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import InputError, TemplateError
from almost_eval.types import LoglikelihoodRequest

REQUEST = LoglikelihoodRequest("a b c", (" x", " y z", " w"))


def _engine(**values: float) -> ScriptedEngine:
    return ScriptedEngine(lambda _, continuation: values[continuation.split()[0]])


def test_its_example_is_true() -> None:
    assert doctest.testmod(scripted).failed == 0


def test_it_meets_both_protocols() -> None:
    engine = _engine()
    assert isinstance(engine, LoglikelihoodEngine)
    assert isinstance(engine, GenerationEngine)


def test_scores_go_through_and_the_largest_is_greedy() -> None:
    [scores] = _engine(x=-2.0, y=-1.0, w=-3.0).loglikelihood([REQUEST])
    assert [(s.logprob, s.is_greedy, s.n_tokens) for s in scores] == [(-2, False, 1), (-1, True, 2), (-3, False, 1)]


@pytest.mark.parametrize(
    ("values", "greedy"),
    [
        ((-1, -1, -2), (False, False, False)),
        ((math.nan, -1, -2), (False, False, False)),
        ((-math.inf, -1, -2), (0, 1, 0)),
    ],
)
def test_ties_and_non_numbers_are_never_greedy(values: tuple[float, ...], greedy: tuple[bool, ...]) -> None:
    [scores] = _engine(x=values[0], y=values[1], w=values[2]).loglikelihood([REQUEST])
    assert [s.is_greedy for s in scores] == list(greedy)
    assert [s.logprob for s in scores] == pytest.approx(values, nan_ok=True)


def test_ids_are_stable_and_streams_give_what_is_wanted() -> None:
    engine = _engine(x=-2.0, y=-1.0, w=-3.0)
    encoded = engine.encode([REQUEST, REQUEST])
    assert encoded[0].continuations[0].prefix.tolist() == [1756872259, 1908338681, 112844655]
    assert [index for index, _ in engine.stream(encoded, {1})] == [1]
    assert engine.report.tokens_in_trie == engine.report.tokens_computed == 4  # a b c y
    assert engine.report.tokens_plain == 2 * (3 + 4 + 3)


def test_what_does_not_fit_is_refused() -> None:
    engine = ScriptedEngine(lambda *_: 0.0, complete=lambda _: "one two", context_length=3)
    with pytest.raises(InputError, match="4 words"):
        engine.loglikelihood([REQUEST])
    with pytest.raises(InputError, match="5 words"):
        engine.generate(["a b c"], SamplingParams(max_new_tokens=2))
    with pytest.raises(InputError, match="complete"):
        ScriptedEngine(lambda *_: 0.0).generate(["a"], SamplingParams())
    with pytest.raises(TemplateError):
        engine.encode([LoglikelihoodRequest("a", (" ",))])


def test_completions_are_cut_like_real_ones() -> None:
    engine = ScriptedEngine(lambda *_: 0.0, complete=lambda prompt: f" {prompt} says hi STOP not this")
    [[whole, again]] = engine.generate(["x"], SamplingParams(n=2, stop=("STOP",)))
    assert whole == again
    assert (whole.text, whole.finish_reason) == (" x says hi ", "stop")
    [[short]] = engine.generate(["x"], SamplingParams(max_new_tokens=2))
    assert (short.text, short.finish_reason, len(short.token_ids)) == (" x says", "length", 2)
