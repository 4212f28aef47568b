"""The same numbers as lm-eval 0.4.13 (`hf`, float32) on the same checkpoint and the same data, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.tasks.harness import Harness
from almost_eval.tasks.mmlu import MMLU
from almost_eval.tasks.truthfulqa import TruthfulQA
from almost_eval.types import SampleRecord

pytest_plugins = ["benchmark_fixtures"]

NATS_PER_TOKEN = 1e-4
SUBJECTS = ("anatomy", "college_physics", "high_school_us_history")

Ask = Callable[..., dict[str, SampleRecord]]
LmEval = Callable[..., tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]


def largest_difference(theirs: dict[str, Any], mine: Sequence[float], n_tokens: Sequence[int]) -> float:
    """Nats per token between lm-eval's log-likelihoods of one document and ours; the same argmax is asserted."""
    values = [response[0] for response in theirs["filtered_resps"]]
    assert len(values) == len(mine) == len(n_tokens)
    assert int(np.argmax(values)) == int(np.argmax(mine)), f"another prediction on document {theirs['doc_id']}"
    return max(abs(a - b) / n for a, b, n in zip(values, mine, n_tokens, strict=True))


def check_truthfulqa(ask: Ask, lm_eval: LmEval, hub: DataSource, checkpoint: Path, limit: int | None) -> None:
    samples, results = lm_eval(checkpoint, ["truthfulqa_mc1", "truthfulqa_mc2"], limit=limit)
    task = TruthfulQA(["mc1", "mc2"], hub, limit=limit)
    records = ask(task, HFEngine(str(checkpoint), dtype="float32"))
    assert len(samples["truthfulqa_mc1"]) == len(samples["truthfulqa_mc2"]) == len(records) == (limit or 817)
    worst, worst_mc2 = 0.0, 0.0
    for name in ("mc1", "mc2"):
        for theirs in samples[f"truthfulqa_{name}"]:
            record = records[str(theirs["doc_id"])]
            assert record.sample.context[0].content == theirs["doc"]["question"]
            (values,), (tokens,) = record.outputs["loglikelihoods"], record.outputs["n_tokens"]
            used = record.sample.metadata[name]
            worst = max(worst, largest_difference(theirs, [values[i] for i in used], [tokens[i] for i in used]))
            if name == "mc1":
                assert record.score.metrics["mc1"] == theirs["acc"]
            elif np.isfinite(theirs["acc"]):  # long answers underflow in lm-eval to 0 / 0
                worst_mc2 = max(worst_mc2, abs(record.score.metrics["mc2"] - theirs["acc"]))
    print(f"\nTruthfulQA: {len(records)} samples, {worst:.2g} nats per token, mc2 {worst_mc2:.2g}")
    assert worst < NATS_PER_TOKEN
    assert worst_mc2 < 1e-4
    metrics = task.metrics(list(records.values()))
    assert metrics["mc1"].value == pytest.approx(results["truthfulqa_mc1"]["acc,none"], abs=1e-12)
    assert metrics["mc2"].value == pytest.approx(results["truthfulqa_mc2"]["acc,none"], abs=1e-4)


def check_mmlu(ask: Ask, lm_eval: LmEval, hub: DataSource, checkpoint: Path, limit: int | None) -> None:
    samples, results = lm_eval(checkpoint, [f"mmlu_{subject}" for subject in SUBJECTS], shots=5, limit=limit)
    task = MMLU(SUBJECTS, 5, hub, limit=limit)
    records = ask(task, HFEngine(str(checkpoint), dtype="float32"))
    assert sum(map(len, samples.values())) == len(records) == (3 * limit if limit else 441)
    worst = 0.0
    for subject in SUBJECTS:
        for theirs in samples[f"mmlu_{subject}"]:
            record = records[f"{subject}/{theirs['doc_id']}"]
            (values,), (tokens,) = record.outputs["loglikelihoods"], record.outputs["n_tokens"]
            worst = max(worst, largest_difference(theirs, values, tokens))
            assert record.score.value == theirs["acc"]
    print(f"\nMMLU: {len(records)} samples, {worst:.2g} nats per token")
    assert worst < NATS_PER_TOKEN
    metrics = task.metrics(list(records.values()))
    for subject in SUBJECTS:
        theirs_all = results[f"mmlu_{subject}"]["acc,none"]
        assert metrics[f"accuracy/{subject}"].value == pytest.approx(theirs_all, abs=1e-12)


def test_truthfulqa_sample(ask: Ask, lm_eval_samples: LmEval, hub: DataSource, benchmark_checkpoint: Path) -> None:
    check_truthfulqa(ask, lm_eval_samples, hub, benchmark_checkpoint, 12)


def test_mmlu_sample(ask: Ask, lm_eval_samples: LmEval, hub: DataSource, benchmark_checkpoint: Path) -> None:
    check_mmlu(ask, lm_eval_samples, hub, benchmark_checkpoint, 12)


def test_sentencepiece_sample(
    ask: Ask, lm_eval_samples: LmEval, hub: DataSource, sentencepiece_checkpoint: Path
) -> None:
    """A Llama tokenizer: the space of " answer" is a mark inside the token, and joint encoding matters."""
    check_truthfulqa(ask, lm_eval_samples, hub, sentencepiece_checkpoint, 6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_truthfulqa_whole(ask: Ask, lm_eval_samples: LmEval, hub: DataSource, benchmark_checkpoint: Path) -> None:
    check_truthfulqa(ask, lm_eval_samples, hub, benchmark_checkpoint, None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mmlu_whole(ask: Ask, lm_eval_samples: LmEval, hub: DataSource, benchmark_checkpoint: Path) -> None:
    check_mmlu(ask, lm_eval_samples, hub, benchmark_checkpoint, None)


@pytest.mark.parametrize("name", ["truthfulqa_mc1", "mmlu_anatomy"])
def test_harness_is_the_same_as_our_own_task(ask: Ask, hub: DataSource, benchmark_checkpoint: Path, name: str) -> None:
    shots = 5 if name.startswith("mmlu") else None
    harness = Harness([name], hub, shots=shots, limit=10)
    own = MMLU(["anatomy"], 5, hub, limit=10) if shots else TruthfulQA(["mc1"], hub, limit=10)
    engine = HFEngine(str(benchmark_checkpoint), dtype="float32")
    theirs, ours = ask(harness, engine), ask(own, engine)
    assert harness.headline == f"{name}/acc"
    for record, other in zip(theirs.values(), ours.values(), strict=True):
        # The same requests in the same trie: the same bits.
        assert record.outputs == other.outputs
        assert record.score.value == other.score.value
    metric = harness.metrics(list(theirs.values()))[f"{name}/acc"]
    assert metric == own.metrics(list(ours.values()))[own.headline]
