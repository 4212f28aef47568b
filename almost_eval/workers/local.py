"""Workers as processes of this machine.

One process imports the libraries, which takes seconds, and forks a worker whenever one is wanted, as Python's
`forkserver` does; unlike that it leaves the program's own `__main__` alone. It never touches a GPU, so that each worker
may. What workers and libraries print goes to a file each; the last line of it is part of the reason of a loss.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from almost_eval.types import JSONObject
from almost_eval.workers.work import Lost, Message, ServantRecipe, Unit

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from almost_eval.workers.process import main; main()"
PATIENCE = 10.0
"""Seconds that workers have to end by themselves."""


class LocalTransport:
    """Workers that this machine runs.

    Args:
        recipe: of what a worker holds.
        size: workers at most.
        threads: of a worker's arithmetic.
        devices: what `CUDA_VISIBLE_DEVICES` is in each worker; None leaves it as it is.
        modules: what to import before workers are forked.
    """

    def __init__(
        self,
        recipe: ServantRecipe,
        size: int,
        *,
        threads: int,
        devices: Sequence[str] | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        self.size = size
        self._recipe = recipe
        self._threads = threads
        self._devices = devices
        self._modules = list(modules)
        self._workers: dict[int, _Worker] = {}
        self._task: tuple[int, bytes] = (0, b"")
        self._folder: Path | None = None
        parent_of(threads, modules)  # imports, while this process prepares the work

    def describe(self) -> JSONObject:
        """What a result records."""
        return {"transport": "local", "threads": self._threads}

    def start(self, place: int) -> None:
        """Fork a worker."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="almost-workers-"))
        environment = {"CUDA_VISIBLE_DEVICES": self._devices[place]} if self._devices else {}
        worker = _Worker(parent_of(self._threads, self._modules), self._folder / f"worker-{place + 1}.log", environment)
        worker.send(pickle.dumps(self._recipe))
        self._workers[place] = worker

    def give(self, place: int, task: Any, unit: Unit) -> None:
        """Send a unit, and before it the task where the worker does not have it; pickled once for all."""
        if self._task[0] != unit.task:
            self._task = (unit.task, pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL))
        worker = self._workers[place]
        if worker.task != unit.task:
            worker.task = unit.task
            worker.send(self._task[1])
        worker.send(pickle.dumps(unit))

    def receive(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """Wait for a message, and yield what has arrived."""
        places = {worker.connection: place for place, worker in self._workers.items()}
        for ready in connection.wait(list(places), seconds):
            assert isinstance(ready, connection.Connection)
            place = places[ready]
            worker = self._workers.get(place)
            if worker is None or worker.connection is not ready:  # all were ended while a message was looked at
                return
            try:
                message: Message = ready.recv()
            except (EOFError, OSError):  # also in the middle of a message
                del self._workers[place]
                message = Lost(worker.reason())
            yield place, message

    def end(self, place: int) -> None:
        """Kill a worker, with everything it started."""
        worker = self._workers.pop(place)
        worker.connection.close()
        worker.end(time.monotonic())

    def close(self) -> None:
        """End all workers, with everything they started."""
        workers = list(self._workers.values())
        self._workers = {}
        for worker in workers:
            worker.connection.close()
        end = time.monotonic() + PATIENCE
        for worker in workers:
            worker.end(end)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


_parents: dict[tuple[int, int, tuple[str, ...]], _Parent] = {}


def parent_of(threads: int, modules: Sequence[str]) -> _Parent:
    """The process that forks workers with so many threads: one for all pools of this process, as imports take seconds.

    It ends with this process.
    """
    key = (os.getpid(), threads, tuple(modules))  # a process that was forked from this one has its own
    parent = _parents.get(key)
    if parent is None or not parent.is_alive():
        if parent is not None:
            parent.close()
        parent = _parents[key] = _Parent(threads, modules)
        atexit.register(parent.close)
    return parent


class _Parent:
    """The process that imports and forks; see `process.main`."""

    def __init__(self, threads: int, modules: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, json.dumps(sys.path), json.dumps(modules), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # a Ctrl-C reaches this process alone, which then ends the workers
            )
        self._lines = self._socket.makefile("r")
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, theirs: connection.Connection, log: Path, environment: dict[str, str]) -> int | None:
        """Pid of a worker that has the connection; None where this process has ended."""
        return self._order({"log": str(log), "environment": environment}, [theirs.fileno()])

    def wait(self, pid: int, seconds: float) -> int | None:
        """Exit code of a worker, minus the signal that ended it; None where it runs on, or is not known."""
        return self._order({"wait": pid, "seconds": seconds}, [])

    def _order(self, order: JSONObject, descriptors: list[int]) -> int | None:
        with self._lock:
            try:
                socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
                return int(self._lines.readline())
            except (OSError, ValueError):
                return None

    def close(self) -> None:
        """End it, which may be in the middle of an import; its workers end by themselves."""
        if os.getpid() != self._owner:
            return
        self._lines.close()
        self._socket.close()
        self._process.kill()
        self._process.wait()


class _Worker:
    """A forked process, as it is seen from here."""

    def __init__(self, parent: _Parent, log: Path, environment: dict[str, str]) -> None:
        self.connection, theirs = connection.Pipe()
        self.task = 0
        """Number of the task it has."""
        self._parent = parent
        self._log = log
        self.pid = parent.fork(theirs, log, environment)
        theirs.close()

    def send(self, message: bytes) -> None:
        """Send what is pickled; the end of the worker shows in what is received."""
        try:
            self.connection.send_bytes(message)
        except OSError:
            return

    def reason(self) -> str:
        """Why it has ended."""
        self.connection.close()
        code = None if self.pid is None else self._parent.wait(self.pid, PATIENCE)
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"ended{'' if code is None else f' with exit code {code}'}{self._last_line()}"

    def _last_line(self) -> str:
        try:
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        return f" ({lines[-1].strip()[:200]})" if lines else ""

    def end(self, deadline: float) -> None:
        """Wait until it has ended; kill it, and what it started, where it does not by `deadline`."""
        if self.pid is None:
            return
        if self._parent.wait(self.pid, max(0.0, deadline - time.monotonic())) is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                return
            self._parent.wait(self.pid, PATIENCE)
