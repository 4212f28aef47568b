"""Published figures: a data file, shown greyed in a table of its own. No export and no comparison reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """One published figure."""

    task: str
    system: str
    """What was measured, against what."""
    value: str
    """As published: text, so that nothing can compute with it."""
    what: str
    protocol: str
    source: str


def reference_rows() -> list[ReferenceRow]:
    """All published figures on record."""
    content = json.loads(Path(__file__).with_name("reference.json").read_text(encoding="utf-8"))
    return [ReferenceRow(**row) for row in content["rows"]]
