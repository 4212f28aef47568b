"""A server that says exactly the bytes it is told, to test what an upstream may do that no HTTP library would."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

Parts = Callable[[dict[str, Any]], Iterator[bytes]]


@contextmanager
def raw_upstream(parts: Parts) -> Iterator[str]:
    """The address of a server that answers each chat with `parts(its body)`, and scores every text by its length."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError, StopIteration):
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(1 << 16) or next(iter(()))
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            while length and len(body) < int(length[1]):
                body += connection.recv(1 << 16) or next(iter(()))
            fields = json.loads(body) if body else {}
            if head.split()[1] == b"/classify":
                texts = fields.get("input") or [fields["messages"][-1]["content"]]
                rewards = [{"index": i, "probs": [float(len(text))]} for i, text in enumerate(texts)]
                connection.sendall(whole({"model": "lengths", "data": rewards}))
                return
            if head.split()[1] == b"/v1/models":
                connection.sendall(whole({"object": "list", "data": [{"id": "m"}]}))
                return
            for part in parts(fields):
                connection.sendall(part)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def whole(content: object, status: str = "200 OK") -> bytes:
    """A JSON answer; the connection closes after it."""
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
"""The head of a stream that ends with the connection."""


def completion(messages: Sequence[dict[str, Any]], reason: str = "stop") -> dict[str, Any]:
    """A chat completion with these messages as its choices."""
    choices = [{"index": i, "message": message, "finish_reason": reason} for i, message in enumerate(messages)]
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}


def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
    """One event of a stream."""
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    content = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(content).encode() + b"\n\n"
