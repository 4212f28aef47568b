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
from almost_eval.models.chat import ChatTemplate, special_tokens
from almost_eval.tasks import harness
from almost_eval.tasks.base import Prompting
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


ACCEPTED: dict[str, dict[str, Any]] = {
    "neutral": {"num_beams": 1, "repetition_penalty": 1.0, "top_k": None, "no_repeat_ngram_size": 0, "use_cache": True},
    "greedy": {"do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "early_stopping": True},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0},
}


@pytest.mark.parametrize("kwargs", ACCEPTED)
def test_what_changes_no_text_is_accepted(serve: Callable[..., Harness], kwargs: str) -> None:
    settings = {**SHAPES["generation"], "generation_kwargs": {"until": ["e"], **ACCEPTED[kwargs]}}
    task = serve(make_task("t", **settings))
    params = task.generation(task.samples()[0], 0).params
    assert (params.temperature, params.top_p) == ((0.8, 0.9) if kwargs == "sampled" else (0.0, 1.0))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_beams": 4}, "num_beams: 4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: 1.2"),
        ({"do_sample": True, "temperature": 0.8, "top_k": 20}, "top_k: 20"),
        ({"do_sample": True}, "do_sample: True in its generation_kwargs, which samples without a temperature above 0"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size: 3"),
        ({"num_beams": 2, "length_penalty": 2.0}, "num_beams: 2"),
        ({"max_length": 50}, "max_length: 50"),
    ],
)
def test_what_would_change_it_is_refused_by_name(
    serve: Callable[..., Harness], kwargs: dict[str, Any], words: str
) -> None:
    settings = {**SHAPES["generation"], "generation_kwargs": {"until": ["e"], **kwargs}}
    task = serve(make_task("t", **settings))
    with pytest.raises(InputError, match=f"^t states {words}.*; run this task with lm-eval") as refused:
        task.samples()  # no model is looked for
    assert "\n" not in str(refused.value)


def test_an_answer_ends_at_the_templates_end_of_turn(
    ask: Ask, serve: Callable[..., Harness], benchmark_checkpoint: Path
) -> None:
    """Of a template that was chosen, and after the task's own stop strings and EOS; lm-eval writes on."""
    task = serve(make_task("t", **{**SHAPES["generation"], "generation_kwargs": {"until": ["?"], "max_gen_toks": 40}}))
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}e\n{% endfor %}"
    engine = HFEngine(str(benchmark_checkpoint), dtype="float32")
    tokens = special_tokens(engine.tokenizer)
    plain = ask(task, engine)
    assert any("e" in record.outputs["completions"][0] for record in plain.values())
    task.prompting = Prompting(None, ChatTemplate("test", turns, ("e",)), tokens)
    assert task.generation(task.samples()[0], 0).params.stop == ("?", tokens["eos_token"], "e")
    assert all("e" not in record.outputs["completions"][0] for record in ask(task, engine).values())
    task.prompting = Prompting(None, ChatTemplate("test", turns, ("e",)), tokens, is_chosen=False)
    assert task.generation(task.samples()[0], 0).params.stop == ("?", tokens["eos_token"])
