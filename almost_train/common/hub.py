"""`--push-to-hub`: a stage's checkpoint to the Hugging Face hub. The token is in HF_TOKEN, and nowhere else.

The repository is made before training begins, so a wrong name or token ends the command in its first second and not
after its last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import AlmostError, InputError, RunError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN = "HF_TOKEN"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LEFT_OUT = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", ".*", "*/.*"]
"""Pickles, which run code where they are read, and hidden files. Our checkpoints have none."""


def open_repository(repository: str) -> str:
    """Make the repository if it is not there; a new one is private.

    Args:
        repository: `org/name`.

    Returns:
        Its address.

    Raises:
        InputError: no such name can be, there is no token, or the hub refuses.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"--push-to-hub {repository!r}: a repository is named org/name")
    if not os.environ.get(TOKEN):
        raise InputError(f"--push-to-hub needs a token of the hub that may write, in the environment: {TOKEN}")
    with _problems_as(InputError, f"--push-to-hub {repository}"):
        return str(_api().create_repo(repository, private=True, exist_ok=True))


def push(folder: Path, repository: str, message: str) -> str:
    """Upload a checkpoint as one commit; returns the commit's address.

    Args:
        folder: the checkpoint, with its card.
        repository: `org/name`, which exists.
        message: of the commit.

    Raises:
        RunError: the hub cannot be reached, or refuses.
    """
    with _problems_as(RunError, f"the checkpoint is in {folder} and was not pushed to {repository}"):
        commit = _api().upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=_LEFT_OUT
        )
    return str(commit.commit_url)


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=os.environ[TOKEN], library_name="almost-toolkit")


@contextmanager
def _problems_as(kind: type[AlmostError], what: str) -> Iterator[None]:
    """What the hub's client raises, in one line without the token."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, ValueError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        token = os.environ.get(TOKEN, "")
        text = text.replace(token, "***") if token else text
        again = "; the same command pushes it" if kind is RunError else ""
        raise kind(f"{what}: {text:.300}{again}") from None
