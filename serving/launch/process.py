"""One child process that serves HTTP: started, watched, and ended with everything that it started itself.

The child leads a process group of its own, so that a Ctrl-C in the terminal reaches us alone and the whole group can be
killed. Its standard input is a pipe that we hold: where we are killed outright, the pipe closes and the child ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Self

from almost_eval.errors import InputError, RunError
from almost_eval.progress import Progress, progress_for

_WATCH = "ALMOST_WATCH_PARENT"
_KEPT_LINES = 400
_LAST_LINES = 20
_EVERY_S = 0.1
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"(?:^|\s)((?:\w+\.)*[A-Z]\w*(?:Error|Exception): .+)")
_CONSEQUENCE = ("EngineDeadError", "Engine core initialization failed", "Engine core proc")


def watch_parent(grace_s: float = 20.0) -> None:
    """In a child of `ServerProcess`: end, with the whole process group, once the parent is gone."""
    if os.environ.pop(_WATCH, None) is None:  # popped: it is not meant for the children of this process
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment.

    Raises:
        InputError: `host` is no address of this machine.
    """
    return _bind(host, 0)


def check_port(host: str, port: int) -> None:
    """Raise InputError where `port` cannot be listened on."""
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} does not exist; give one from 1 to 65535, or 0 for a free one")
    if port:
        _bind(host, port)


def _bind(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"cannot listen on {host} port {port} ({reason}); give another --port (0 takes a free one) or --host"
            ) from None
        return int(listening.getsockname()[1])


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        InputError: the address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --port (0 takes a free one)"
        ) from None


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """An address as a URL, without a closing slash."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class ServerProcess:
    """A child that serves HTTP on a known address. A context manager that starts it and, whatever happens, ends it.

    Args:
        name: what messages call it.
        command: the program and its arguments.
        address: (host, port) that it will listen on.
        environment: variables set besides our own; keys go here, and never into `command`.
        phases: texts that the child's output holds as it starts, in order; they move the progress bar.
        scheme: http, or https for a server with a certificate of its own (which our health check does not verify).
        log: takes every line of the child's output, beside the last ones that are kept anyway.
        grace_s: seconds between SIGTERM and SIGKILL.
        health: the path that answers 200 once it serves.
        key: what that path wants as a bearer token.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        address: tuple[str, int],
        *,
        environment: Mapping[str, str] | None = None,
        phases: Sequence[str] = (),
        scheme: str = "http",
        log: IO[str] | None = None,
        grace_s: float = 15.0,
        health: str = "/health",
        key: str | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.environment = dict(environment or {})
        self.phases = tuple(phases)
        self.phase = 0
        """How many of `phases` were seen."""
        self.was_ready = False
        """Whether `wait_ready` has seen it answer."""
        self._started = 0.0
        self._address = address
        self._scheme = scheme
        self._log = log
        self._grace_s = grace_s
        self._health = health
        self._key = key
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it can be reached from this machine, without a closing slash."""
        host, port = self._address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
        return url_of(host, port, self._scheme)

    @property
    def pid(self) -> int | None:
        """The child's process id, which is its group's; None before the start."""
        return self._process.pid if self._process else None

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before."""
        return self._process.poll() if self._process else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the child; returns at once."""
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment, _WATCH: "1", "PYTHONUNBUFFERED": "1"},
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._started = time.monotonic()
        self._reader = threading.Thread(target=self._read, name=f"{self.name} log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(_COLOUR.sub("", line).rstrip())
            for index in range(self.phase, len(self.phases)):
                if self.phases[index] in line:
                    self.phase = index + 1
            if self._log is not None:
                with contextlib.suppress(OSError, ValueError):  # a full disk or a closed file does not stop a server
                    self._log.write(line)
                    self._log.flush()

    def is_healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether the health path answers 200 now."""
        import ssl
        import urllib.error
        import urllib.request

        context = ssl._create_unverified_context() if self._scheme == "https" else None
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.url + self._health, headers=headers)
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):  # URLError is an OSError
            return False

    def last_lines(self, count: int = _LAST_LINES) -> list[str]:
        """The end of what it wrote."""
        return [line for line in list(self._lines) if line][-count:]

    def failure(self) -> RunError | InputError:
        """Why a child that has ended ended, in one line; subclasses know their server better."""
        if self._reader:
            self._reader.join(2.0)
        code = self.exit_code
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        # Once it served, an error among its lines need not be why it ended.
        lines = [] if self.was_ready else list(self._lines)
        causes = [match[1] for line in lines if (match := _EXCEPTION.search(line))]
        cause = next((text for text in causes if not any(word in text for word in _CONSEQUENCE)), "")
        return RunError(f"{self.name} {how}" + (f": {cause}" if cause else "; its last lines say why"))

    def wait_ready(self, progress: Progress | None = None, timeout_s: float = 1800.0) -> None:
        """Return once it answers; see `wait_ready`."""
        wait_ready([self], progress, timeout_s)

    def terminate(self) -> None:
        """Ask it to end; returns at once."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End it and everything it started: SIGTERM, then SIGKILL for the whole group. May be called twice."""
        if self._process is None:
            return
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._grace_s)
        self.kill()

    def kill(self) -> None:
        """End the whole group at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._reader:
            self._reader.join(2.0)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe and not (pipe is self._process.stdout and self._reader and self._reader.is_alive()):
                pipe.close()


def wait_ready(servers: Sequence[ServerProcess], progress: Progress | None = None, timeout_s: float = 1800.0) -> None:
    """Return once every server answers; they must have been started.

    Raises:
        InputError: a server ended, and the input was at fault.
        RunError: a server ended, or was not ready in time.
    """
    names = ", ".join(server.name for server in servers)
    total = sum(len(server.phases) + 1 for server in servers)  # the last step is the health check
    waiting, seen = list(servers), 0
    began = time.monotonic()
    with (progress or progress_for()).track(f"starting {names}", total) as advance:
        while waiting:
            for server in servers:
                if server.exit_code is not None:
                    raise server.failure()
            for server in waiting:
                server.was_ready = server.is_healthy()
            waiting = [server for server in waiting if not server.was_ready]
            steps = sum(server.phase if server in waiting else len(server.phases) + 1 for server in servers)
            advance(steps - seen)
            seen = steps
            if waiting and time.monotonic() - began > timeout_s:
                raise RunError(f"{waiting[0].name} was not ready after {timeout_s:.0f} s (see --start-timeout)")
            if waiting:
                time.sleep(_EVERY_S)
