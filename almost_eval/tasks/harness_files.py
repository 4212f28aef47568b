"""Tasks of one's own: YAML files as lm-eval has them, given by their path where its names are.

lm-eval loads them (`include` and `!function` as in its own tasks, so they are code of whoever wrote them). Nothing but
the file says what they are, so a spec has a digest of each: a file that was changed is another task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file, and not of lm-eval's index."""
    return name.endswith((".yaml", ".yml"))


def as_spec(name: str, manager: Any) -> Any:
    """What lm-eval's task manager loads for a name or a file.

    The group of a file is built here: by its path, lm-eval takes its list of tasks for its name (0.4.13).
    """
    group = group_in_file(name) if is_file_name(name) else ""
    if not group:
        return name
    from lm_eval.tasks._index import Entry, Kind

    entry = Entry(name=group, kind=Kind.GROUP, yaml_path=Path(name).expanduser().resolve())
    return manager._factory.build(entry, overrides=None, registry=manager._index)


def group_in_file(path: str) -> str:
    """The name of the group in a file; empty where it holds none."""
    return str(_content(path).get("group") or "")


def _content(path: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    config: Any = load_yaml(Path(path), resolve_func=False)
    return config if isinstance(config, dict) else {}


def digests(tasks: Mapping[str, Any]) -> dict[str, str]:
    """Task -> sha256 of its whole configuration, hex, functions by their source."""
    return {
        name: hashlib.sha256(
            json.dumps(task.config.to_dict(keep_callable=False), sort_keys=True, default=str).encode()
        ).hexdigest()
        for name, task in tasks.items()
    }
