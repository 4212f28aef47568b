"""Recompute a finished run: every score and metric from its own lines, and a sample of them from the model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from almost_eval.data.sources import DataSource
from almost_eval.errors import InputError, problem_of
from almost_eval.run.interview import score_texts
from almost_eval.run.runner import Run, summarise
from almost_eval.run.store import read_results, read_samples, read_spec
from almost_eval.run.validity import check
from almost_eval.tasks.base import Task
from almost_eval.tasks.registry import build_task
from almost_eval.types import SampleRecord, Score

TOLERANCE = {"float32": 1e-4}
"""Largest difference of a rescored log-likelihood, nats per token (or of a reward, in its own unit), by dtype."""
HALF_TOLERANCE = 0.25
"""The same in half precision, where neighbours of a logit of 20 are 0.125 apart and batches round differently."""


@dataclass(slots=True)
class Verification:
    """What was recomputed and what did not come out the same."""

    folder: str
    samples: int
    metrics: int = 0
    """Metrics, baselines, details and checks that were recomputed."""
    rescored: int = 0
    largest_difference: float = 0.0
    """Over the rescored samples, nats per token."""
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything came out the same."""
        return not self.problems


def verify_run(folder: Path, data: DataSource, task: Task | None = None) -> Verification:
    """Recompute every score from its stored outputs and every metric from the scores.

    Args:
        folder: a finished run.
        data: where its data comes from.
        task: what the run was of; None is one of this package's, made from the run's spec.

    Raises:
        StoreError: not a finished run.
        InputError: the spec's task is none of the registry's. A judged run has `judge.verify`.
    """
    spec, results = read_spec(folder), read_results(folder)
    task = task or build_task(spec["task"], spec["protocol"], spec["settings"], data)
    records = list(read_samples(folder))
    verification = Verification(str(folder), len(records))
    for at, record in enumerate(records):
        try:
            again = Score(None, "context_too_long")
            if record.outputs:
                again = score_texts(task, record.sample, record.outputs)
        except (LookupError, TypeError, ValueError) as error:
            verification.problems.append(
                f"sample {record.sample.id}: its outputs cannot be scored ({problem_of(error)})"
            )
            records[at] = replace(record, outputs={})
            continue
        verification.problems += score_differences(record, again)
    allowed = {name: entry["allowed"] for name, entry in results["validity"]["checks"].items()}
    validity = check(records, spec["n_samples"], allowed)
    again_results = summarise(task, records, validity, spec, results["engine"])
    verification.metrics = sum(len(results.get(part, ())) for part in ("metrics", "baselines", "details"))
    verification.metrics += len(allowed)
    for part, value in again_results.items():
        verification.problems += differences(part, results.get(part), value)
    return verification


def score_differences(record: SampleRecord, again: Score) -> list[str]:
    """Where the stored score of a sample is not the recomputed one, in words."""
    stored = record.score
    problems = differences("score", stored.value, again.value)
    problems += differences("reason", stored.reason, again.reason)
    problems += differences("metrics", dict(stored.metrics), dict(again.metrics))
    return [f"sample {record.sample.id}: {problem}" for problem in problems]


def rescore(folder: Path, run: Run, verification: Verification, *, n: int, seed: int) -> None:
    """Ask the model again about `n` samples drawn with `seed`, and compare with what is stored."""
    spec = read_spec(folder)
    run.adopt_date(spec)
    mine = run.spec()
    was, now = (
        {
            "weight_digest": of["weight_digest"],
            "prompt_ids_digest": of["prompt_ids_digest"],
            "template digest": (of["template"] or {}).get("digest"),
            "data fingerprint": of["data"]["fingerprint"],
        }
        for of in (spec, mine)
    )
    # An endpoint need not tell which weights it serves: what is not known differs from nothing.
    unknown = {"weight_digest"} if None in (was["weight_digest"], now["weight_digest"]) else set()
    verification.problems += [
        f"{key} is not the run's: {str(now[key])[:16]}, was {str(was[key])[:16]}"
        for key in was
        if was[key] != now[key] and key not in unknown
    ]
    files, files_now = spec.get("model_files"), mine["model_files"]
    if files is not None and files_now is not None:  # runs of earlier versions do not say, an endpoint need not
        changed = [name for name in sorted({*files, *files_now}) if files.get(name) != files_now.get(name)]
        verification.problems += [f"{name} of the model is not the run's" for name in changed]
    stored = {record.sample.id: record for record in read_samples(folder) if record.outputs}
    if stored.keys() - {sample.id for sample in run.samples}:
        raise InputError(f"{folder} holds samples that the data does not; give the --data-root it was made with")
    order = [i for i, sample in enumerate(run.samples) if sample.id in stored]
    chosen = sorted(random.Random(seed).sample(order, min(n, len(order))))
    tolerance = TOLERANCE.get(spec["engine"].get("dtype"), HALF_TOLERANCE)
    for index, outputs, _ in run.answers(chosen):
        record = stored[run.samples[index].id]
        difference = _output_difference(record.outputs, outputs)
        verification.rescored += 1
        verification.largest_difference = max(verification.largest_difference, difference)
        if not difference <= tolerance:
            verification.problems.append(f"sample {record.sample.id}: off by {difference:.3g} when scored again")


def differences(part: str, stored: Any, again: Any, at: str = "") -> list[str]:
    """Where two JSON values differ; floats may differ by rounding, as sums run in another order."""
    name = f"{part}{at}"
    if isinstance(stored, dict) and isinstance(again, dict):
        keys = sorted(stored.keys() | again.keys())
        return [d for key in keys for d in differences(part, stored.get(key), again.get(key), f"{at}.{key}")]
    if isinstance(stored, list) and isinstance(again, list) and len(stored) == len(again):
        return [d for s, a in zip(stored, again, strict=True) for d in differences(part, s, a, at)]
    if isinstance(stored, float) and isinstance(again, float) and math.isclose(stored, again, abs_tol=1e-12):
        return []
    return [] if stored == again else [f"{name}: {stored}, recomputed {again}"]


def _output_difference(stored: dict[str, Any], again: dict[str, Any]) -> float:
    """Largest difference between two outputs: nats per token, reward, or infinity for other text or other failures."""
    if stored.keys() != again.keys() or "completions" in stored:
        return 0.0 if stored == again else math.inf
    if "rewards" in stored:
        return _largest_gap(stored["rewards"], again["rewards"], [1] * len(stored["rewards"]))
    gaps = [
        _largest_gap(*row)
        for row in zip(stored["loglikelihoods"], again["loglikelihoods"], stored["n_tokens"], strict=False)
    ]
    same_shape = len(stored["loglikelihoods"]) == len(again["loglikelihoods"])
    return max(gaps, default=0.0) if same_shape else math.inf


def _largest_gap(stored: Sequence[float | None], again: Sequence[float | None], tokens: Sequence[int]) -> float:
    if len(stored) != len(again):
        return math.inf
    return max((_gap(a, b) / n for a, b, n in zip(stored, again, tokens, strict=True)), default=0.0)


def _gap(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b)
