"""Texts that a model writes for lm-eval's tasks: answer by answer what lm-eval's own `hf` model writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_harness import SHAPES, make_task

from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import InputError
from almost_eval.tasks import harness
from almost_eval.tasks.harness import Harness
from almost_eval.types import SampleRecord

pytest_plugins = ["benchmark_fixtures"]

Ask = Callable[..., dict[str, SampleRecord]]
LmEval = Callable[..., tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]

KWARGS: dict[str, dict[str, Any]] = {
    "no-stop": {"until": [], "max_gen_toks": 12},
    "default-length": {"until": ["e"]},
    "common-letters": {"until": ["a", "e", "\n"], "max_gen_toks": 24},
    "overlapping": {"until": ["er", "e", "the"], "max_gen_toks": 24},
    "overlapping-other-order": {"until": ["the", "e", "er"], "max_gen_toks": 24},
    "leading-blank": {"until": ["\n\n"], "max_gen_toks": 5},
    "one-string": {"until": " ", "max_gen_toks": 9},
}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Harness]:
    def make(task: Any) -> Harness:
        monkeypatch.setattr(harness, "load_lm_eval_tasks", lambda names, data: {task.config.task: task})
        return Harness([task.config.task], DataSource("hub", None))

    return make


@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize("tokenizer", ["benchmark_checkpoint", "sentencepiece_checkpoint"])
def test_answers_are_lm_evals(
    ask: Ask,
    serve: Callable[..., Harness],
    lm_eval_samples: LmEval,
    request: pytest.FixtureRequest,
    kwargs: str,
    tokenizer: str,
) -> None:
    checkpoint: Path = request.getfixturevalue(tokenizer)
    settings = {**SHAPES["generation"], "generation_kwargs": KWARGS[kwargs]}
    samples, _ = lm_eval_samples(checkpoint, [make_task("t", **settings)])
    task = serve(make_task("t", **settings))
    engine = HFEngine(str(checkpoint), dtype="float32")
    records = ask(task, engine)
    mine = {n: records[f"t/{n}"].outputs["completions"][0] for n in range(16)}
    assert mine == {s["doc_id"]: s["resps"][0][0] for s in samples["t"]}


def test_reasoning_is_a_setting_of_tasks_that_generate(serve: Callable[..., Harness]) -> None:
    task = serve(make_task("t", **SHAPES["generation"]))
    task.samples()
    assert (task.reasoning, task.settings()["reasoning"]) == ("strip", "strip")
    with pytest.raises(InputError, match=r"--reasoning stip: did you mean 'strip'\? known: keep, refuse, strip"):
        Harness(["t"], DataSource("hub", None), reasoning="stip")
    serve(make_task("t"))
    choices = Harness(["t"], DataSource("hub", None), reasoning="keep")
    with pytest.raises(InputError, match="these tasks score choices, and write nothing"):
        choices.samples()
    assert "reasoning" not in serve(make_task("t")).settings()
