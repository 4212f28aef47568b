"""Checkpoints to resume from that were damaged after they were written: told before they are loaded, and passed over.

A kill cannot leave half a checkpoint that counts as whole: what marks it is written last. A power cut, a full disk or a
person can. Without the optimiser's file transformers would go on as if its moments were 0, and the result be another.

The seal is a file of the checkpoint, written last: name -> bytes and a digest of both ends of every other file. Weights
are not read whole: that would take as long as writing them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from almost_eval.errors import RunError
from almost_eval.files import write_whole

SEAL = "whole"
"""Name of the seal. An empty one (of earlier versions) says no more than that the checkpoint was written to its end."""
_END = 1 << 16
"""Bytes at each end of a file that count. The headers of safetensors and the directory of torch's files are there."""


def seal(folder: Path) -> None:
    """Mark a checkpoint as written to its end.

    Raises:
        OSError: the disk is full, or gone.
    """
    write_whole(folder / SEAL, json.dumps({name: _mark(folder / name) for name in _names(folder)}).encode())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, for an error; None where it is as it was sealed, or has no seal to compare."""
    try:
        content = (folder / SEAL).read_bytes()
    except FileNotFoundError:
        return None
    if not content:
        return None
    try:
        sealed = dict(json.loads(content))
    except ValueError:
        return f"{SEAL} is damaged"
    for name, mark in sealed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != mark[0]:
            return f"{name} has {size} bytes of {mark[0]}"
        if _mark(file) != mark:
            return f"{name} is not what was written"
    return None


def undamaged(folders: Sequence[Path], notice: Callable[[str], None]) -> list[Path]:
    """The checkpoints up to the last one that is whole; later ones, which are damaged, are removed.

    Args:
        folders: oldest first.
        notice: tells the user what was removed.

    Raises:
        RunError: all are damaged: to begin anew is the user's choice.
    """
    kept, damaged = list(folders), []
    while kept and (problem := damage(kept[-1])):
        damaged.append((kept.pop(), problem))
    for folder, problem in damaged:
        if not kept:
            raise RunError(
                f"the checkpoint {folder} is damaged ({problem}), and there is no other; put the file back, or remove "
                f"{folder.parent} to begin anew"
            )
        notice(f"the checkpoint {folder} is damaged ({problem}): it is removed, and {kept[-1].name} gone on from")
        shutil.rmtree(folder)
    return kept


def _names(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != SEAL)


def _mark(file: Path) -> list[int | str]:
    """[bytes, digest of both ends]."""
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        ends = stream.read(_END)
        stream.seek(max(size - _END, stream.tell()))
        ends += stream.read(_END)
    return [size, hashlib.sha256(ends).hexdigest()[:16]]
