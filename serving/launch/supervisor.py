"""Servers in the foreground: wait until they are ready, watch them, end them all when one ends or a signal comes."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from almost_eval.errors import RunError
from almost_eval.progress import Progress
from serving.launch.process import ServerProcess, wait_ready

_EVERY_S = 0.1


class Stopped(Exception):
    """SIGINT or SIGTERM arrived."""


@contextlib.contextmanager
def signals_handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `handler`, and it alone decides what ends."""
    # The command line's own guard ends an interrupted process within two seconds; servers need longer to end well.
    guard = signal.set_wakeup_fd(-1)
    earlier = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, own in earlier.items():
            signal.signal(number, own)
        signal.set_wakeup_fd(guard)


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Stopped`; what follows within a second is taken for the same wish."""
    first: float | None = None

    def stop(number: int, _: object) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise Stopped
        if time.monotonic() - first > 1.0:  # `timeout` and some init systems signal the process and then its group
            raise Stopped

    with signals_handled_by(stop):
        yield


def run_servers(
    servers: Sequence[ServerProcess],
    ready: Callable[[], None],
    *,
    in_turn: bool = False,
    timeout_s: float = 1800.0,
    progress: Progress | None = None,
) -> None:
    """Start the servers, call `ready` once all answer, and serve until a signal comes or one ends; then end all.

    Started `in_turn`, each answers before the next is started; the start may take `timeout_s`.

    Raises:
        InputError: a server could not start, and the input was at fault.
        RunError: a server ended; its last lines are on stderr. Or a signal came before all were ready.
    """
    is_ready = False
    with signals_stop():
        try:
            for server in servers:
                server.start()
                if in_turn:
                    wait_ready([server], progress, timeout_s)
            wait_ready(servers, progress, timeout_s)
            is_ready = True
            ready()
            while True:
                for server in servers:
                    if server.exit_code is not None:
                        raise server.failure()
                time.sleep(_EVERY_S)
        except Stopped:
            if not is_ready:
                raise RunError("stopped before the server was ready") from None
        except RunError:
            show_last_lines(servers)
            raise
        finally:
            stop_all(servers)


def stop_all(servers: Sequence[ServerProcess]) -> None:
    """End all servers, together; a signal meanwhile ends them at once."""
    try:
        for server in servers:
            server.terminate()
        for server in servers:
            server.stop()
    except (Stopped, KeyboardInterrupt):
        for server in servers:
            server.kill()


def show_last_lines(servers: Sequence[ServerProcess]) -> None:
    """The end of what those wrote that have ended, or, where none has, of all; on stderr."""
    ended = [server for server in servers if server.exit_code is not None]
    for server in ended or servers:
        print(f"--- the last lines of {server.name}", file=sys.stderr)
        print(*server.last_lines(), sep="\n", file=sys.stderr)
