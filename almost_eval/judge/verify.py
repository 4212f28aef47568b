"""Recompute a finished run of judged pairs from its own lines and answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from almost_eval.judge.results import StoredRun
from almost_eval.run.verify import Verification, differences, score_differences


def verify_judged(folder: Path) -> Verification:
    """Read every review again, take lengths and digests from the answers again, and recompute every metric.

    Raises:
        StoreError: not a finished run of judged pairs.
        DataError: its questions or answers are damaged.
    """
    run = StoredRun(folder)
    verification = Verification(str(folder), len(run.records))
    for record in run.records:
        again = run.again(record)
        verification.problems += score_differences(record, again.score)
        verification.problems += [
            f"sample {record.sample.id}: {problem}"
            for problem in differences("outputs", record.outputs, again.outputs)
            + differences("sample", asdict(record.sample), asdict(again.sample))
        ]
    whole = run.summarise(run.records)
    verification.metrics = sum(len(whole[part]) for part in ("metrics", "judging", "details"))
    verification.metrics += len(whole["provenance"])
    for part, value in whole.items():
        verification.problems += differences(part, run.results.get(part), json.loads(json.dumps(value)))
    return verification
