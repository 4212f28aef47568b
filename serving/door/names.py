"""What clients call a model, and the list of models as they may see it: names, and no path of this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def served_name(checkpoint: str) -> str:
    """A hub id or built-in name as it is; of a directory its last part."""
    path = Path(checkpoint).expanduser()
    return path.resolve().name if path.is_dir() else checkpoint


def served_names(checkpoints: Sequence[str]) -> dict[str, str]:
    """Name -> checkpoint; of directories with the same last part, the second is `NAME-2`, and so on."""
    names: dict[str, str] = {}
    for checkpoint in checkpoints:
        name = served_name(checkpoint)
        count = 2
        while name in names:
            name, count = f"{served_name(checkpoint)}-{count}", count + 1
        names[name] = checkpoint
    return names


def names_alone(listing: bytes) -> bytes:
    """The body of `/v1/models` with `root` set to the model's served name, where vLLM puts the checkpoint's path.

    A body that is no such list is returned as it is.
    """
    try:
        content = json.loads(listing)
        for entry in content["data"]:
            if "root" in entry:
                entry["root"] = entry["id"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return listing
    return json.dumps(content).encode()
