"""A hub of Hugging Face on this machine, as far as an upload asks: it keeps what it is sent."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Any


class FakeHub:
    """Takes uploads to any repository by whoever has its token. A context manager; `url` is for `HF_ENDPOINT`."""

    def __init__(self, token: str) -> None:
        self.files: dict[str, bytes] = {}
        """`org/name/path` -> content."""
        self.made: list[dict[str, Any]] = []
        """What was asked for, of each repository that was made."""
        self.tokens: set[str] = set()
        """Every token that came."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                hub.tokens.add(sent)
                if sent != token:
                    self._answer({"error": f"Invalid credentials: {sent}"}, 401)
                    return
                self._answer(hub._answer(self.path, body))

            def _answer(self, value: object, status: int = 200) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.made.append(wanted)
            return {"url": f"{self.url}/{wanted.get('organization')}/{wanted['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        repository = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[f"{repository}/{entry['value']['path']}"] = content
            address = f"{self.url}/{repository}/commit/{'0' * 40}"
            return {"commitUrl": address, "commitOid": "0" * 40, "success": True}
        raise AssertionError(path)
