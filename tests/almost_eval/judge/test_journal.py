"""The journal: what is put is there after anything, and what is no journal is said to be none."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import RunError, StoreError
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.records import JudgeRequest, Reply
from almost_eval.types import Message

REPLY = Reply("9 8\nAssistant 1 is \ud800 better. äöü 中 \x00", "stop", "gpt-4-0314", 700, 120)

WRITER = """
import sys
from pathlib import Path
from almost_eval.judge.api.journal import Journal
from almost_eval.judge.records import JudgeRequest, Reply
from almost_eval.types import Message
with Journal(Path(sys.argv[1])) as journal:
    for i in range(int(sys.argv[3])):
        request = JudgeRequest("gpt-4", (Message("user", f"question {i}"),), 0.2, 8)
        journal.put(request, Reply(f"{sys.argv[2]} {i}", "stop", "m", 1, 1))
        print(request.digest, flush=True)
"""


def question(text: str, **other: Any) -> JudgeRequest:
    return JudgeRequest("gpt-4", (Message("system", "Judge."), Message("user", text)), 0.2, 64, **other)


def test_a_reply_comes_back_as_it_was_and_marked(tmp_path: Path) -> None:
    file = tmp_path / "run" / "journal.sqlite"
    with Journal(file) as journal:
        assert journal.get(question("a").digest) is None
        journal.put(question("a"), REPLY)
        journal.put(question("a", attempt=1), Reply("7 7", "length", "", 5, 6))
    with Journal(file) as journal:
        assert len(journal) == 2
        assert journal.tokens() == (705, 126)
        assert journal.get(question("a").digest) == Reply(*REPLY_FIELDS, cached=True)
        assert journal.get(question("b").digest) is None


REPLY_FIELDS = (REPLY.text, REPLY.finish_reason, REPLY.model, REPLY.prompt_tokens, REPLY.completion_tokens)


def test_the_first_reply_to_a_request_stays(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.put(question("a"), REPLY)
        journal.put(question("a"), Reply("1 1", "stop", "m", 1, 1))
        stored = journal.get(question("a").digest)
        assert stored is not None
        assert stored.text == REPLY.text
        assert len(journal) == 1


def test_the_whole_request_is_kept(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.put(question("what?"), REPLY)
    with sqlite3.connect(tmp_path / "j") as database:
        [(request,)] = database.execute("SELECT request FROM replies").fetchall()
    assert all(part in request for part in ("gpt-4", "what?", "Judge.", "0.2", "64"))


@pytest.mark.parametrize("content", [b"not a database at all, but quite a long text " * 40, b"\x00" * 5000])
def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(StoreError, match=r"j is damaged or not a journal of replies .*move it away") as caught:
        Journal(tmp_path / "j").__enter__()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "j").read_bytes() == content


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "j") as database:
        database.execute("CREATE TABLE mine (a)")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(StoreError, match="another program's database"):
        Journal(tmp_path / "j").__enter__()
    assert (tmp_path / "j").read_bytes() == before


def test_a_later_version(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"):
        pass
    with sqlite3.connect(tmp_path / "j") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="later version"):
        Journal(tmp_path / "j").__enter__()


def test_a_damaged_page_is_found_when_it_is_opened(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for i in range(200):
            journal.put(question(f"{i}" * 50), REPLY)
    content = bytearray((tmp_path / "j").read_bytes())
    for at in range(4096, len(content), 4096):
        content[at : at + 64] = b"\xff" * 64
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        Journal(tmp_path / "j").__enter__()


class TestALargeJournal:
    """Beyond `CHECKED_WHOLE`: opened without reading every page."""

    @pytest.fixture
    def large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("almost_eval.judge.api.journal.CHECKED_WHOLE", 0)
        with Journal(tmp_path / "j") as journal:
            for i in range(200):
                journal.put(question(f"{i}" * 50), REPLY)
        return tmp_path / "j"

    @staticmethod
    def damage(file: Path, step: int, first: int = 1) -> None:
        content = bytearray(file.read_bytes())
        for at in range(4096 * first, len(content), 4096 * step):
            content[at : at + 64] = b"\xff" * 64
        file.write_bytes(content)

    def test_it_goes_on(self, large: Path) -> None:
        with Journal(large) as journal:
            assert len(journal) == 200
            assert all(journal.get(question(f"{i}" * 50).digest) is not None for i in range(200))
            journal.put(question("one more"), REPLY)
        with Journal(large) as journal:
            assert len(journal) == 201

    def test_damage_all_over_it_is_found_at_once(self, large: Path) -> None:
        self.damage(large, step=1)
        with pytest.raises(StoreError, match="damaged"):
            Journal(large).__enter__()

    def test_damage_of_some_pages_is_found_at_the_latest_when_they_are_read(
        self, large: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("almost_eval.judge.api.journal.SPOT_CHECKS", 1)
        self.damage(large, step=9, first=20)
        with Journal(large) as journal, pytest.raises(StoreError, match="damaged"):
            [journal.get(question(f"{i}" * 50).digest) for i in range(200)]


def test_a_folder_and_a_file_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder"):
        Journal(tmp_path).__enter__()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot write to"):
        Journal(tmp_path / "file" / "j").__enter__()


def test_a_journal_that_another_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("almost_eval.judge.api.journal.PATIENCE", 0.05)
    with Journal(tmp_path / "j") as journal:
        journal.put(question("a"), REPLY)
    other = sqlite3.connect(tmp_path / "j", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="is in use by another process; wait for it"):
        Journal(tmp_path / "j").__enter__()
    other.close()


def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with journal:
        pass
    with pytest.raises(StoreError, match="is closed"):
        len(journal)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.put(question("a"), REPLY)
        journal._connection.execute("PRAGMA max_page_count = 1")  # SQLite's own way to run out of room
        with pytest.raises(RunError, match=r"cannot write to .*j .*full.* the same command goes on"):
            journal.put(question("long " * 9000), REPLY)
    with Journal(tmp_path / "j") as journal:
        assert journal.get(question("a").digest) is not None


def test_two_processes_write_the_same_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "j")]
    writers = [subprocess.Popen([*command, name, "60"], stdout=subprocess.PIPE) for name in ("one", "two")]
    assert [writer.wait(60) for writer in writers if writer.communicate()] == [0, 0]
    with Journal(tmp_path / "j") as journal:
        assert len(journal) == 60


def test_a_new_journal_may_be_opened_by_several_at_the_same_moment(tmp_path: Path) -> None:
    def open_at_once(path: Path, barrier: threading.Barrier) -> None:
        barrier.wait()
        with Journal(path):
            pass

    with ThreadPoolExecutor(4) as pool:
        for i in range(60):  # one round in some fails where owner and tables are read one after the other
            barrier = threading.Barrier(4)
            for future in [pool.submit(open_at_once, tmp_path / str(i) / "j", barrier) for _ in range(4)]:
                future.result()
            with Journal(tmp_path / str(i) / "j") as journal:
                assert len(journal) == 0


def test_what_was_put_outlives_a_kill(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "j"), "one", "100000"], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    told = [writer.stdout.readline().strip() for _ in range(40)]
    os.kill(writer.pid, signal.SIGKILL)
    told += writer.stdout.read().split("\n")[:-1]
    writer.wait()
    with Journal(tmp_path / "j") as journal:
        assert all(journal.get(digest) for digest in told)
        assert len(told) <= len(journal) <= len(told) + 1
