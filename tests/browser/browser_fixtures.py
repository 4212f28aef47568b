"""What the browser tests share besides their fixtures."""

from __future__ import annotations

import socket
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


@dataclass
class Server:
    """A running `almost-chat`."""

    url: str
    votes: Path
    reports: Path
    process: subprocess.Popen[str]


@dataclass
class Traffic:
    """What a page asked for, and what it complained about."""

    requests: list[str] = field(default_factory=list)
    sockets: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def leave(*pages: Any) -> None:
    """Before a server ends: an open arena looks for votes, and rightly complains where nobody answers any more."""
    for page in pages:
        assert page.traffic.complaints == []
        page.goto("about:blank")
        page.traffic.complaints.clear()  # of a request that leaving broke off


class Wire:
    """A connection in between that hears every byte the server sends: a context manager, to be browsed at `url`."""

    def __init__(self, server_url: str) -> None:
        self._server = ("127.0.0.1", int(server_url.rpartition(":")[2]))
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.heard: list[bytes] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                browser, _ = self._listening.accept()
                server = socket.create_connection(self._server)
                threading.Thread(target=self._forward, args=(browser, server, False), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, browser, True), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, hear: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if hear:
                    self.heard.append(data)
                # Uncompressed, or there would be nothing to read.
                target.sendall(data if hear else data.replace(b"Accept-Encoding", b"X-Not-Supported"))
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
