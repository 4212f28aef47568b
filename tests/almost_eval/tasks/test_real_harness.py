"""Tasks of lm-eval on a real chat model: prompts, log-likelihoods, answers and group scores are those of lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.tasks.base import resolve_prompting
from almost_eval.tasks.harness import Harness, load_lm_eval_tasks

pytest_plugins = ["benchmark_fixtures"]
pytestmark = pytest.mark.real

LmEval = Callable[..., tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]
NATS_PER_TOKEN = 1e-4


def run_here(ask: Callable[..., Any], task: Harness, model: Any, template: str) -> dict[str, Any]:
    engine = HFEngine(str(model), dtype="float32", device="cpu")
    task.prompting = resolve_prompting(task.data, "official", template, engine.tokenizer, own_prompts=True)
    task.check_prompting()
    records: dict[str, Any] = ask(task, engine)
    return records


@pytest.mark.parametrize(
    ("template", "flags"),
    [
        ("auto", {}),
        ("tokenizer", {}),
        ("tokenizer", {"fewshot_as_multiturn": False}),
        ("tokenizer", {"system_instruction": "Answer with a letter."}),
    ],
)
def test_chat_is_lm_evals(
    ask: Callable[..., Any],
    lm_eval_samples: LmEval,
    hub: DataSource,
    real_models: Any,
    template: str,
    flags: dict[str, Any],
) -> None:
    model, name = real_models.smollm2, "mmlu_anatomy"
    theirs, results = lm_eval_samples(model, [name], 2, 4, apply_chat_template=template != "auto", **flags)
    task = Harness([name], hub, shots=2, limit=4, **flags)
    records = run_here(ask, task, model, template)
    for sample in theirs[name]:
        id = f"{name}/{sample['doc_id']}"
        prompts = {s.id: task._arguments(s, 2) for s in task.samples()}
        assert prompts[id] == [tuple(arguments) for arguments in sample["arguments"]]
        mine = [value for row in records[id].outputs["loglikelihoods"] for value in row]
        values = [response[0] for response in sample["filtered_resps"]]
        assert max(abs(a - b) for a, b in zip(mine, values, strict=True)) < NATS_PER_TOKEN
    assert task.metrics(list(records.values()))[f"{name}/acc"].value == results[name]["acc,none"]


@pytest.mark.parametrize("template", ["auto", "tokenizer"])
def test_answers_are_lm_evals(
    ask: Callable[..., Any], lm_eval_samples: LmEval, hub: DataSource, real_models: Any, template: str
) -> None:
    model, name = real_models.smollm2, "mmlu_anatomy_generative"
    theirs, results = lm_eval_samples(
        model, list(load_lm_eval_tasks([name], hub).values()), 0, 4, apply_chat_template=template != "auto"
    )
    task = Harness([name], hub, shots=0, limit=4)
    records = run_here(ask, task, model, template)
    answers = {sample["doc_id"]: sample["resps"][0][0] for sample in theirs[name]}
    assert answers == {n: records[f"{name}/{n}"].outputs["completions"][0] for n in range(4)}
    assert any(answers.values())
    mine = task.metrics(list(records.values()))[f"{name}/exact_match"].value
    assert mine == results[name]["exact_match,get_response"]


def test_a_group_is_lm_evals(
    ask: Callable[..., Any], lm_eval_samples: LmEval, hub: DataSource, real_models: Any
) -> None:
    _, theirs = lm_eval_samples(real_models.smollm2, ["mmlu_stem"], 0, 1)
    task = Harness(["mmlu_stem"], hub, shots=0, limit=1)
    records = run_here(ask, task, real_models.smollm2, "auto")
    assert task.headline == "mmlu_stem/acc"
    assert task.metrics(list(records.values()))[task.headline].value == theirs["mmlu_stem"]["acc,none"]
