"""A judge's endpoint that answers with the archived GPT-4 reviews, and misbehaves when it is told to.

Real HTTP on 127.0.0.1, a thread for each connection. It finds out which review is meant from the answers in the
prompt, keeps a log of every call, and can be started by itself, for a client in another process:

    python tests/almost_eval/judge/replay_server.py --data ../shared/data --latency 1 --at-once 20
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from almost_eval.judge.records import JudgeRequest
from almost_eval.types import Message

SECRET = "sk-distinctive-0123456789-do-not-print-me"
"""The key of tests that look for it afterwards."""


class Archived(NamedTuple):
    """One archived review with what was reviewed."""

    question: str
    answer_1: str
    answer_2: str
    review: str

    @property
    def prompt(self) -> str:
        """A prompt that shows both answers; any wording does."""
        return (
            f"[Question]\n{self.question}\n\n[Assistant 1]\n{self.answer_1}\n[End]\n\n"
            f"[Assistant 2]\n{self.answer_2}\n[End]\n\nScore both from 1 to 10 in the first line, then say why."
        )


def read_archive(data: Path) -> list[Archived]:
    """All archived reviews; `data` holds `vicuna/` and `hub/`."""
    table = data / "hub/github/lm-sys/FastChat/fastchat/eval/table/question.jsonl"
    questions = {line["question_id"]: line["text"] for line in _lines(table)}
    answers = {a["answer_id"]: a["text"] for f in (data / "vicuna/answer").glob("*.jsonl") for a in _lines(f)}
    return [
        Archived(questions[r["question_id"]], answers[r["answer1_id"]], answers[r["answer2_id"]], r["text"])
        for f in sorted((data / "vicuna/review").glob("*/*.jsonl"))
        for r in _lines(f)
    ]


def archive_beside(data_root: Path) -> list[Archived]:
    """For fixtures: the archive beside the hub's data, or a skip where it is absent."""
    import pytest

    if not (data_root.parent / "vicuna" / "review").is_dir():
        pytest.skip(f"no archived reviews at {data_root.parent / 'vicuna'}")
    return read_archive(data_root.parent)


def requests_for(archive: list[Archived], judge: str = "gpt-4") -> list[JudgeRequest]:
    """What a run sends for these."""
    system = Message("system", "You are a fair judge.")
    return [JudgeRequest(judge, (system, Message("user", one.prompt)), 0.2, 1024) for one in archive]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@dataclass
class Call:
    """One line of the server's log."""

    number: int
    """From 1, in the order of arrival."""
    digest: str
    """Of the messages: the same thing asked again has the same."""
    times: int
    """1 where it is the first time, 2 the second, ..."""
    body: dict[str, Any]
    key: str
    """What the client sent as its key."""
    began: float = field(default_factory=time.monotonic)
    outcome: str = ""
    """`replied` where a whole review was sent, else the fault; empty while it is being worked on."""


class Fault(NamedTuple):
    """What to do instead of a review."""

    kind: str
    """`status`, `body`, `cut`, `hang`, `drip`, `reset`, `die`, or a finish_reason to say under the review."""
    status: int = 500
    message: str = "no"
    code: str | None = None
    headers: dict[str, str] = {}  # noqa: RUF012  # never written to
    body: bytes = b""


class ReplayServer:
    """The server.

    Args:
        archive: what it answers from.
        latency: seconds a review takes.
        at_once: calls it works on at a time; any more get a 429.
        busy: what they get.
        keep: False to keep no log but the counts, for many calls.
        serves: names that it lists as its models; None is a server that has no list.
    """

    def __init__(
        self,
        archive: list[Archived],
        *,
        latency: float = 0.0,
        at_once: int = 10**6,
        busy: Fault = Fault("status", 429, "Rate limit reached"),  # noqa: B008  # a tuple
        port: int = 0,
        keep: bool = True,
        serves: list[str] | None = None,
    ) -> None:
        self.archive = archive
        self.latency = latency
        self.at_once = at_once
        self.busy = busy
        self.serves = serves
        self.fault: Callable[[Call], Fault | None] = lambda call: None
        self.log: list[Call] = []
        self.working = self.most_at_once = self.count = 0
        self._keep = keep
        self._lock = threading.Lock()
        self._times: dict[str, int] = {}
        self._connections: set[socket.socket] = set()
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop at once, as a process does that is killed: what is under way is cut off."""
        self._over.set()
        self._server.socket.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=self._server.shutdown, daemon=True).start()

    def outcomes(self) -> dict[str, int]:
        """How many calls ended in what."""
        with self._lock:
            counts: dict[str, int] = {}
            for call in self.log:
                counts[call.outcome] = counts.get(call.outcome, 0) + 1
            return counts

    def replies(self) -> int:
        """Whole reviews that were sent."""
        return self.outcomes().get("replied", 0)

    def review(self, prompt: str) -> str:
        """The archived review of the answers in this prompt."""
        shown = [one for one in self.archive if one.question in prompt] or self.archive
        longest = max(len(one.question) for one in shown)
        same = [one for one in shown if len(one.question) == longest]
        held = [[len(a) for a in (one.answer_1, one.answer_2) if a in prompt] for one in same]  # an answer may be empty
        return max(zip(held, same, strict=True), key=lambda pair: (len(pair[0]), sum(pair[0])))[1].review

    @contextmanager
    def _place(self) -> Iterator[bool]:
        """A place among `at_once`, if there is one."""
        with self._lock:
            free = self.working < self.at_once
            self.working += free
            self.most_at_once = max(self.most_at_once, self.working)
        try:
            yield free
        finally:
            with self._lock:
                self.working -= free

    def _take(self, body: dict[str, Any], key: str) -> Call:
        digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        with self._lock:
            self.count += 1
            self._times[digest] = self._times.get(digest, 0) + 1
            call = Call(self.count, digest, self._times[digest], body, key)
            if self._keep:
                self.log.append(call)
        return call

    def other(self, method: str, path: str, content_type: str, body: bytes, handler: Any) -> None:
        """Anything but a chat completion; a server with a batch API knows more."""
        if self.serves is not None and (method, path) == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model"} for name in self.serves]
            handler.send(200, json.dumps({"object": "list", "data": models}).encode())
            return
        handler.send(404, b'{"detail": "Not Found"}')

    def _answer(self, call: Call, handler: Any) -> None:
        with self._place() as free:
            fault = self.fault(call) if free else self.busy
            if fault is None or fault.kind in ("length", "content_filter", "cut"):
                self._over.wait(self.latency)
                finish = fault.kind if fault and fault.kind != "cut" else "stop"
                content = self._completion(call, finish)
                if fault and fault.kind == "cut":
                    handler.send(200, content, cut=True)
                else:
                    handler.send(200, content)
                call.outcome = fault.kind if fault else "replied"
                return
        call.outcome = fault.kind if free else "busy"
        self._misbehave(fault, handler)

    def _misbehave(self, fault: Fault, handler: Any) -> None:
        if fault.kind == "status":
            error = {"message": fault.message, "type": "error", "param": None, "code": fault.code}
            handler.send(fault.status, json.dumps({"error": error}).encode(), fault.headers)
        elif fault.kind == "body":
            handler.send(200, fault.body, fault.headers)
        else:
            if fault.kind == "hang":
                self._over.wait(60)
            elif fault.kind == "drip":
                handler.drip(self._over)
            elif fault.kind == "die":
                self.close()
            handler.close_connection = True  # not after a whole answer: the next request may be on its way already

    def _completion(self, call: Call, finish: str) -> bytes:
        prompt = "\n".join(message["content"] for message in call.body["messages"])
        text = self.review(prompt)
        if finish == "length":
            text = text[: len(text) // 2]
        message = {"role": "assistant", "content": "" if finish == "content_filter" else text}
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}  # no tokenizer here
        return json.dumps(
            {
                "id": f"chatcmpl-{call.number}",
                "object": "chat.completion",
                "created": 0,
                "model": "gpt-4-0314",
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": usage | {"total_tokens": sum(usage.values())},
            }
        ).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # a client that gave up or was killed


def _handler(server: ReplayServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None: ...

        def setup(self) -> None:
            super().setup()
            with server._lock:
                server._connections.add(self.connection)

        def finish(self) -> None:
            with server._lock:
                server._connections.discard(self.connection)
            super().finish()

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if not self.path.endswith("/chat/completions"):
                server.other("POST", self.path, self.headers.get("Content-Type", ""), content, self)
                return
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            server._answer(server._take(json.loads(content), key), self)

        def do_GET(self) -> None:
            server.other("GET", self.path, "", b"", self)

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.wfile.flush()
            self.close_connection = self.close_connection or cut

        def drip(self, over: threading.Event) -> None:
            """A byte every 50 ms: each read is quick, and the answer never ends."""
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not over.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()

    return Handler


def main() -> None:
    """Serve until the input ends; the address is the first line of the output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds vicuna/ and hub/")
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--retry-after", type=float, help="seconds, in the header of a 429; none by default")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    headers = {} if given.retry_after is None else {"Retry-After": f"{given.retry_after:g}"}
    server = ReplayServer(
        read_archive(given.data),
        latency=given.latency,
        at_once=given.at_once,
        busy=Fault("status", 429, "Rate limit reached", headers=headers),
        port=given.port,
        keep=False,
    )
    print(server.url, flush=True)
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    main()
