"""How a run is named, and what of its spec its results repeat: the same for benchmarks and for judged runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from almost_eval.run import provenance
from almost_eval.run.store import FREE_KEYS, digest_records
from almost_eval.types import JSONMapping, JSONObject, SampleRecord


def default_folder(spec: JSONMapping, *names: str) -> Path:
    """`runs/<names>-<digest of the spec>`: the same command goes on where it stopped.

    Args:
        spec: of the run; what may differ when it goes on is left out.
        names: to be read by people; characters that file names lack are replaced.
    """
    decisive = {key: value for key, value in spec.items() if key not in FREE_KEYS}
    readable = "-".join("".join(c if c.isalnum() or c in "+-_." else "_" for c in name)[:60] for name in names)
    return Path("runs") / f"{readable}-{provenance.digest(decisive)[:10]}"


def origin(spec: JSONMapping, records: Iterable[SampleRecord]) -> JSONObject:
    """The end of every `provenance` in `results.json`: lines, number format, seed, versions, command."""
    engine = spec["engine"]
    return {
        "samples_digest": digest_records(records),
        "dtype": engine.get("dtype"),
        "device": engine.get("device"),
        **{key: spec[key] for key in ("seed", "versions", "command", "commit")},
    }
