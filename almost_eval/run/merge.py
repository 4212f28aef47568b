"""Join the shards of a run to the whole run: its lines in their order, its results, no model and no data."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from pathlib import Path

from almost_eval.data.sources import find_data
from almost_eval.errors import RunError, StoreError
from almost_eval.files import write_whole
from almost_eval.run.prompts import PROMPTS
from almost_eval.run.runner import finish, whole_report
from almost_eval.run.shards import MARK, Mark, check_marks, whole_folder
from almost_eval.run.store import RunStore, read_samples, read_spec, spec_change
from almost_eval.run.validity import Validity
from almost_eval.tasks.registry import build_task
from almost_eval.types import JSONObject, SampleRecord

TOKENS = ("path", "tokens_plain", "tokens_in_trie", "tokens_computed")
"""What the engine's reports of all shards must agree in: each is of the plan of the whole run."""


def merge_runs(marks: Sequence[Mark], output: Path | None, data_root: str | None = None) -> tuple[JSONObject, Validity]:
    """Write the whole run of these shards into `output`, and give back its results and the gate's verdict.

    Every file is the one that an unsharded run would have written, but for the times in `results.json`.

    Args:
        marks: all shards of one run, as `find_marks` gave them.
        output: the run's folder; None is the one that all shards are in.
        data_root: see `find_data`.

    Raises:
        StoreError: shards that are missing, of another run, not finished or damaged; an output that holds another run.
        RunError: the disk is full, or gone.
    """
    check_marks(marks, _change)
    output = whole_folder(marks, output)
    records = _records(marks)
    spec = read_spec(marks[0].folder)
    task = build_task(spec["task"], spec["protocol"], spec["settings"], find_data(spec["data"]["source"], data_root))
    report, timing, commit = _joined(marks)
    prompts = _prompts_of(marks)
    with RunStore(output, spec) as store:
        _copy_prompts(prompts, output)
        store.adopt(records)
        engine = whole_report(report, records, store.spec, commit)
        return finish(store, task, [record.sample.id for record in records], engine, timing, marks[0].whole["allowed"])


def _change(one: Mark, other: Mark) -> str | None:
    """What makes two shards those of two runs; see `spec_change`.

    A template may write the time at which a shard began. Where all that comes of it is the same (the day, most likely),
    so are the prompts, and the run is one.
    """
    was, now = read_spec(one.folder), read_spec(other.folder)
    files = [mark.folder / PROMPTS for mark in (one, other)]
    dates = [(spec.get("template") or {}).get("now") for spec in (was, now)]
    if None not in dates and all(file.is_file() for file in files) and filecmp.cmp(files[0], files[1], shallow=False):
        now["template"] = now["template"] | {"now": dates[0]}
    return spec_change(was, now)


def _records(marks: Sequence[Mark]) -> list[SampleRecord]:
    """The records of all shards, in the order of the run's samples."""
    by_place: dict[int, SampleRecord] = {}
    for mark in marks:
        records = {record.sample.id: record for record in read_samples(mark.folder)}
        if lacking := [id for id in mark.ids if id not in records]:
            raise StoreError(
                f"{mark.folder} lacks {len(lacking)} of its samples, first {lacking[0]!r}; run its command again in a "
                "new folder"
            )
        if foreign := [id for id in records if id not in set(mark.ids)]:
            raise StoreError(f"{mark.folder} holds a line for sample {foreign[0]!r}, which is another shard's")
        by_place |= {place: records[id] for place, id in zip(mark.places, mark.ids, strict=True)}
    return [by_place[place] for place in sorted(by_place)]


def _joined(marks: Sequence[Mark]) -> tuple[JSONObject, JSONObject, str | None]:
    """The engine's report of the whole run, its times, and the commit that ended it."""
    finished = [_reported(mark) for mark in marks]
    reports = [one["engine"] for one in finished]
    for mark, report in zip(marks, reports, strict=True):
        if differ := next((key for key in TOKENS if report.get(key) != reports[0].get(key)), None):
            raise StoreError(
                f"{mark.folder} had another plan than {marks[0].folder}: {differ} was {reports[0].get(differ)}, is "
                f"{report.get(differ)}; run the shards on machines with the same versions"
            )
    warnings = list(dict.fromkeys(warning for report in reports for warning in report["warnings"]))
    times = [one["timing"] for one in finished]
    starts = [time["seconds_to_first_sample"] for time in times if time["seconds_to_first_sample"] is not None]
    timing = {
        "seconds": max(time["seconds"] for time in times),
        "seconds_to_first_sample": min(starts, default=None),
        "samples_computed_now": sum(time["samples_computed_now"] for time in times),
    }
    begun = read_spec(marks[0].folder)["commit"]
    commit = next((one["commit"] for one in finished if one["commit"] != begun), begun)
    return {**reports[0], "warnings": warnings}, timing, commit


def _reported(mark: Mark) -> JSONObject:
    """What a finished shard says of its engine and its times; raises StoreError where it says something else."""
    finished = mark.finished or {}
    engine, timing = finished.get("engine"), finished.get("timing")
    if (
        not isinstance(engine, dict)
        or not isinstance(timing, dict)
        or "warnings" not in engine
        or not {"seconds", "seconds_to_first_sample", "samples_computed_now"} <= timing.keys()
        or "commit" not in finished
    ):
        raise StoreError(f"{mark.folder / MARK} is damaged: its finished is no report; put back a whole copy")
    return finished


def _prompts_of(marks: Sequence[Mark]) -> Path | None:
    """The prompts of the run, which each shard has whole; None where no shard has them.

    Raises:
        StoreError: those of two shards differ, though their specs do not.
    """
    files = [mark.folder / PROMPTS for mark in marks if (mark.folder / PROMPTS).is_file()]
    for file in files[1:]:
        if not filecmp.cmp(files[0], file, shallow=False):
            small, large = sorted((files[0], file), key=lambda one: one.stat().st_size)
            raise StoreError(
                f"{small} and {large} differ, and the shards are of one run: one of them is damaged, the shorter one "
                "most likely; put back a whole copy, or remove it and repeat the shard's command"
            )
    return files[0] if files else None


def _copy_prompts(source: Path | None, output: Path) -> None:
    if (output / PROMPTS).exists() or source is None:
        return
    try:
        write_whole(output / PROMPTS, source.read_bytes())
    except OSError as error:
        raise RunError(f"cannot write to {output} ({error.strerror}); the same command goes on") from None
