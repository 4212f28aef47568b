"""The other side of `local`: the process that imports once and forks, and what a forked worker does."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from almost_eval.errors import AlmostError
from almost_eval.workers.work import Message, Ready, Refused, Servant, Unit, serve


def main() -> None:
    """Import what the command line names, then fork a worker for each order that comes, until the socket closes."""
    for name in json.loads(sys.argv[2]):
        # What cannot be imported is said by the worker that needs it.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a collection in a worker would copy every page that it shares
    orders = socket.socket(fileno=int(sys.argv[3]))
    while True:
        text, descriptors, _, _ = socket.recv_fds(orders, 1 << 16, 1)
        if not text:
            return
        order = json.loads(text)
        if "wait" in order:
            answer = _wait(order["wait"], order["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                orders.close()
                _work(Connection(descriptors[0]), order)
            os.close(descriptors[0])
        orders.sendall(f"{answer}\n".encode())


def _wait(pid: int, seconds: float) -> int | None:
    """Exit code of a child, minus the signal that ended it; None where it runs on after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.005)


def _work(connection: Connection, order: dict[str, Any]) -> NoReturn:
    """Be a worker, and exit."""
    code = 1
    try:
        os.setsid()  # one signal ends it with whatever it starts
        os.environ.update(order["environment"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _answer(connection)
        code = 0
    except BaseException:  # whatever it is, its last line is the reason that the pool gives
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _answer(connection: Connection) -> None:
    """Make the servant, and answer units until the connection closes."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    at_work = threading.Event()

    def read() -> None:
        try:
            while True:
                inbox.put(pickle.loads(connection.recv_bytes()))
        except (EOFError, OSError):  # the pool has closed, or its process has ended
            if at_work.is_set():  # nobody wants what this is at
                os.killpg(0, signal.SIGKILL)
            inbox.put(None)

    threading.Thread(target=read, name="inbox", daemon=True).start()

    def send(message: Message) -> None:
        try:
            connection.send(message)
        except OSError:
            os.killpg(0, signal.SIGKILL)

    at_work.set()
    servant: Servant
    if (recipe := inbox.get()) is None:
        return
    try:
        servant = recipe.open()
    except AlmostError as error:
        send(Refused(error))
        inbox.get()
        return
    send(Ready())
    task = None
    while True:
        at_work.clear()
        received = inbox.get()
        at_work.set()
        if received is None:
            servant.close()
            return
        if not isinstance(received, Unit):
            task = received
            continue
        for message in serve(servant, task, received):
            send(message)
