"""A run on disk: `spec.json`, `samples.jsonl`, `results.json`.

`samples.jsonl` only grows: one line a sample, written as soon as its score is known. A run that was killed goes on
from what is there; a line that was cut short by the kill is removed first. One process holds a run at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from almost_eval.errors import StoreError
from almost_eval.files import LineWriter, locked_folder, read_json, read_records, write_json
from almost_eval.run import provenance
from almost_eval.run.shards import refuse_shard
from almost_eval.types import JSONMapping, JSONObject, Sample, SampleRecord, Score

FREE_KEYS = ("command", "commit", "model_name")
"""Spec keys that may differ when a run goes on: how it was asked for, and where its weights lie."""

NEW_RESULTS = "remove that file: the samples are kept, and the run's command writes it anew"
"""What to do about a damaged `results.json`."""
NEW_RUN = "what made the samples is unknown without it: put back a whole copy of the file, or choose another --output"
"""What to do about a damaged `spec.json`."""


class RunChanged(StoreError):
    """The folder holds another run; `change` says what is other: `seed was 2, is 3`."""

    def __init__(self, folder: Path, change: str) -> None:
        super().__init__(f"{folder} holds another run: {change}; choose another --output")
        self.change = change


class RunStore:
    """An open run folder. Use as a context manager: the lock is held inside.

    Args:
        folder: the run folder; made if absent.
        spec: what is to be run.
        amend: takes the stored spec and this one, and gives both back with what may change when a run goes on.

    Raises:
        RunChanged: the folder holds another run.
        StoreError: the folder is in use, or is not a run folder.
        RunError: by whatever writes: the disk is full, or gone.
    """

    def __init__(
        self,
        folder: Path,
        spec: Mapping[str, Any],
        amend: Callable[[JSONObject, JSONObject], tuple[JSONObject, JSONObject]] | None = None,
    ) -> None:
        self.folder = folder
        self._amend = amend
        self.spec: dict[str, Any] = json.loads(json.dumps(spec))  # as it reads when it comes back from the file
        """What is run; inside the context, what the process that began the run wrote down."""
        self.done: dict[str, SampleRecord] = {}

    def __enter__(self) -> RunStore:
        with ExitStack() as stack:  # what was opened is closed where the rest is refused
            stack.enter_context(locked_folder(self.folder, "run"))
            try:
                self._adopt_spec()
                kept = "what was scored is kept: the same command goes on"
                self._lines = stack.enter_context(LineWriter(self.folder / "samples.jsonl", advice=kept))
            except OSError as error:
                raise StoreError(f"cannot write to {self.folder} ({error.strerror}); choose another --output") from None
            self.done = {r.sample.id: r for r in read_samples(self.folder)}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, record: SampleRecord) -> None:
        """Write one sample's line and hand it to the kernel: a killed process loses nothing that was appended."""
        self._lines.append(record_to_dict(record))
        self.done[record.sample.id] = record

    def forget(self, ids: Iterable[str]) -> None:
        """Take out the lines of these samples, which are to be computed anew: what failed may succeed now."""
        for id in ids:
            del self.done[id]
        self.adopt(self.done.values())

    def results(self, *keys: str) -> dict[str, Any] | None:
        """What an earlier process wrote into `results.json`, or None.

        Raises:
            StoreError: the file is damaged, or lacks one of `keys`.
        """
        file = self.folder / "results.json"
        return read_json(file, *keys, mend=NEW_RESULTS) if file.exists() else None

    def adopt(self, records: Iterable[SampleRecord]) -> None:
        """Take these records for all lines of the run, in the place of those that are there."""
        self.done = {record.sample.id: record for record in records}
        self._lines.rewrite(map(record_to_dict, self.done.values()))

    def in_order(self, ids: Sequence[str]) -> list[SampleRecord]:
        """The records of these samples, those that are there; the file gets their order, and no other line.

        The order of the lines then tells nothing of batches, kills and shards: runs of one spec are equal as files.
        """
        ordered = {id: self.done[id] for id in ids if id in self.done}
        if list(ordered) != list(self.done):
            self.adopt(ordered.values())
        return list(ordered.values())

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write `results.json`, whole or not at all."""
        self._lines.sync()
        try:
            write_json(self.folder / "results.json", results)
        except OSError as error:
            raise self._lines.failure(error) from None

    def _adopt_spec(self) -> None:
        file = self.folder / "spec.json"
        if not file.exists():
            for name in ("samples.jsonl", "results.json"):
                if (self.folder / name).exists():
                    raise StoreError(
                        f"{self.folder} has a {name} but no spec.json, so what made it is unknown; choose another "
                        "--output"
                    )
            write_json(file, self.spec)
            return
        stored = begun = read_json(file, mend=NEW_RUN)
        if self._amend is not None:
            stored, self.spec = self._amend(stored, self.spec)
        if change := spec_change(stored, self.spec):
            raise RunChanged(self.folder, change)
        if stored != begun:
            write_json(file, stored)
        self.spec = stored


def spec_change(stored: JSONObject, spec: JSONObject) -> str | None:
    """What makes two specs those of two runs, in words: `seed was 2, is 3`; None where they are of one."""
    was, now = flat(stored), flat(spec)
    # In the order of the spec, but digests last: they say that something differs, the other keys what.
    differ = [key for key in {**now, **was} if was.get(key) != now.get(key) and key not in FREE_KEYS]
    differ.sort(key=lambda key: "digest" in key or "fingerprint" in key)
    shown = [f"{key} was {_short(was.get(key))}, is {_short(now.get(key))}" for key in differ[:3]]
    more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
    return "; ".join(shown) + more if differ else None


def read_samples(folder: Path) -> Iterator[SampleRecord]:
    """The records of a run, in the order they were written; a half-written last line is left out.

    Raises:
        StoreError: a line that is not a sample, or a second line for the same sample.
    """
    file = folder / "samples.jsonl"
    seen: set[str] = set()
    for number, record in read_records(file, record_from_dict, "a sample"):
        if record.sample.id in seen:
            raise StoreError(f"{file}, line {number}: a second line for sample {record.sample.id!r}; remove one")
        seen.add(record.sample.id)
        yield record


def digest_records(records: Iterable[SampleRecord]) -> str:
    """sha256 over the records in the order of their ids, which is not the order of a resumed run's lines."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: record.sample.id):
        digest.update(json.dumps(record_to_dict(record), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def default_folder(spec: JSONMapping, *names: str) -> Path:
    """`runs/<names>-<digest of the spec>`: the same command goes on where it stopped.

    Args:
        spec: of the run; what may differ when it goes on is left out.
        names: to be read by people; characters that file names lack are replaced.
    """
    decisive = {key: value for key, value in undated(spec).items() if key not in FREE_KEYS}
    readable = "-".join("".join(c if c.isalnum() or c in "+-_." else "_" for c in name)[:60] for name in names)
    return Path("runs") / f"{readable}-{provenance.digest(decisive)[:10]}"


def undated(spec: JSONMapping) -> JSONObject:
    """A spec without the time that its template writes, and what follows from it: tomorrow it is the same run."""

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        inner = {key: strip(item) for key, item in value.items()}
        return {key: item for key, item in inner.items() if not (key == "now" and "digest" in inner)}

    plain: JSONObject = strip(spec)
    if (spec.get("template") or {}).get("now"):
        plain["prompt_ids_digest"] = None
    return plain


def origin(spec: JSONMapping, records: Iterable[SampleRecord]) -> JSONObject:
    """The end of every `provenance` in `results.json`: lines, number format, seed, versions, command."""
    engine = spec["engine"]
    return {
        "samples_digest": digest_records(records),
        "dtype": engine.get("dtype"),
        "device": engine.get("device"),
        **{key: spec[key] for key in ("seed", "versions", "command", "commit")},
    }


def record_to_dict(record: SampleRecord) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    sample, score = record.sample, record.score
    return {
        "id": sample.id,
        "score": score.value,
        "reason": score.reason,
        "metrics": dict(score.metrics),
        "outputs": record.outputs,
        "prompt_tokens_truncated": record.prompt_tokens_truncated,
        "sample": {
            "gold": sample.gold,
            "cluster": sample.cluster,
            "group": sample.group,
            "metadata": dict(sample.metadata),
        },
    }


def record_from_dict(line: Mapping[str, Any]) -> SampleRecord:
    """The inverse, but for the texts: context and choices are in the data, and are left empty here."""
    stored, value = line["sample"], line["score"]
    if not isinstance(line["id"], str):
        raise TypeError(f"id is {line['id']!r}")
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"score is {value!r}")
    sample = Sample(
        line["id"], (), (), stored["gold"], stored["cluster"], stored["group"], metadata=dict(stored["metadata"])
    )
    score = Score(value, line["reason"], dict(line["metrics"]))
    return SampleRecord(sample, dict(line["outputs"]), score, int(line["prompt_tokens_truncated"]))


def read_spec(folder: Path) -> dict[str, Any]:
    """`spec.json`.

    Raises:
        StoreError: absent, or not a run's.
    """
    from almost_eval.run.shape import StoredSpec, check_shape

    file = folder / "spec.json"
    keys = ("task", "protocol", "settings", "engine", "data", "n_samples")
    return check_shape(read_json(file, *keys, mend=NEW_RUN), StoredSpec, file, NEW_RUN)


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json`.

    Raises:
        StoreError: absent, as the run is not finished or the folder is no run's; or not a run's.
    """
    file = folder / "results.json"
    refuse_shard(folder)
    if not file.exists() and (folder / "spec.json").exists():
        raise StoreError(f"{folder} is not finished; run its command again, and it goes on")
    from almost_eval.run.shape import StoredResults, check_shape

    keys = ("task", "metrics", "headline", "validity", "engine", "provenance")
    return check_shape(read_json(file, *keys, mend=NEW_RESULTS), StoredResults, file, NEW_RESULTS)


def flat(value: Any, at: str = "", joint: str = ".") -> dict[str, Any]:
    """Nested objects as one: `engine.dtype`."""
    if not isinstance(value, dict):
        return {at: value}
    inner = [flat(item, f"{at}{joint}{key}" if at else str(key), joint) for key, item in value.items()]
    return {name: leaf for part in inner for name, leaf in part.items()}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
