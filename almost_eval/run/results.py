"""`results.json` of a run: what its lines, its spec and its engine's report add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from almost_eval.run.store import RunStore, origin
from almost_eval.run.validity import ALLOWED, Validity, check
from almost_eval.tasks.base import Task
from almost_eval.tasks.facts import PROMPT_SETTINGS
from almost_eval.types import JSONMapping, JSONObject, SampleRecord


def whole_report(
    engine: JSONMapping, records: Sequence[SampleRecord], spec: JSONMapping, commit: str | None
) -> JSONObject:
    """What the engine reported, with what the records of the whole run add to its warnings.

    Args:
        engine: its report.
        records: of all samples.
        spec: of the run, as it began.
        commit: of the source tree that ended it.
    """
    warnings = list(engine["warnings"])
    texts = [record for record in records if record.outputs.get("finish_reasons")]
    if cut := sum("length" in record.outputs["finish_reasons"] for record in texts):
        warnings.append(f"{cut} of {len(texts)} answers were cut at the limit of new tokens")
    if commit != spec["commit"]:
        warnings.append(f"begun on commit {spec['commit']}, ended on {commit}")
    return {**engine, "warnings": warnings}


def finish(
    store: RunStore,
    task: Task,
    ids: Sequence[str],
    engine: JSONMapping,
    timing: JSONMapping,
    allowed: Mapping[str, float] | None,
) -> tuple[JSONObject, Validity]:
    """Put the lines in the order of `ids`, all samples of the run, and write `results.json`.

    Returns:
        Its content, and the gate's verdict.

    Raises:
        RunError: the disk is full, or gone.
    """
    records = store.in_order(ids)
    validity = check(records, len(ids), allowed or ALLOWED)
    results = summarise(task, records, validity, store.spec, engine) | {"timing": dict(timing)}
    store.finish(results)
    return results, validity


def summarise(
    task: Task,
    records: Sequence[SampleRecord],
    validity: Validity,
    spec: JSONMapping,
    engine: JSONMapping,
) -> JSONObject:
    """`results.json` without its times: a pure function of the records and the spec."""
    metrics = {name: metric.to_dict() for name, metric in task.metrics(records).items()}
    if not validity.passed:
        metrics[task.headline] |= {"value": None, "stderr": None, "ci95": None, "withheld": validity.reason}
    template = spec["template"] or {}
    chosen = {name: spec["settings"][name] for name in PROMPT_SETTINGS if name in spec["settings"]}
    return {
        "task": spec["task"],
        "protocol": spec["protocol"],
        "model": spec["model_name"],
        "headline": task.headline,
        "metrics": metrics,
        "baselines": {name: metric.to_dict() for name, metric in task.baselines(records).items()},
        "details": task.details(records),
        "validity": validity.to_dict(),
        "engine": engine,
        "provenance": {
            "weight_digest": spec["weight_digest"],
            "data_source": spec["data"]["source"],
            "data_fingerprint": spec["data"]["fingerprint"],
            "template": template.get("name"),
            "template_digest": template.get("digest"),
            "template_text": template.get("text"),
            "prompt_set": spec["prompt_set"],
            **({"prompt_settings": chosen} if chosen else {}),
            "prompt_ids_digest": spec["prompt_ids_digest"],
            **origin(spec, records),
        },
    }
