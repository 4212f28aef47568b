"""The gateway's HTTP client against servers that say exactly which bytes, in which pieces."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.gateway import http_client
from serving.gateway.http_client import BrokenOff, HttpClient, HttpResponse, Unreachable
from serving.launch.process import free_port

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]
WHOLE = b'HTTP/1.1 200 OK\r\nContent-Type: text/x\r\nALMOST-Note: a\r\nContent-Length: 4\r\n\r\n{"a"'


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """The gateway's loop is uvloop's where there is one."""
    found: Run = request.param
    return found


class Server:
    """Answers every request by the script; knows what it was sent."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                await self.script(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def served(script: Script, tls: ssl.SSLContext | None = None, connections: int = 0) -> AsyncIterator[_Pair]:
    server = Server(script)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    port = listening.sockets[0].getsockname()[1]
    client = HttpClient(f"http{'s' if tls else ''}://127.0.0.1:{port}/a b%20é", [("A-Key", "é")], connections)
    try:
        yield server, client
    finally:
        client.close()
        listening.close()


_Pair = tuple[Server, HttpClient]


def says(*pieces: bytes, close: bool = False) -> Script:
    """Writes these, with a moment between two so that they arrive apart."""

    async def script(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.002)
        if close:
            writer.close()

    return script


async def ask(client: HttpClient, body: bytes = b"{}") -> tuple[HttpResponse, bytes]:
    async with client.request("POST", "/v1/x", body) as answer:
        return answer, await answer.read()


def test_what_is_sent_and_what_comes_back(run: Run) -> None:
    async def check() -> None:
        async with served(says(WHOLE)) as (server, client):
            for body in (b"{}", b"\xff" * 300_000):
                answer, whole = await ask(client, body)
                assert (answer.status, whole) == (200, b'{"a"')
                assert answer.header(b"almost-note") == b"a"
                assert answer.header(b"nothing") == b""
            host = f"127.0.0.1:{client._port}".encode()
            head = b"POST /a%20b%20%C3%A9/v1/x HTTP/1.1\r\nHost: " + host + "\r\nA-Key: é\r\n".encode()
            assert server.requests[0] == head + b"Content-Length: 2\r\n\r\n{}"
            assert server.requests[1].endswith(b"\r\n\r\n" + b"\xff" * 300_000)
            assert server.connections == 1

    run(check())


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n9\r\n, \r\nworld\r\n0\r\nTrailer: x\r\n\r\n"
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(1, len(CHUNKED) - 1), max_size=12, unique=True))
def test_chunks_cut_anywhere(run: Run, cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(CHUNKED)]

    async def check() -> None:
        async with served(says(*(CHUNKED[a:b] for a, b in pairwise(at)))) as (server, client):
            for _ in range(2):
                answer, whole = await ask(client)
                assert whole == b"hello, \r\nworld"
                assert answer.headers == [(b"content-type", b"text/event-stream"), (b"transfer-encoding", b"chunked")]
            assert server.connections == 1

    run(check())


def test_a_part_is_there_as_soon_as_it_has_come(run: Run) -> None:
    async def check() -> None:
        more = asyncio.Event()

        async def script(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
            await more.wait()
            writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

        async with served(script) as (_, client), client.request("GET", "/") as answer:
            seen = []
            async for part in answer.parts():
                seen.append(part)
                more.set()
            assert seen == [b"one", b"two"]

    run(check())


@pytest.mark.parametrize(
    ("pieces", "reused"),
    [
        ((WHOLE,), True),
        ((WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),), False),
        ((b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nabcd",), False),
        ((WHOLE + b"HTTP/1.1 200 OK\r\n",), False),  # more than was asked for
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), True),
    ],
)
def test_a_connection_is_used_again_where_it_may_be(run: Run, pieces: tuple[bytes, ...], reused: bool) -> None:
    async def check() -> None:
        async with served(says(*pieces)) as (server, client):
            for _ in range(3):
                await ask(client)
                await asyncio.sleep(0.01)
            assert server.connections == (1 if reused else 3)

    run(check())


def test_what_nobody_asked_for_closes_the_connection(run: Run) -> None:
    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await asyncio.sleep(0.02)
        writer.write(WHOLE.replace(b'{"a"', b"evil"))

    async def check() -> None:
        async with served(script) as (server, client):
            for number in (1, 2):
                assert (await ask(client))[1] == b'{"a"'
                await asyncio.sleep(0.05)
                assert server.connections == number

    run(check())


def test_a_body_without_a_length_ends_with_the_connection(run: Run) -> None:
    async def check() -> None:
        async with served(says(b"HTTP/1.1 200 OK\r\n\r\nab", b"cd", close=True)) as (_, client):
            assert (await ask(client))[1] == b"abcd"

    run(check())


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "closed"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "closed"),
        (WHOLE[:-1], "closed"),
        (CHUNKED[:-2], "closed"),
        (b"SSH-2.0-x\r\n\r\n", "HttpParser"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n", "HttpParser"),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "Http"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000, "headers of more than"),
    ],
)
def test_what_breaks_off_is_an_error_that_says_why(run: Run, said: bytes, why: str) -> None:
    async def check() -> None:
        async with served(says(said, close=True)) as (server, client):
            with pytest.raises(BrokenOff, match=why):
                await ask(client)
            assert not client._idle
            server.script = says(WHOLE)
            assert (await ask(client))[1] == b'{"a"'

    run(asyncio.wait_for(check(), 10))


def test_a_server_that_hangs_up_at_once(run: Run) -> None:
    async def check() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()

        listening = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with listening:
            client = HttpClient(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", [])
            ends = await asyncio.gather(*(ask(client) for _ in range(200)), return_exceptions=True)
        assert {type(end) for end in ends} <= {BrokenOff, Unreachable}

    run(asyncio.wait_for(check(), 10))


def test_who_leaves_closes_the_connection(run: Run) -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE[:-1])
        await asyncio.sleep(10)

    async def check() -> None:
        async with served(hang) as (server, client):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await ask(client)
            async with client.request("GET", "/") as answer:
                assert answer.status == 200
            await asyncio.sleep(0.02)
            assert not client._idle
            assert server.connections == 2

    run(check())


def test_an_idle_connection_is_closed_before_the_server_would(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert http_client._IDLE_S < 5  # uvicorn's
    monkeypatch.setattr(http_client, "_IDLE_S", 1.0)

    async def check() -> None:
        async with served(says(WHOLE)) as (server, client):
            await asyncio.gather(*(ask(client) for _ in range(5)))
            assert server.open == 5
            await asyncio.sleep(0.6)
            await ask(client)
            await asyncio.sleep(0.6)
            assert (server.open, len(client._idle)) == (1, 1)  # the one that was used again
            await asyncio.sleep(0.6)
            assert (server.open, len(client._idle), client._sweeper) == (0, 0, None)

    run(check())


def test_a_slow_reader_lets_the_server_wait(run: Run) -> None:
    total = 64 << 20
    sent = 0

    async def script(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(bytes(1 << 16))
            sent += 1 << 16
            await writer.drain()

    async def check() -> None:
        async with served(script) as (_, client), client.request("GET", "/") as answer:
            await asyncio.sleep(0.5)
            assert sent < 16 << 20  # what the sockets' buffers take, and a little
            assert sum([len(part) async for part in answer.parts()]) == total

    run(check())


def test_what_was_not_read_is_not_taken_for_the_next_answer(run: Run) -> None:
    async def check() -> None:
        large = b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + bytes(400_000)
        async with served(says(large)) as (server, client):
            async with client.request("GET", "/") as answer:
                while not answer.ended:
                    await asyncio.sleep(0.001)
            server.script = says(WHOLE)
            assert (await ask(client))[1] == b'{"a"'

    run(asyncio.wait_for(check(), 10))


def test_no_more_requests_at_a_time_than_allowed(run: Run) -> None:
    most = 0

    async def check() -> None:
        async def script(writer: asyncio.StreamWriter) -> None:
            nonlocal most
            most = max(most, server.open)
            await asyncio.sleep(0.01)
            writer.write(WHOLE)

        async with served(script, connections=3) as (server, client):
            await asyncio.gather(*(ask(client) for _ in range(12)))
        assert (most, len(server.requests)) == (3, 12)

    run(check())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_no_connection_to_be_made(run: Run, host: str) -> None:
    with pytest.raises(Unreachable):
        run(ask(HttpClient(f"http://{host}:{free_port()}", [])))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="a certificate is made by openssl, which is not installed")
def test_tls_is_checked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def check() -> bytes:
        async with served(says(WHOLE), context) as (_, client):
            return (await ask(client))[1]

    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        run(check())
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert run(check()) == b'{"a"'
