"""Writes the nano world as a data root: the parquet files, folders and dataset cards of the hub, a few kilobytes each.

Also the cache of this package: a folder in it appears whole or not at all, and is named by a digest of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from almost_eval.errors import InputError
from almost_eval.files import json_line, whole_folder
from almost_eval.nano.tables import digest, question_rows, tables
from almost_eval.nano.world import World


def _list(item: pa.DataType) -> pa.DataType:
    # "element" is the name in the real files; pyarrow's own default is "item", and then the schemas would differ.
    return pa.list_(pa.field("element", item))


_TARGETS = pa.struct({"choices": _list(pa.string()), "labels": _list(pa.int64())})
_STRING, _STRINGS = pa.string(), _list(pa.string())
SCHEMAS = {
    "HuggingFaceH4/hhh_alignment": pa.schema({"input": _STRING, "targets": _TARGETS}),
    "truthfulqa/truthful_qa/generation": pa.schema(
        {
            "type": _STRING,
            "category": _STRING,
            "question": _STRING,
            "best_answer": _STRING,
            "correct_answers": _STRINGS,
            "incorrect_answers": _STRINGS,
            "source": _STRING,
        }
    ),
    "truthfulqa/truthful_qa/multiple_choice": pa.schema(
        {"question": _STRING, "mc1_targets": _TARGETS, "mc2_targets": _TARGETS}
    ),
    "cais/mmlu": pa.schema({"question": _STRING, "subject": _STRING, "choices": _STRINGS, "answer": pa.int64()}),
}
"""Data set, or data set and configuration where its configurations differ, -> schema of the real files."""

QUESTIONS = "github/lm-sys/FastChat/fastchat/eval/table/question.jsonl"
"""Where the Vicuna questions stand in a data root: the place of the public repository's file."""


def data_root() -> Path:
    """The nano world's data root in the cache, written on first use."""
    return cached(f"nano-data-{digest(World())[:12]}", write_data)


def write_data(root: Path) -> Path:
    """Write the nano world to `root`, which must be new or empty."""
    splits: dict[str, dict[str, list[str]]] = {}  # data set -> config -> splits
    with whole_folder(root) as folder:
        for table, rows in tables(World()).items():
            dataset, config, split = table.rsplit("/", 2)
            splits.setdefault(dataset, {}).setdefault(config, []).append(split)
            file = folder / dataset / config / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            schema = SCHEMAS.get(f"{dataset}/{config}") or SCHEMAS[dataset]
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
        for dataset, configs in splits.items():
            (folder / dataset / "README.md").write_text(_card(configs), encoding="utf-8")
        questions = folder / QUESTIONS
        questions.parent.mkdir(parents=True)
        lines = [json_line(row, ascii_only=True) for row in question_rows(World())]
        questions.write_text("".join(lines), encoding="utf-8")
    return root


def _card(configs: dict[str, list[str]]) -> str:
    """The YAML head that tells `datasets` which files make which config and split."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    return "\n".join([*lines, "---", ""])


def cache_dir() -> Path:
    """`ALMOST_CACHE`, else ~/.cache/almost."""
    return Path(os.environ.get("ALMOST_CACHE") or "~/.cache/almost").expanduser()


def cached(name: str, build: Callable[[Path], Path]) -> Path:
    """The folder `name` of the cache, built on first use. Of two processes that build it at once, the first wins.

    Raises:
        InputError: a file in it is not what was built.
    """
    path = cache_dir() / f"{name}-2"  # folders without a number are of versions that kept no digests
    if not path.is_dir():
        try:
            with whole_folder(path) as folder:
                build(folder)
                (folder / DIGESTS).write_text(json.dumps(_digests(folder), indent=1), encoding="utf-8")
        except InputError:
            if not path.is_dir():  # otherwise the other process has finished the same folder meanwhile
                raise
    _check_unchanged(path)
    return path


DIGESTS = ".digests.json"
"""In a folder of the cache: its files as they were built, name -> sha256."""


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != DIGESTS)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _check_unchanged(folder: Path) -> None:
    try:
        built = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        differ = sorted(name for name, _ in built.items() ^ _digests(folder).items())
    except (OSError, ValueError, AttributeError):
        differ = [DIGESTS]
    if differ:
        raise InputError(f"{folder / differ[0]} is not as it was built; remove {folder}, and it is built again")
