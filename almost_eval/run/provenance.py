"""Where a number comes from: everything needed to say that two runs are the same run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("almost-toolkit", "torch", "transformers", "tokenizers", "lm_eval", "numpy")


def versions() -> dict[str, str]:
    """Versions of what computes and of what defines the tasks."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def commit() -> str | None:
    """The commit of the source tree this runs from, `+changes` where files differ from it; None when installed."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + (
            "+changes" if _git(here, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    # Without its variables: in a hook of another repository they name that one, whatever the folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


_COMMAND: ContextVar[list[str] | None] = ContextVar("command", default=None)


@contextmanager
def recording_command(arguments: list[str]) -> Iterator[None]:
    """Inside, this command line is recorded: with what a file of options stands for, in place of the file's name."""
    token = _COMMAND.set(arguments)
    try:
        yield
    finally:
        _COMMAND.reset(token)


def command() -> list[str]:
    """The command line, the program without its folder. Keys come from the environment, so it holds none."""
    arguments = _COMMAND.get() or sys.argv
    return [Path(arguments[0]).name, *arguments[1:]]


def digest(value: Mapping[str, Any]) -> str:
    """sha256 of a JSON object."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
