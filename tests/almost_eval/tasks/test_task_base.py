"""Scores from values alone, and which prompts a task gets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource, find_data
from almost_eval.errors import DataError, InputError, TemplateError
from almost_eval.tasks.base import choice_score, loglikelihood_outputs, resolve_prompting, reward_outputs
from almost_eval.tasks.registry import build_task
from almost_eval.types import ContinuationScore, Score

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "gold", "expected"),
    [
        ([-1.0, -2.0, -3.0], 0, Score(1.0)),
        ([-1.0, -2.0, -3.0], 1, Score(0.0)),
        ([-2.0, -3.0, -1.0], 2, Score(1.0)),
        ([-1.0, -1.0, -3.0], 0, Score(0.5, "tied")),  # two share the first place
        ([-1.0, -1.0, -3.0], 1, Score(0.5, "tied")),
        ([-1.0, -1.0, -3.0], 2, Score(0.0)),
        ([-1.0, -1.0, -1.0, -2.0], 2, Score(1 / 3, "tied")),
        ([-1.0, -1.0], 0, Score(None, "all_tied")),
        ([-1.0, -1.0, -1.0], 2, Score(None, "all_tied")),
        ([NAN, -1.0], 0, Score(None, "non_finite")),
        ([-1.0, NAN], 0, Score(None, "non_finite")),
        ([-1.0, None], 0, Score(None, "non_finite")),
        ([-1.0, -INF], 0, Score(None, "non_finite")),
        ([NAN, NAN], 0, Score(None, "non_finite")),
    ],
)
def test_choice_score(values: list[float | None], gold: int, expected: Score) -> None:
    assert choice_score(values, gold) == expected


def test_all_tied_may_have_a_worth() -> None:
    assert choice_score([3.0, 3.0], 1, all_tied=0.5) == Score(0.5, "all_tied")


def test_outputs_hold_json_only() -> None:
    scores = [[ContinuationScore(-1.5, True, 2), ContinuationScore(NAN, False, 1), ContinuationScore(-INF, False, 1)]]
    assert loglikelihood_outputs(scores) == {
        "loglikelihoods": [[-1.5, None, None]],
        "is_greedy": [[True, False, False]],
        "n_tokens": [[2, 1, 1]],
    }
    assert reward_outputs([0.25, INF]) == {"rewards": [0.25, None]}


class TestResolvePrompting:
    @pytest.fixture
    def nano(self) -> DataSource:
        return find_data("nano", None)

    @pytest.fixture
    def real(self, data_root: Path) -> DataSource:
        return DataSource("hub", data_root)

    def test_official_prompts_go_as_they_are(self, real: DataSource, bpe_tokenizer: Any) -> None:
        prompting = resolve_prompting(real, None, "auto", bpe_tokenizer, own_prompts=False)
        assert prompting.prompt_set is not None
        assert (prompting.prompt_set.name, prompting.template) == ("official", None)

    def test_lm_evals_prompts_go_as_they_are(self, bpe_tokenizer: Any) -> None:
        hub = DataSource("hub", None)  # and need no download
        prompting = resolve_prompting(hub, None, "auto", bpe_tokenizer, own_prompts=True)
        assert prompting.prompt_set is not None
        assert (prompting.prompt_set.name, prompting.template) == ("lm-eval", None)
        assert prompting.prompt_set.prompts == {"version": "0.4.13"}

    def test_nano_has_our_own_in_the_tokenizers_template(self, nano: DataSource, bpe_tokenizer: Any) -> None:
        prompting = resolve_prompting(nano, None, "auto", bpe_tokenizer, own_prompts=False)
        assert prompting.prompt_set is not None
        assert prompting.template is not None
        assert (prompting.prompt_set.name, prompting.template.name) == ("builtin", "almost")
        assert prompting.special_tokens["bos_token"] == "<s>"

    @pytest.mark.parametrize("own", [False, True])
    def test_a_template_that_is_asked_for_is_used(self, real: DataSource, bpe_tokenizer: Any, own: bool) -> None:
        prompting = resolve_prompting(real, None, "alpaca", bpe_tokenizer, own_prompts=own)
        assert prompting.template is not None
        assert prompting.template.name == "alpaca"

    def test_none_is_none(self, nano: DataSource, bpe_tokenizer: Any) -> None:
        assert resolve_prompting(nano, None, "none", bpe_tokenizer, own_prompts=False).template is None

    def test_unknown_names(self, nano: DataSource, bpe_tokenizer: Any) -> None:
        with pytest.raises(DataError, match=r"unknown prompt set 'oficial'; did you mean 'official'\?"):
            resolve_prompting(nano, "oficial", "auto", bpe_tokenizer, own_prompts=False)
        with pytest.raises(TemplateError, match="did you mean 'alpaca'"):
            resolve_prompting(nano, None, "alpacca", bpe_tokenizer, own_prompts=False)


class TestBuildTask:
    """A spec's settings give the task back."""

    @pytest.mark.parametrize(
        ("name", "protocol", "settings"),
        [
            ("hhh", "likelihood", {"normalise": True, "limit": 3}),
            ("truthfulqa", "mc2+mc1", {"metrics": ["mc2", "mc1"], "limit": None}),
            ("mmlu", "2-shot", {"subjects": ["anatomy"], "shots": 2, "limit": 4}),
        ],
    )
    def test_round_trip(self, name: str, protocol: str, settings: dict[str, Any]) -> None:
        task = build_task(name, protocol, settings, DataSource("hub", None))
        assert (task.name, task.protocol, task.settings()) == (name, protocol, settings)

    def test_unknown(self) -> None:
        with pytest.raises(InputError, match="unknown task 'truthful'; did you mean 'truthfulqa'"):
            build_task("truthful", "", {}, DataSource("hub", None))
