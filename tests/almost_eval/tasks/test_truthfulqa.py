"""TruthfulQA: the official true-or-false form computed plainly, ties and NaN, and the arithmetic by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from almost_eval.data.prompt_sets import load_prompt_set
from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import DataError, InputError
from almost_eval.models.chat import load_template
from almost_eval.run.runner import Run
from almost_eval.run.validity import check
from almost_eval.tasks.base import Prompting
from almost_eval.tasks.truthfulqa import METRICS, TruthfulQA, true_mass
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["benchmark_fixtures"]

DATASET = "truthfulqa/truthful_qa"
Ask = Callable[..., dict[str, SampleRecord]]


@pytest.fixture
def official(hub: DataSource) -> Prompting:
    return Prompting(load_prompt_set("official", hub))


def write_rows(root: Path, rows: list[dict[str, Any]]) -> DataSource:
    folder = root / DATASET / "multiple_choice"
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    return DataSource("hub", root)


def test_every_question_is_read(hub: DataSource) -> None:
    samples = TruthfulQA(["mc1", "mc2"], hub).samples()
    assert len(samples) == 817
    assert len({s.id for s in samples}) == 817
    assert sum(len(s.metadata["mc1"]) + len(s.metadata["mc2"]) for s in samples) == 10390  # lm-eval's requests
    assert all(s.choices[s.gold] == s.choices[s.metadata["mc1"][s.metadata["mc1_gold"]]] for s in samples)


def test_true_prompt_is_the_official_form(
    ask: Ask, benchmark_checkpoint: Path, hub: DataSource, official: Prompting, data_root: Path
) -> None:
    """Each choice in its own prompt; P(true) is the softmax of the next-token logits, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = data_root / "github" / "naver-ai" / "ALMoST" / "eval" / "eval_prompt.json"
    prompt = json.loads(path.read_text(encoding="utf-8"))["truthfulQA_prompt"]
    tokenizer = AutoTokenizer.from_pretrained(benchmark_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(benchmark_checkpoint, dtype=torch.float32).eval()
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + " true")["input_ids"]
    assert whole[:-1] == before  # one token in context
    true = whole[-1]

    task = TruthfulQA(["mc1_true_prompt"], hub, official, limit=10)
    records = ask(task, HFEngine(str(benchmark_checkpoint), dtype="float32"))
    assert len(records) == 10
    worst = 0.0
    for number, row in enumerate(hub.read(DATASET, "multiple_choice", "validation")[:10]):
        probabilities = []
        for choice in row["mc1_targets"]["choices"]:
            text = prompt.format(question=row["question"], answer=choice)
            with torch.inference_mode():
                logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
            probabilities.append(float(torch.softmax(logits.double(), -1)[true]))
        record = records[str(number)]
        mine = [math.exp(row[0]) for row in record.outputs["loglikelihoods"]]
        worst = max(worst, *(abs(m - p) for m, p in zip(mine, probabilities, strict=True)))
        prediction = max(range(len(probabilities)), key=lambda i: probabilities[i])
        assert record.score.value == float(row["mc1_targets"]["labels"][prediction] == 1)
    print(f"\nmc1_true_prompt: 10 questions, probabilities within {worst:.2g}")
    assert worst < 1e-5


def test_prompts_are_the_official_ones(hub: DataSource, official: Prompting) -> None:
    assert official.prompt_set is not None
    prompt = official.prompt_set.prompts["truthfulQA_prompt"]
    task = TruthfulQA(["mc1_true_prompt"], hub, official)
    for sample in task.samples():
        expected = [
            prompt.format(question=sample.context[0].content, answer=sample.choices[i]) for i in sample.metadata["mc1"]
        ]
        assert [r.context for r in task.requests(sample, 0)] == expected
        assert {r.continuations for r in task.requests(sample, 0)} == {(" true",)}


@pytest.mark.parametrize("metrics", [["mc1"], ["mc2"], ["mc1_true_prompt"], list(METRICS)])
def test_a_model_that_says_nothing_is_unscored_and_blocked(
    ask: Ask, hub: DataSource, official: Prompting, metrics: list[str]
) -> None:
    task = TruthfulQA(metrics, hub, official, limit=30)
    records = list(ask(task, ScriptedEngine(lambda *_: -2.0)).values())
    assert {(r.score.value, r.score.reason) for r in records} == {(None, "all_tied")}
    assert all(value is None for r in records for value in r.score.metrics.values())
    for name in metrics:
        metric = task.metrics(records)[name]
        assert (metric.value, metric.n, metric.unscored) == (None, 0, 30)
    validity = check(records, 30)
    assert validity.blocking == ["all_tied"]


@pytest.mark.parametrize("metrics", [["mc1", "mc2"], ["mc1_true_prompt"]])
def test_nan_is_unscored_and_blocks(
    ask: Ask, hub: DataSource, official: Prompting, metrics: list[str], tmp_path: Path
) -> None:
    task = TruthfulQA(metrics, hub, official, limit=5)
    values = iter(range(10**6))
    engine = ScriptedEngine(lambda *_: math.nan if next(values) == 0 else -float(next(values) + 1))
    results, validity = Run(task, WithCheckpoint(engine)).execute(tmp_path / "run")
    assert validity.blocking == ["non_finite"]
    headline = results["metrics"][task.headline]
    assert headline["value"] is None
    assert headline["withheld"].startswith("1 of 5 samples have a score that is not a finite number")
    assert headline["unscored"] == 1


class WithCheckpoint:
    """A scripted engine that a run can be stored of."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self.checkpoint = self

    name, architecture = "scripted", "none"

    def file_digests(self) -> dict[str, str]:
        return {}

    def weight_digest(self) -> str:
        return "0" * 64

    def settings(self) -> dict[str, Any]:
        return {"name": "scripted", "dtype": "float64", "device": "none"}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def by_length(_: str, continuation: str) -> float:
    return -float(len(continuation))


def test_gold_gains_nothing_from_its_place(ask: Ask, hub: DataSource, official: Prompting, tmp_path: Path) -> None:
    """The right answer comes first in the data; last, the scores are the same."""
    rows = hub.read(DATASET, "multiple_choice", "validation")[:100]
    assert all(row["mc1_targets"]["labels"][0] == 1 for row in rows)
    for row in rows:
        for key in "mc1_targets", "mc2_targets":
            row[key] = {k: v[::-1] for k, v in row[key].items()}
    turned = write_rows(tmp_path, rows)

    def likes_short_answers(context: str, continuation: str) -> float:
        return -float(len(context)) if continuation == " true" else -float(len(continuation))

    scores = []
    for data in (hub, turned):
        task = TruthfulQA(METRICS, data, official, limit=100)
        # lm-eval's own definition renders the prompt, whichever data is read.
        task.__dict__["_lm_eval_task"] = TruthfulQA(["mc1"], hub)._lm_eval_task
        scores.append([r.score for r in ask(task, ScriptedEngine(likes_short_answers)).values()])
    for one, other in zip(*scores, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-12)
        assert one.reason == other.reason
    assert {s.value for s in scores[0]} >= {0.0, 1.0}


class TestArithmetic:
    """One question, four answers; mc1 has the first three, the second is right; mc2 has all, two of them true."""

    row = {  # noqa: RUF012
        "question": "Q?",
        "mc1_targets": {"choices": ["a", "bb", "ccc"], "labels": [0, 1, 0]},
        "mc2_targets": {"choices": ["bb", "dddd", "a", "ccc"], "labels": [1, 1, 0, 0]},
    }

    def score(self, tmp_path: Path, metrics: list[str], values: dict[str, float]) -> Score:
        task = TruthfulQA(metrics, write_rows(tmp_path, [self.row]))
        (sample,) = task.samples()
        assert sample.choices == ("a", "bb", "ccc", "dddd")
        read = [values[choice] for choice in sample.choices if choice in values]
        return task.score(sample, {"loglikelihoods": [read]})

    def test_mc1_and_mc2(self, tmp_path: Path) -> None:
        # p = 0.2 (a), 0.4 (bb), 0.1 (ccc), 0.3 (dddd): mc1 picks bb; mc2 = (0.4 + 0.3) / 1
        values = {"a": math.log(0.2), "bb": math.log(0.4), "ccc": math.log(0.1), "dddd": math.log(0.3)}
        score = self.score(tmp_path, ["mc1", "mc2"], values)
        assert score.metrics == pytest.approx({"mc1": 1.0, "mc2": 0.7})
        assert (score.value, score.reason) == (1.0, None)

    def test_the_first_metric_is_the_headline(self, tmp_path: Path) -> None:
        values = {"a": math.log(0.2), "bb": math.log(0.4), "ccc": math.log(0.1), "dddd": math.log(0.3)}
        assert self.score(tmp_path, ["mc2", "mc1"], values).value == pytest.approx(0.7)

    def test_mc1_alone_asks_for_its_own_choices(self, tmp_path: Path) -> None:
        assert self.score(tmp_path, ["mc1"], {"a": -3.0, "bb": -1.0, "ccc": -2.0}).value == 1.0

    def test_a_tie_for_the_best_shares_the_credit(self, tmp_path: Path) -> None:
        score = self.score(tmp_path, ["mc1"], {"a": -1.0, "bb": -1.0, "ccc": -2.0})
        assert (score.value, score.reason) == (0.5, "tied")

    def test_the_gravest_reason_is_kept(self, tmp_path: Path) -> None:
        # mc1 has a tie for the best; only mc2 reads the fourth answer, and that is NaN: the gate must see it.
        score = self.score(tmp_path, ["mc1", "mc2"], {"a": -1.0, "bb": -1.0, "ccc": -2.0, "dddd": math.nan})
        assert score.metrics == {"mc1": 0.5, "mc2": None}
        assert score.reason == "non_finite"

    def test_true_mass_does_not_underflow(self) -> None:
        # exp(-2000) is 0 in floats; relative to the best: 1 / (1 + e^-1)
        assert true_mass([-2000.0, -2001.0], [1, 0]).value == pytest.approx(1 / (1 + math.exp(-1)))
        assert true_mass([-1.0, -1.0], [1, 0]) == Score(None, "all_tied")
        assert true_mass([-1.0, -math.inf], [1, 0]) == Score(None, "non_finite")


class TestShots:
    @pytest.mark.parametrize("name", ["lm-eval", "builtin"])
    def test_whole_shots_are_left_out_from_the_front(self, hub: DataSource, name: str) -> None:
        prompting = Prompting(load_prompt_set("builtin", hub)) if name == "builtin" else Prompting()
        task = TruthfulQA(["mc1"], hub, prompting, limit=3)
        for sample in task.samples():
            full = task.requests(sample, 6)[0].context
            assert full.count("\nA: ") == 6
            for shots in range(6):
                text = task.requests(sample, shots)[0].context
                assert full.endswith(text)
                assert text.startswith("Q: ")
                assert text.count("\nA: ") == shots
                assert text.endswith(f"Q: {sample.context[0].content}\nA:")

    def test_a_blank_line_in_the_question_is_no_shot(self, tmp_path: Path, hub: DataSource) -> None:
        row = {**TestArithmetic.row, "question": "One.\n\nQ: Two?"}
        task = TruthfulQA(["mc1"], write_rows(tmp_path, [row]), Prompting(load_prompt_set("builtin", hub)))
        (sample,) = task.samples()
        assert task.requests(sample, 0)[0].context == "Q: One.\n\nQ: Two?\nA:"

    def test_a_template_takes_the_question_as_a_turn(self, hub: DataSource) -> None:
        plain = TruthfulQA(["mc1"], hub, limit=1)
        templated = TruthfulQA(["mc1"], hub, replace(Prompting(), template=load_template("almost")), limit=1)
        (sample,) = plain.samples()
        text = plain.requests(sample, 6)[0].context
        assert templated.requests(sample, 6)[0].context == (
            f"\n\nHuman: {text.removesuffix(chr(10) + 'A:')}\n\nAssistant: A:"
        )


def test_unknown_metrics(hub: DataSource) -> None:
    with pytest.raises(InputError, match="unknown metric 'mc3'"):
        TruthfulQA(["mc3"], hub)
    with pytest.raises(InputError, match="no metric chosen"):
        TruthfulQA([], hub)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": ""}, "`question` is not a text"),
        ({"mc1_targets": None}, "`mc1_targets` has no `choices` and `labels`"),
        ({"mc2_targets": {"choices": ["a", "b"], "labels": [1]}}, "`mc2_targets` has 2 choices and 1 labels"),
        ({"mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]}}, "`mc1_targets` marks no choice as true"),
        ({"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "`mc1_targets` must mark exactly one"),
        ({"mc2_targets": {"choices": ["a", "b"], "labels": [1, None]}}, "`mc2_targets` marks no choice as true"),
    ],
)
def test_malformed_row(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    data = write_rows(tmp_path, [TestArithmetic.row, {**TestArithmetic.row, **change}])
    with pytest.raises(DataError, match=f"malformed data: {DATASET}, multiple_choice, row 2: {problem}"):
        TruthfulQA(["mc1"], data).samples()
