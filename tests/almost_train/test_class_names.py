"""A class that is made inside a function has a name of its own too: a traceback or a search shows one place."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_local_classes_share_no_name_with_others() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for package in ("almost_eval", "almost_train", "serving"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(str(file.relative_to(ROOT)))
    shared = {name: files for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in shared.items() if any(f.startswith("almost_train") for f in files)} == {}
