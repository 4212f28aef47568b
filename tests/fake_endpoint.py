"""A local OpenAI-compatible server that fails on order; the fixture `endpoint` starts one."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "sk-do-not-print-me"
Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Endpoint:
    """A server whose answers a test writes: an endpoint that can be had cannot be made to fail on order.

    `answer(request)` gives (status, JSON or bytes[, headers]); without one, it completes with the prompt and the seed.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: Answer = (200, {"object": "list", "data": [{"id": "almost", "object": "model"}]})
        self.answer: Callable[[dict[str, Any]], Answer] = completed
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self._send(*endpoint.models)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.requests.append(request)
                    endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                try:
                    self._send(*endpoint.answer(request))
                finally:
                    with endpoint.lock:
                        endpoint.at_once -= 1

            def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    for name, value in (headers or {}).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None: ...  # a client that gave up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completed(request: dict[str, Any], text: str | None = None, finish: str = "stop") -> Answer:
    text = f" {request['prompt']} {request['seed']}" if text is None else text
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return 200, {"id": "c", "object": "text_completion", "created": 0, "model": "almost", "choices": [choice]}


def failed(status: int, message: str = "no", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"error": {"message": message, "type": "error", "code": status}}, named
