"""Changes to a copy of a checkpoint, for tests of what is refused."""

from __future__ import annotations

import json
from pathlib import Path


def change_config(folder: Path, **changes: object) -> None:
    """Other values in its `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
