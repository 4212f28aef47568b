"""The archived answers behind a server, and a journal, for tests of what is sent to a judge.

A plugin (`pytest_plugins`), as `benchmark_fixtures` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from replay_server import SECRET, Archived, ReplayServer, archive_beside

from almost_eval.judge.api.journal import Journal


@pytest.fixture(scope="module")
def archive(data_root: Path) -> list[Archived]:
    """What was answered in the archive that stands beside the data root."""
    return archive_beside(data_root)


@pytest.fixture
def server(archive: list[Archived], monkeypatch: pytest.MonkeyPatch) -> Iterator[ReplayServer]:
    """A server of these, with its key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = ReplayServer(archive)
    yield server
    server.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """An empty journal."""
    with Journal(tmp_path / "journal.sqlite") as journal:
        yield journal
