"""Any lm-eval task on our engine: the same numbers as lm-eval's own `hf` model, from tasks made here in memory."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import DataError, InputError
from almost_eval.tasks import harness
from almost_eval.tasks.harness import Harness
from almost_eval.types import SampleRecord

pytest_plugins = ["benchmark_fixtures"]

Ask = Callable[..., dict[str, SampleRecord]]
LmEval = Callable[..., tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]
NOWHERE = DataSource("hub", None)

WORDS = ["cat", "dog", "mat", "door", "true", "answer", "question", "France", "bone", "heart", "nerve", "war", "tax"]


def documents(n: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with 3 choices of unequal lengths."""
    draw = random.Random(seed)
    return [
        {
            "question": f"{number}: {' '.join(draw.choices(WORDS, k=6))}?",
            "choices": [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) + f" {c}" for c in "xyz"],
            "label": draw.randrange(3),
        }
        for number in range(n)
    ]


def make_task(name: str, **settings: Any) -> Any:
    """A task of lm-eval from an inline configuration and rows in memory."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows, train = datasets.Dataset.from_list(documents()), datasets.Dataset.from_list(documents(9, seed=1))
    config = {
        "task": name,
        "custom_dataset": lambda **_: datasets.DatasetDict({"test": rows, "train": train}),
        "dataset_kwargs": {},
        "metadata": {"version": 1.0},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 0,
    }
    return ConfigurableTask(config={**config, **settings})


SHAPES: dict[str, dict[str, Any]] = {
    "acc_norm": {},
    "random-shots": {"fewshot_split": "train", "num_fewshot": 3},
    "shots-from-the-test-split": {"fewshot_split": "test", "num_fewshot": 2},
    "multiple-inputs": {
        "doc_to_text": "label",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "acc"}],
    },
    "mutual-information": {"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]},
    "other-aggregations": {
        "metric_list": [{"metric": "acc"}, {"metric": "mcc"}, {"metric": "brier_score"}, {"metric": "acc_bytes"}]
    },
    "one-continuation": {
        "output_type": "loglikelihood",
        "doc_to_target": "{{' ' + choices[label]}}",
        "doc_to_choice": None,
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["?", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "two-filters": {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{choices[label][0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {
                "name": "strict",
                "filter": [{"function": "regex", "regex_pattern": "^ ?([cd])"}, {"function": "take_first"}],
            },
            {"name": "any", "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}]},
        ],
    },
}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Harness]:
    """`serve(task, **options)`: a Harness over tasks that lm-eval does not ship."""

    def make(*tasks: Any, **options: Any) -> Harness:
        by_name = {task.config.task: task for task in tasks}
        monkeypatch.setattr(harness, "load_lm_eval_tasks", lambda names, data: {n: by_name[n] for n in names})
        return Harness(list(by_name), NOWHERE, **options)

    return make


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_lm_eval(
    ask: Ask, serve: Callable[..., Harness], lm_eval_samples: LmEval, benchmark_checkpoint: Path, shape: str
) -> None:
    settings = SHAPES[shape]
    samples, results = lm_eval_samples(benchmark_checkpoint, [make_task(shape, **settings)])
    theirs, theirs_all = samples[shape], results[shape]
    task = serve(make_task(shape, **settings))
    records = ask(task, HFEngine(str(benchmark_checkpoint), dtype="float32"))
    assert len(records) == 16
    if settings.get("output_type") == "generate_until":
        texts = {s["doc_id"]: s["resps"][0][0] for s in theirs}
        assert texts == {n: records[f"{shape}/{n}"].outputs["completions"][0] for n in range(16)}
    else:
        for sample in theirs:
            outputs = records[f"{shape}/{sample['doc_id']}"].outputs
            mine = [value for row in outputs["loglikelihoods"] for value in row]
            tokens = [n for row in outputs["n_tokens"] for n in row]
            values = [response[0] for response in sample["filtered_resps"]]
            assert len(mine) == len(values)
            assert max(abs(a - b) / n for a, b, n in zip(mine, values, tokens, strict=True)) < 1e-4
            flat_greedy = [greedy for row in outputs["is_greedy"] for greedy in row]
            assert flat_greedy == [response[1] for response in sample["filtered_resps"]]
    metrics = task.metrics(list(records.values()))
    several = len({sample["filter"] for sample in theirs}) > 1
    compared = 0
    for name, value in theirs_all.items():
        metric, _, pipeline = name.partition(",")
        if pipeline and "stderr" not in metric:
            key = f"{shape}/{name}" if several else f"{shape}/{metric}"
            assert metrics[key].value == pytest.approx(value, rel=1e-4, abs=1e-6), name
            assert metrics[key].n == 16
            compared += 1
    assert compared == len(metrics) == len(settings.get("metric_list", [1, 2])) * (1 + several)
    assert task.headline in metrics


def test_truthfulqa_gen(ask: Ask, lm_eval_samples: LmEval, hub: DataSource, benchmark_checkpoint: Path) -> None:
    """A task that generates and has its own metrics, from the data root."""
    short = {"max_gen_toks": 12}
    samples, _ = lm_eval_samples(benchmark_checkpoint, ["truthfulqa_gen"], limit=1, gen_kwargs=short)
    task = Harness(["truthfulqa_gen"], hub, limit=1)
    task.tasks["truthfulqa_gen"].set_config("generation_kwargs", short, update=True)
    records = ask(task, HFEngine(str(benchmark_checkpoint), dtype="float32"))
    assert len(samples["truthfulqa_gen"]) == len(records) == 1
    for sample in samples["truthfulqa_gen"]:
        record = records[f"truthfulqa_gen/{sample['doc_id']}"]
        assert record.outputs["completions"] == sample["resps"][0]
        assert record.score.metrics["truthfulqa_gen/bleu_max"] == pytest.approx(sample["bleu_max"])
        assert record.score.value == pytest.approx(sample["bleu_max"])
    assert task.headline == "truthfulqa_gen/bleu_max"


class TestFewShotExamples:
    """lm-eval draws one document's examples after another's from one generator."""

    def prompts(self, task: Harness, order: list[int]) -> dict[int, str]:
        samples = task.samples()
        return {i: task.requests(samples[i], task.max_shots)[0].context for i in order}

    def test_the_order_of_asking_changes_nothing(self, serve: Callable[..., Harness]) -> None:
        settings = SHAPES["random-shots"]
        whole = self.prompts(serve(make_task("t", **settings)), list(range(16)))
        assert len({text.split("Question: ")[1] for text in whole.values()}) > 3  # they are drawn
        assert self.prompts(serve(make_task("t", **settings)), list(range(16))[::-1]) == whole
        resumed = self.prompts(serve(make_task("t", **settings)), [9, 3])
        assert resumed == {i: whole[i] for i in (9, 3)}

    def test_fewer_shots_are_the_same_each_time(self, serve: Callable[..., Harness]) -> None:
        task = serve(make_task("t", **SHAPES["random-shots"]))
        samples = task.samples()
        first = [task.requests(samples[i], 1)[0].context for i in (0, 5)]
        assert [task.requests(samples[i], 1)[0].context for i in (5, 0)] == first[::-1]
        assert first[0].count("Question: ") == 2

    def test_a_task_that_sets_no_shots_takes_none(self, serve: Callable[..., Harness]) -> None:
        # As in lm-eval: `num_fewshot: 0` in a task's own configuration is not overridden.
        fixed = serve(make_task("t", fewshot_split="train"), shots=2)
        fixed.samples()
        assert fixed.max_shots == 0
        free = serve(make_task("t", fewshot_split="train", num_fewshot=None), shots=2)
        assert free.requests(free.samples()[0], free.max_shots)[0].context.count("Question: ") == 3

    def test_generation_that_resumes_reads_the_same_prompt(self, serve: Callable[..., Harness]) -> None:
        settings = {**SHAPES["generation"], "fewshot_split": "train", "num_fewshot": 2}
        one, other = serve(make_task("t", **settings)), serve(make_task("t", **settings))
        samples = one.samples()
        texts = [one.generation(sample, 2).prompt for sample in samples]
        assert other.generation(samples[7], 2).prompt == texts[7]


def test_documents_that_shuffle_as_they_load(serve: Callable[..., Harness]) -> None:
    """Some tasks shuffle choices with Python's own generator: two loads agree, and the generator is left alone."""

    def shuffle(rows: Any) -> Any:
        return rows.map(lambda row: {"choices": random.sample(row["choices"], 3)})

    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state(legacy=False)
    made = [serve(make_task("t", process_docs=shuffle)) for _ in range(2)]
    random.seed(5)
    first, second = ([task._doc(s)["choices"] for s in task.samples()] for task in made)
    assert first == second
    assert before[0] == random.getstate()
    after = np.random.get_state(legacy=False)
    np.testing.assert_equal(after, before[1])


class TestUnscored:
    @pytest.mark.parametrize("value", [math.nan, -math.inf])
    def test_not_finite(self, ask: Ask, serve: Callable[..., Harness], value: float) -> None:
        task = serve(make_task("t"))
        engine = ScriptedEngine(lambda _, text: value if text.endswith("x") else -float(len(text)))
        records = list(ask(task, engine).values())
        assert {(r.score.value, r.score.reason) for r in records} == {(None, "non_finite")}
        metric = task.metrics(records)["t/acc"]
        assert (metric.value, metric.n, metric.unscored) == (None, 0, 16)

    def test_all_equal(self, ask: Ask, serve: Callable[..., Harness]) -> None:
        task = serve(make_task("t", **SHAPES["other-aggregations"]))
        records = list(ask(task, ScriptedEngine(lambda *_: -1.0)).values())
        assert {(r.score.value, r.score.reason) for r in records} == {(None, "all_tied")}
        metrics = task.metrics(records)
        assert {(m.value, m.n, m.unscored) for m in metrics.values()} == {(None, 0, 16)}

    def test_a_metric_that_is_not_finite(self, ask: Ask, serve: Callable[..., Harness]) -> None:
        # lm-eval's truthfulqa_mc2 gives 0 / 0 where every answer underflows.
        task = serve(make_task("t", process_results=lambda doc, results: {"acc": math.nan}, metric_list=[ACC]))
        records = list(ask(task, ScriptedEngine(lambda _, text: -float(len(text)))).values())
        assert {(r.score.value, r.score.reason) for r in records} == {(None, "non_finite")}
        assert task.metrics(records)["t/acc"].unscored == 16


def test_rolling_equals_lm_eval(ask: Ask, serve: Callable[..., Harness], benchmark_checkpoint: Path) -> None:
    """Texts shorter than, as long as, and several times as long as the context: the same sums, the same perplexity."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    settings: dict[str, Any] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{ (question + ' ') * (label * 9 + 1) }}",
        "doc_to_choice": None,
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    task = make_task("t", **settings)
    records = ask(serve(task), HFEngine(str(benchmark_checkpoint), dtype="float32", max_length=32))
    peer = HFLM(pretrained=str(benchmark_checkpoint), dtype="float32", batch_size=4, device="cpu", max_length=32)
    docs = [dict(doc) for doc in task.eval_docs]
    texts = [Instance("loglikelihood_rolling", doc, (task.doc_to_target(doc),), 0) for doc in docs]
    theirs = peer.loglikelihood_rolling(texts, disable_tqdm=True)
    windows = set()
    for number, total in enumerate(theirs):
        outputs = records[f"t/{number}"].outputs
        windows.add(len(outputs["loglikelihoods"][0]))
        assert sum(outputs["loglikelihoods"][0]) == pytest.approx(total, abs=1e-4 * sum(outputs["n_tokens"][0]))
    assert max(windows) > 2
    words = sum(len(re.split(r"\s+", text.args[0])) for text in texts)
    metrics = serve(task).metrics(list(records.values()))
    assert metrics["t/word_perplexity"].value == pytest.approx(math.exp(-sum(theirs) / words), rel=1e-4)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_log_likelihood_of_an_empty_text_is_lm_evals(
    adds_bos: bool, ask: Ask, serve: Callable[..., Harness], benchmark_checkpoint: Path, tmp_path: Path
) -> None:
    """0 where the text has no token; log p(BOS | BOS) where the tokenizer puts one before every text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    checkpoint = shutil.copytree(benchmark_checkpoint, tmp_path / "checkpoint")
    if not adds_bos:
        file = checkpoint / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    assert bool(AutoTokenizer.from_pretrained(checkpoint)("")["input_ids"]) == adds_bos
    settings: dict[str, Any] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{ question if label else '' }}",
        "doc_to_choice": None,
        "metric_list": [{"metric": "byte_perplexity"}],
        "process_results": lambda doc, results: {"byte_perplexity": (results[0], max(1, len(doc["question"])))},
    }
    task = make_task("t", **settings)
    records = ask(serve(task), HFEngine(str(checkpoint), dtype="float32"))
    peer = HFLM(pretrained=str(checkpoint), dtype="float32", batch_size=1, device="cpu")
    texts = [task.doc_to_target(dict(doc)) for doc in task.eval_docs]
    assert "" in texts
    instances = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    for number, theirs in enumerate(peer.loglikelihood_rolling(instances, disable_tqdm=True)):
        ours = records[f"t/{number}"].outputs["loglikelihoods"][0]
        assert sum(ours) == pytest.approx(theirs, abs=1e-4 * max(1, len(texts[number])))
        assert texts[number] or adds_bos or ours == []


ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


class TestRefusals:
    def test_generation_and_choices_together(self, serve: Callable[..., Harness]) -> None:
        with pytest.raises(InputError, match="need a run each"):
            serve(make_task("a"), make_task("b", **SHAPES["generation"])).samples()

    def test_code_that_a_model_wrote(self, serve: Callable[..., Harness]) -> None:
        with pytest.raises(InputError, match="t runs code that the model wrote"):
            serve(make_task("t", **SHAPES["generation"], unsafe_code=True)).samples()

    def test_unknown_name(self, hub: DataSource) -> None:
        with pytest.raises(InputError, match=r"lm-eval has no task 'truthfulqa_mc3'; did you mean 'truthfulqa_mc[12]'"):
            Harness(["truthfulqa_mc3"], hub).samples()

    def test_no_name(self) -> None:
        with pytest.raises(InputError, match="no task named"):
            Harness([], NOWHERE)

    def test_data_that_is_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        unreachable(monkeypatch)
        with pytest.raises(DataError, match=r"data set cais/mmlu \(anatomy\) not found: .*--data-root"):
            Harness(["mmlu_anatomy"], DataSource("hub", tmp_path)).samples()


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with no network: the hub's address is read once, so a closed door is put before the loader."""
    import datasets

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def test_groups_are_expanded(hub: DataSource) -> None:
    task = Harness(["mmlu_stem"], hub, shots=1, limit=1)
    samples = task.samples()
    assert len(samples) == len(task.tasks) == 19
    assert "mmlu_anatomy/0" in {sample.id for sample in samples}
    assert task.settings()["tasks"] == ["mmlu_stem"]


def test_settings_rebuild_the_task(hub: DataSource) -> None:
    from almost_eval.tasks.registry import build_task

    task = Harness(["mmlu_anatomy"], hub, shots=2, limit=3)
    task.samples()
    again = build_task("harness", task.protocol, task.settings(), hub)
    assert isinstance(again, Harness)
    assert [again.requests(s, 2) for s in again.samples()] == [task.requests(s, 2) for s in task.samples()]
    assert again.data_fingerprint() == task.data_fingerprint()
