"""Thoughts in what a model writes: stored beside the answer, and never scored in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.openai import own_reasoning
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.run.interview import text_outputs
from almost_eval.run.runner import Run
from almost_eval.run.store import read_samples
from almost_eval.run.validity import parse_allowed
from almost_eval.run.verify import verify_run
from almost_eval.tasks.base import GenerationRequest, Prompting, ReasoningRule, Task
from almost_eval.types import Completion, Metric, Outputs, Sample, SampleRecord, Score


class Scripted(ScriptedEngine):
    """The public test double, with what a spec asks of a model."""

    checkpoint = SimpleNamespace(name="scripted", architecture="", weight_digest=lambda: "0")

    def settings(self) -> dict[str, Any]:
        return {"name": "scripted", "dtype": "float32", "device": "cpu"}


class Echo(Task):
    """Right where the model writes `Four.`"""

    name = "echo"
    requires = "generation"
    protocol = "text"

    def __init__(self, prompts: Sequence[str], reasoning: ReasoningRule = "strip") -> None:
        self.prompts = prompts
        self.reasoning = reasoning
        self.data = DataSource("hub", None)
        self.prompting = Prompting()

    def samples(self) -> list[Sample]:
        return [Sample(str(i), (), (), 0, cluster=str(i)) for i in range(len(self.prompts))]

    def generation(self, sample: Sample, shots: int) -> GenerationRequest:
        return GenerationRequest(self.prompts[int(sample.id)], SamplingParams())

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        value = float(outputs["completions"][0] == "Four.")
        return Score(value, None, {"accuracy": value})

    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        scored = [r.score.value for r in records if r.score.value is not None]
        mean = sum(scored) / len(scored) if scored else None
        return {"accuracy": Metric(mean, None, None, len(scored), len(records) - len(scored))}

    def settings(self) -> dict[str, Any]:
        return {}

    def data_fingerprint(self) -> str:
        return "0" * 64


TEXTS = {
    "plain": "Four.",
    "thought": "<think>2 + 2</think>\n\nFour.",
    "cut": "<think>2 + 2",
    "opened\n<think>\n": "2 + 2</think>Four.",
    "opened and cut\n<think>\n": "2 + 2, so four",
}


def run(tmp_path: Path, reasoning: ReasoningRule) -> tuple[dict[str, SampleRecord], dict[str, Any], Task]:
    task = Echo(list(TEXTS), reasoning)
    engine = Scripted(lambda *_: 0.0, complete=lambda prompt: TEXTS[prompt])
    results, _ = Run(task, engine).execute(tmp_path)
    return {list(TEXTS)[int(r.sample.id)].split("\n")[0]: r for r in read_samples(tmp_path)}, results, task


def test_strip(tmp_path: Path) -> None:
    records, results, task = run(tmp_path, "strip")
    assert {name: r.score.value for name, r in records.items()} == {
        "plain": 1.0,
        "thought": 1.0,
        "cut": None,
        "opened": 1.0,
        "opened and cut": None,
    }
    assert records["cut"].score.reason == records["opened and cut"].score.reason == "thought_cut"
    assert records["plain"].outputs == {"completions": ["Four."], "finish_reasons": ["stop"]}
    assert records["thought"].outputs["completions"] == ["Four."]
    assert records["thought"].outputs["reasoning"] == ["2 + 2"]
    assert results["validity"]["checks"]["thought_cut"] == {"count": 2, "allowed": 0.01}
    assert "2 of 5 samples hold a thought that was cut" in results["validity"]["reason"]
    assert verify_run(tmp_path, task.data, task).problems == []


def test_keep(tmp_path: Path) -> None:
    records, results, task = run(tmp_path, "keep")
    assert [r.score.value for r in records.values()] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert records["thought"].outputs["completions"] == [TEXTS["thought"]]
    assert "thought_cut" not in results["validity"]["checks"]
    assert verify_run(tmp_path, task.data, task).problems == []


def test_refuse(tmp_path: Path) -> None:
    records, results, task = run(tmp_path, "refuse")
    assert {r.score.reason for name, r in records.items() if name != "plain"} == {"thought"}
    assert records["plain"].score.value == 1.0
    assert results["validity"]["checks"]["thought"]["count"] == 4
    assert verify_run(tmp_path, task.data, task).problems == []


def test_thought_in_a_field_of_its_own(tmp_path: Path) -> None:
    own = Completion("Four.", (), "stop", reasoning="2 + 2")
    spent = Completion("", (), "length", reasoning="2 + 2 is")
    task = Echo(["q"])
    assert text_outputs(task, "q", [own])["reasoning"] == ["2 + 2"]
    outputs = text_outputs(task, "q", [own, spent])
    assert outputs["completions"] == ["Four.", ""]
    assert outputs["thought_cut"] == [False, True]
    kept = text_outputs(Echo(["q"], "keep"), "q", [own])
    assert (kept["completions"], kept["reasoning"]) == (["Four."], ["2 + 2"])
    assert json.dumps(outputs)


def test_share_that_is_allowed() -> None:
    assert parse_allowed(["thought_cut=0.5"])["thought_cut"] == 0.5


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_endpoints_field(field: str) -> None:
    assert own_reasoning(SimpleNamespace(text="Four.", **{field: "2 + 2"})) == "2 + 2"
    assert own_reasoning(SimpleNamespace(text="Four.", **{field: None})) == ""
