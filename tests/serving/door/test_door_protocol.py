"""Bounds on what a client sends, on a real server and raw connections."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serving.door.protocol import HEAD_BYTES, BoundedHttp, bound_uvicorn, bounded_config


class Hasty(BoundedHttp):
    """With short times."""

    head_s = 0.4
    body_s = 0.6


class Server:
    """A server in a thread; `left` counts bodies whose client did not stay."""

    def __init__(self, protocol: type[BoundedHttp] = BoundedHttp, **options: Any) -> None:
        self.left = 0
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = listening.getsockname()
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])])
        options = {"http": protocol, "timeout_graceful_shutdown": 1, "log_level": "critical", **options}
        self.server = uvicorn.Server(bounded_config(app, **options))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()

    async def _answer(self, request: Request) -> JSONResponse:
        try:
            return JSONResponse({"bytes": len(await request.body()), "client": request.client and request.client.host})
        except ClientDisconnect:
            self.left += 1
            raise

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)

    def ask(self, request: bytes) -> tuple[int, bytes]:
        with self.connect() as connection:
            return send(connection, request)


def send(connection: socket.socket, request: bytes) -> tuple[int, bytes]:
    """Status and everything that comes, after a request that may not be taken whole."""
    with suppress(OSError):
        connection.sendall(request)
    return receive(connection)


def receive(connection: socket.socket) -> tuple[int, bytes]:
    data = b""
    with suppress(OSError):
        while part := connection.recv(1 << 16):
            data += part
    return (int(data.split()[1]) if data else 0), data


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.should_exit = True
    server.thread.join(5)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    server = Server(Hasty)
    yield server
    server.server.should_exit = True
    server.thread.join(5)


GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        GET + b"A: " + b"a" * (HEAD_BYTES + 1),
        GET + b"a" * (HEAD_BYTES + 1),
        b"GET /" + b"a" * (HEAD_BYTES + 1),
        b"G" * (HEAD_BYTES + 1),
        GET + b"A: b\r\n" * (HEAD_BYTES // 6 + 1),
        GET + b"A: b\r\n c\r\n" * (HEAD_BYTES // 6 + 1),
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nT: " + b"a" * (2 * HEAD_BYTES),
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"T: b\r\n" * (HEAD_BYTES // 3),
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"e" * (2 * HEAD_BYTES),
    ],
    ids="value name url method many folded trailer trailers extension".split(),
)
def test_what_is_no_body_is_bounded(server: Server, request_: bytes) -> None:
    status, answer = server.ask(request_)
    assert status in (431, 400), answer[:200]  # 400 where the parser finds fault with it first
    if status == 431:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "headers_too_large"


def test_a_head_up_to_the_limit_is_read(server: Server) -> None:
    status, answer = server.ask((GET + b"A: ").ljust(HEAD_BYTES - 4, b"a") + b"\r\n\r\n")
    assert (status, b'"bytes":0' in answer) == (200, True)


@pytest.mark.alone("the slowest of many answers")
@pytest.mark.parametrize("offer", [b"Upgrade: h2c", b"upgrade:h2c ", b"UPGRADE: H2C"])
def test_an_offer_of_http_2_is_passed_over_and_the_body_read(server: Server, offer: bytes) -> None:
    """As Java's client makes it: its POST was answered as if it had no body."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\n"
    body = b"five!\r\nUpgrade: h2c\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head + offer + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        first = connection.recv(1 << 16)
        assert b'"bytes":%d' % len(body) in first
        status, second = send(connection, POST + b"Content-Length: 3\r\n\r\nabc")
        assert (status, b'"bytes":3' in second) == (200, True)


def test_a_header_without_an_end_costs_nobody_else_anything(server: Server) -> None:
    """Before, the server joined it to what was there at each read: 40 MB froze it for seconds."""
    sent = 0
    with server.connect() as attacker:
        attacker.settimeout(2)
        attacker.sendall(GET + b"A: ")
        began, slowest = time.monotonic(), 0.0
        try:
            while sent < 200 << 20 and time.monotonic() - began < 8:
                sent += attacker.send(b"a" * (1 << 20))
                asked = time.monotonic()
                assert server.ask(GET + b"\r\n")[0] == 200
                slowest = max(slowest, time.monotonic() - asked)
        except OSError:
            pass  # closed
        else:
            pytest.fail(f"the server took {sent} bytes of one header")
    assert slowest < 2.0


def test_large_bodies_and_many_requests_pass(server: Server) -> None:
    body = b"x" * (5 << 20)
    status, answer = server.ask(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert (status, b'"bytes":5242880' in answer) == (200, True)
    chunks = b"".join(b"%x\r\n" % 70_000 + b"y" * 70_000 + b"\r\n" for _ in range(20)) + b"0\r\nT: 1\r\n\r\n"
    status, answer = server.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert (status, b'"bytes":1400000' in answer) == (200, True)
    one_byte = b"1\r\nz\r\n" * 60_000 + b"0\r\n\r\n"  # more of chunk heads than of a body
    status, answer = server.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + one_byte)
    assert (status, b'"bytes":60000' in answer) == (200, True)
    kept = b"GET / HTTP/1.1\r\nHost: x\r\nA: %s\r\n\r\n" % (b"a" * 1000)
    _, answer = server.ask(kept * 150 + GET + b"\r\n")  # together over the limit, each below it
    assert answer.count(b"HTTP/1.1 200 OK") == 151


@pytest.mark.alone("a time-out of parts of a second")
def test_a_head_that_takes_too_long_is_closed(hasty: Server) -> None:
    with hasty.connect() as silent, hasty.connect() as slow:
        began = time.monotonic()
        slow.sendall(GET)
        for _ in range(3):  # each byte is no new allowance
            time.sleep(0.1)
            slow.sendall(b"A")
        status, answer = receive(slow)
        assert status == 408
        assert b"headers did not arrive" in answer
        assert receive(silent) == (0, b"")
        assert 0.3 < time.monotonic() - began < 4.0


def test_so_is_a_further_request_of_a_connection(hasty: Server) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HT")
        assert receive(connection)[0] == 408


def test_a_body_that_takes_too_long_is_closed_and_its_application_told(hasty: Server) -> None:
    for _ in range(2):
        with hasty.connect() as connection:
            connection.sendall(POST + b"Content-Length: 10\r\n\r\nabc")
            status, answer = receive(connection)
            assert (status, b"body did not arrive" in answer) == (408, True)
    ends = time.monotonic() + 5
    while hasty.left < 2:  # it is told after the client is
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_who_asks_is_not_what_a_header_says(server: Server) -> None:
    _, answer = server.ask(GET + b"X-Forwarded-For: 6.6.6.6\r\n\r\n")
    assert b'"client":"127.0.0.1"' in answer


def test_vllms_server_gets_these_bounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from uvicorn.config import HTTP_PROTOCOLS

    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    bound_uvicorn()
    config = uvicorn.Config(Starlette())
    config.load()
    assert config.http_protocol_class is BoundedHttp
