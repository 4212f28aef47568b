"""The pool on real processes, with a servant that needs no model: what is lost, given on, refused and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from almost_eval.errors import InputError, RunError
from almost_eval.workers.local import LocalTransport
from almost_eval.workers.pool import Pool
from almost_eval.workers.size import local_share, threads_each
from almost_eval.workers.work import Unit


@dataclass
class Squares:
    """Answers an item with its square, and the pid that computed it."""

    once: str = ""
    """A file: the worker that makes it kills itself at an item of `fatal`; "" kills each."""
    fatal: tuple[int, ...] = ()
    hangs: tuple[int, ...] = ()
    """Items at which a worker says nothing more; with `once`, the first of them does."""
    refused: int = -1
    broken: int = -1
    seconds: float = 0.0

    def open(self) -> Squares:
        return self

    def answer(self, task: int, unit: Unit) -> Iterator[tuple[int, tuple[int, int]]]:
        for item in unit.items:
            time.sleep(self.seconds)
            if item in self.fatal and self._is_first():
                os.kill(os.getpid(), signal.SIGKILL)
            if item in self.hangs and self._is_first():
                time.sleep(600)
            if item == self.refused:
                raise InputError(f"item {item} is not to be had")
            if item == self.broken:
                raise ValueError(f"item {item} is odd")
            yield item, (task * item**2, os.getpid())

    def _is_first(self) -> bool:
        try:
            return not self.once or bool(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False

    def report(self) -> str:
        return "report"

    def identity(self) -> Mapping[str, str | None]:
        return {}

    def close(self) -> None:
        return


def pool_of(recipe: Squares, size: int, silence_s: float | None = None) -> Pool:
    return Pool(LocalTransport(recipe, size, threads=1), silence_s=silence_s)


def cut(items: range, parts: int) -> list[tuple[int, ...]]:
    return [tuple(items[part * len(items) // parts : (part + 1) * len(items) // parts]) for part in range(parts)]


def squares(pool: Pool, items: int = 40, parts: int = 8) -> dict[int, int]:
    answers = list(pool.run(1, cut(range(items), parts)))
    assert len(answers) == items  # none twice
    return {item: answer for item, (answer, _) in answers}


TRUTH = {item: item**2 for item in range(40)}


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_killed_worker_costs_time_alone(tmp_path: Path) -> None:
    pool = pool_of(Squares(once=str(tmp_path / "first"), fatal=(7,), seconds=0.002), 3)
    assert squares(pool) == TRUTH
    assert len(pool.lost) == 1
    assert len(pool.reports) == 8  # the unit of the lost worker is reported by who finished it
    (warning,) = pool.warnings
    assert warning.startswith("1 worker of 3 ended early, and the others took over (worker ")
    assert "SIGKILL" in warning
    assert squares(pool) == TRUTH  # and it goes on with the next task
    assert pool.describe()["lost"] == pool.lost
    pool.close()


def test_a_worker_that_hangs_is_ended_and_its_items_given_on(tmp_path: Path) -> None:
    pool = pool_of(Squares(once=str(tmp_path / "first"), hangs=(7,)), 2, silence_s=1.5)
    before = workers()
    assert squares(pool) == TRUTH
    assert [reason.partition(": ")[2] for reason in pool.lost] == ["said nothing for 2 s"]
    assert len(workers() - before) <= 2  # the one that hung runs no more
    pool.close()


def test_items_that_hang_every_worker_end_the_run() -> None:
    pool = pool_of(Squares(hangs=(7,)), 1, silence_s=0.5)
    with pytest.raises(RunError, match=r"^the only worker has ended \(worker 1: said nothing for \d s\)"):
        squares(pool)


def test_a_caller_that_takes_its_time_is_no_silence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("almost_eval.workers.pool.NOTICE_S", 0.5)
    monkeypatch.setattr("almost_eval.workers.pool._LOOK_S", 0.2)
    pool = pool_of(Squares(), 1, silence_s=1.0)
    for _ in pool.run(1, cut(range(4), 2)):
        time.sleep(0.6)
    assert pool.lost == []
    pool.close()
    slow = pool_of(Squares(seconds=1.2), 1)
    assert len(dict(slow.run(1, cut(range(1), 1)))) == 1
    slow.close()
    assert "no worker has said anything for 0 s (at work or starting: 1); one that hangs" in capsys.readouterr().err


def test_work_is_shared_and_each_task_is_its_own() -> None:
    pool = pool_of(Squares(seconds=0.01), 2)
    answers = dict(pool.run(1, cut(range(20), 8)))
    assert len({pid for _, pid in answers.values()}) == 2
    assert {item: square for item, (square, _) in pool.run(10, cut(range(20), 8))} == {
        item: 10 * item**2 for item in range(20)
    }
    assert (pool.lost, pool.warnings, pool.restarted) == ([], [], 0)
    pool.close()


def test_items_that_end_every_worker_do_not_end_them_all() -> None:
    pool = pool_of(Squares(fatal=(7,)), 4)
    with pytest.raises(RunError, match=r"^3 workers ended over the same 3 items \(numbers \(7, 8, 9\)"):
        squares(pool)


def test_when_all_have_ended_one_line_says_so() -> None:
    pool = pool_of(Squares(fatal=tuple(range(40))), 1)
    with pytest.raises(
        RunError, match=r"^the only worker has ended \(worker 1: ended by SIGKILL.*the same command goes"
    ):
        squares(pool)
    assert (len(pool.lost), pool.restarted) == (2, 1)


def test_an_error_of_ours_is_everybodys_and_another_is_the_workers_own() -> None:
    refusing = pool_of(Squares(refused=7), 2)
    with pytest.raises(InputError, match=r"^item 7 is not to be had$"):
        squares(refusing)
    assert refusing.lost == []
    broken = pool_of(Squares(broken=7), 2)
    with pytest.raises(RunError, match=r"ended with exit code 1 \(ValueError: item 7 is odd\)"):
        squares(broken)


def workers() -> set[int]:
    """Pids of the workers of this process."""
    return {worker.pid for child in psutil.Process().children() for worker in child.children()}


def test_who_leaves_early_leaves_no_process_behind() -> None:
    of_others = workers()  # of pools that an error still refers to
    pool = pool_of(Squares(seconds=0.05), 2)
    answers = pool.run(1, cut(range(40), 4))
    _, (_, pid) = next(answers)
    assert is_running(pid)
    answers.close()
    assert not is_running(pid)
    assert squares(pool) == TRUTH  # others start
    mine = workers() - of_others
    assert mine
    del pool, answers  # as it is dropped
    assert not any(is_running(pid) for pid in mine)


def test_a_pool_whose_process_is_killed_leaves_no_worker_behind(tmp_path: Path) -> None:
    code = """
import sys
sys.path[:0] = sys.argv[1:]
from test_local_workers import *
for _, (_, pid) in pool_of(Squares(seconds=0.2), 2).run(1, cut(range(1000), 2)):
    print(pid, flush=True)
"""
    folder = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(folder.parents[2])], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert is_running(pid)
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(pid)


def test_two_streams_at_a_time_are_refused() -> None:
    pool = pool_of(Squares(), 1)
    first = pool.run(1, [(1, 2)])
    next(first)
    with pytest.raises(RunError, match="in the middle of another stream"):
        next(pool.run(1, [(3,)]))
    first.close()


def test_shares_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local_share("GPUS", "cuda", 1).devices == ("4", "5", "GPU-a", "7")
    pairs = local_share("gpus", "cuda", 2)
    assert (pairs.workers, pairs.devices, pairs.threads) == (2, ("4,5", "GPU-a,7"), 3)
    assert local_share(1, "cuda", 3).devices == ("4,5,GPU-a",)
    with pytest.raises(InputError, match="enough for 2 with 2 GPUs each"):
        local_share(3, "cuda", 2)
    with pytest.raises(InputError, match="a worker takes 8 GPUs, and 4 are visible"):
        local_share("GPUS", "cuda", 8)


def test_shares_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [threads_each(workers) for workers in (1, 3, 8, 16)] == [8, 2, 1, 1]
    assert local_share("4", "cpu", 1).devices is None
    for wrong in ("0", "-1", "two", "1.5", ""):
        with pytest.raises(InputError, match="give a number of at least 1, or GPUS"):
            local_share(wrong, "cpu", 1)
    with pytest.raises(InputError, match="no GPU is visible here"):
        local_share("GPUS", "cpu", 1)
    with pytest.raises(InputError, match="all of them would share cuda:1"):
        local_share(2, "cuda:1", 1)
