"""A judge's endpoint with a batch API, over real HTTP: files, `/batches`, an invoice, and faults at every step.

As OpenAI's: https://developers.openai.com/api/docs/guides/batch. A batch is worked on when it has been looked at
`polls` times; whatever was worked on is billed then, whether its line reaches the client or not.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from email.parser import BytesParser
from typing import Any
from urllib.parse import parse_qs, urlsplit

from replay_server import Call, ReplayServer

PRICE = (1.0, 5.0, 0.5)
"""USD per million tokens in and out, and the share that a batch costs."""

Event = tuple[str, str]
"""A call (`list`, `upload`, `create`, `retrieve`, `content`, `chat`), and `before` it is worked on, `worked`, or when
the answer is `sent`."""


def cost(usage: dict[str, int], share: float = 1.0) -> float:
    """What the provider bills."""
    return (usage["prompt_tokens"] * PRICE[0] + usage["completion_tokens"] * PRICE[1]) * share / 1e6


class BatchServer(ReplayServer):
    """The server. `fate` decides each request of a batch: None is a reply.

    Fates: `expired`, `error` (no answer, and not billed), `status N` (an answer with that status, not billed),
    `missing` (billed, and no line), `malformed` (billed, and a line that breaks off), `empty` (billed, no text),
    `double` (its line stands twice), `refused NAME` (400: it does not take that parameter).
    """

    def __init__(self, *, polls: int = 1) -> None:
        super().__init__([])
        self.polls = polls
        self.review = lambda prompt: "8 6\nThe first is better." if len(prompt) % 2 else "7 7\nEqual."  # type: ignore[method-assign]
        self.fate: Callable[[str, int, dict[str, Any]], str | None] = lambda custom_id, times, body: None
        self.event: Callable[[Event], None] = lambda event: None
        self.on_create: Callable[[int], str | None] = lambda n: None
        """Of the n-th order: `lost` creates the batch and answers 500, `500` creates none, `reset` breaks off after."""
        self.ends: Callable[[int], str] = lambda n: "completed"
        """Of the n-th batch."""
        self.errors: list[dict[str, Any]] = []
        """Of a batch that fails."""
        self.strange_lines: list[bytes] = []
        """Put into every output file."""
        self.cut_content = 0
        """Downloads that break off midway before one comes whole."""
        self.has_list = True
        self.hidden = 0
        """Calls for the content of a file, or for a batch, that find nothing before one does."""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.orders = 0
        self.worked: Counter[str] = Counter()
        """custom_id -> how often it was worked on."""
        self.seen: Counter[str] = Counter()
        """custom_id -> in how many batches that ended it was."""
        self.bill = 0.0
        """USD, of batches; `invoice` is all."""
        self.calls: Counter[str] = Counter()

    @property
    def invoice(self) -> float:
        """USD that the provider bills for everything."""
        return self.bill + sum(self.chat_bills)

    @property
    def chat_bills(self) -> list[float]:
        """USD of each chat completion that was sent whole."""
        return [
            cost(json.loads(self._completion(call, "stop"))["usage"]) for call in self.log if call.outcome == "replied"
        ]

    def other(self, method: str, path: str, content_type: str, body: bytes, handler: Any) -> None:
        """Everything but chat."""
        parts = urlsplit(path)
        steps = parts.path.removeprefix("/v1/").split("/")
        match (method, *steps):
            case ("GET", "batches"):
                self._do("list", handler, lambda: self._list(parse_qs(parts.query)))
            case ("GET", "batches", name):
                self._do("retrieve", handler, lambda: self._retrieve(name))
            case ("POST", "files"):
                self._do("upload", handler, lambda: self._upload(content_type, body))
            case ("POST", "batches"):
                self._do("create", handler, lambda: self._create(json.loads(body), handler))
            case ("GET", "files", name, "content"):
                self._do("content", handler, lambda: self._content(name, handler))
            case _:
                handler.send(404, b'{"error": {"message": "no such path"}}')

    def _answer(self, call: Call, handler: Any) -> None:
        self.event(("chat", "before"))
        super()._answer(call, handler)
        self.event(("chat", "sent"))

    def _do(self, name: str, handler: Any, work: Callable[[], tuple[int, Any] | None]) -> None:
        with self._lock:
            self.calls[name] += 1
        self.event((name, "before"))
        answer = work()
        self.event((name, "worked"))
        if answer is not None:
            status, body = answer
            handler.send(status, body if isinstance(body, bytes) else json.dumps(body).encode())
        self.event((name, "sent"))

    def _list(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        if not self.has_list:
            return 404, {"detail": "Not Found"}
        rows = sorted(self.batches.values(), key=lambda batch: -batch["number"])
        names = [row["id"] for row in rows]
        begin = names.index(query["after"][0]) + 1 if "after" in query else 0
        limit = int(query.get("limit", ["20"])[0])
        page = [self._shown(row) for row in rows[begin : begin + limit]]
        return 200, {"object": "list", "data": page, "has_more": begin + limit < len(rows)}

    def _upload(self, content_type: str, body: bytes) -> tuple[int, Any]:
        message = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
        fields = {p.get_param("name", header="content-disposition"): p for p in message.get_payload()}  # type: ignore[union-attr]
        assert fields["purpose"].get_payload() == "batch"  # type: ignore[union-attr]
        name = f"file-{len(self.files)}"
        self.files[name] = fields["file"].get_payload(decode=True)  # type: ignore[assignment,union-attr]
        return 200, {"id": name, "object": "file", "purpose": "batch"}

    def _create(self, body: dict[str, Any], handler: Any) -> tuple[int, Any] | None:
        self.orders += 1
        how = self.on_create(self.orders)
        if how == "500":
            return 500, {"error": {"message": "try later"}}
        if how == "no file":
            return 400, {"error": {"message": "Cannot find file, or you do not have access to it."}}
        assert body["endpoint"] == "/v1/chat/completions"
        assert body["completion_window"] == "24h"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        assert {(line["method"], line["url"]) for line in lines} == {("POST", body["endpoint"])}
        name = f"batch_{len(self.batches)}"
        self.batches[name] = body | {
            "id": name,
            "object": "batch",
            "number": len(self.batches),
            "created_at": int(time.time()),
            "status": "validating",
            "lines": lines,
            "looks": 0,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
        }
        if how == "lost":
            return 500, {"error": {"message": "a gateway's timeout"}}
        if how == "reset":
            handler.close_connection = True
            return None
        return 200, self._shown(self.batches[name])

    @staticmethod
    def _shown(batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in batch.items() if key not in ("lines", "looks", "number")}

    def _retrieve(self, name: str) -> tuple[int, Any]:
        batch = self.batches.get(name)
        if batch is None or self._hides():
            return 404, {"error": {"message": "No such batch"}}
        with self._lock:
            batch["looks"] += 1
            if batch["looks"] > self.polls and batch["status"] in ("validating", "in_progress", "brewing"):
                self._work(batch)
            elif batch["status"] == "validating":
                batch["status"] = "brewing" if self.ends(batch["number"]) == "unknown first" else "in_progress"
        return 200, self._shown(batch)

    def work_off(self) -> None:
        """Work on, and bill, what nobody has looked at: an order that its client has forgotten is one all the same."""
        with self._lock:
            for batch in self.batches.values():
                if batch["status"] in ("validating", "in_progress", "brewing"):
                    self._work(batch)

    def _work(self, batch: dict[str, Any]) -> None:
        end = self.ends(batch["number"])
        batch["status"] = "completed" if end == "unknown first" else end
        if end == "failed":
            batch["errors"] = {"object": "list", "data": self.errors}
            return
        outputs, errors = [*self.strange_lines], []
        for line in reversed(batch["lines"]):  # in any order
            digest = line["custom_id"]
            self.seen[digest] += 1
            fate = self.fate(digest, self.seen[digest], line["body"]) or ""
            head = {"id": f"batch_req_{digest[:6]}", "custom_id": digest}
            if fate in ("expired", "error") or fate.startswith("says"):
                code = "batch_expired" if fate == "expired" else "server_error"
                errors.append(head | {"response": None, "error": {"code": code, "message": f"it is {fate}"}})
                continue
            if fate.startswith(("status", "refused")):
                _, _, what = fate.partition(" ")
                status = int(what) if fate.startswith("status") else 400
                words = "no" if fate.startswith("status") else f"Unsupported parameter: '{what}'"
                response = {"status_code": status, "request_id": "r", "body": {"error": {"message": words}}}
                errors.append(head | {"response": response, "error": None})
                continue
            call = Call(0, digest, 1, line["body"], "")
            body = json.loads(self._completion(call, "stop"))
            if fate == "empty":
                body["choices"][0]["message"]["content"] = ""
            self.worked[digest] += 1
            self.bill += cost(body["usage"], PRICE[2])
            batch["request_counts"]["completed"] += 1
            whole = json.dumps(
                head | {"response": {"status_code": 200, "request_id": "r", "body": body}, "error": None}
            ).encode()
            if fate == "malformed":
                whole = whole[: len(whole) // 2]
            if fate != "missing":
                outputs += [whole] * (2 if fate == "double" else 1)
        batch["request_counts"]["failed"] = len(errors)
        for name, lines in (("output", outputs), ("error", [json.dumps(row).encode() for row in errors])):
            if lines:
                file = f"file-{name}-{batch['number']}"
                self.files[file] = b"".join(line + b"\n" for line in lines)
                batch[f"{name}_file_id"] = file

    def _hides(self) -> bool:
        self.hidden -= self.hidden > 0
        return self.hidden > 0

    def _content(self, name: str, handler: Any) -> tuple[int, Any] | None:
        if name not in self.files or self._hides():
            return 404, {"error": {"message": "No such File object"}}
        if self.cut_content:
            self.cut_content -= 1
            handler.send(200, self.files[name], cut=True)
            return None
        return 200, self.files[name]
