"""A list of models as clients may see it: the names that are served, and no path of this machine."""

from __future__ import annotations

import json


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
