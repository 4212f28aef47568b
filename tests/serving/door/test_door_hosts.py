"""Names that a server answers to, and sites whose pages may ask it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from almost_eval.errors import InputError
from serving.door.hosts import HostGuard, checked_hosts
from serving.door.keys import KeyGuard


def status(
    headers: dict[str, str] | list[tuple[str, str]],
    *,
    host: str = "127.0.0.1",
    allowed: tuple[str, ...] = (),
    path: str = "/v1/models",
    arrived: str = "10.0.0.7",
    method: str = "GET",
) -> int:
    sent: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append(200)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            sent.append(message["status"])

    items = headers.items() if isinstance(headers, dict) else headers
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in items]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "server": (arrived, 8000)}
    asyncio.run(HostGuard(app, host, checked_hosts(allowed))(scope, None, send))  # type: ignore[arg-type]
    return sent[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("localhost.", 200),
        ("[::1]:8000", 200),
        ("evil.lan:8000", 403),
        ("127.0.0.1.evil.lan", 403),
        ("localhost.evil.lan", 403),
        ("evil.lan:8000@127.0.0.1", 403),
        ("127.0.0.1:8000:9", 403),
        ("127.0.0.1/evil.lan", 403),
        ("10.0.0.7:8000", 403),  # listened on is 127.0.0.1
        ("", 403),
        (" ", 403),
        (".", 403),
    ],
)
def test_names_of_this_machine_alone(name: str, expected: int) -> None:
    assert status({"Host": name}) == expected


def test_one_host_exactly() -> None:
    assert status([]) == 403
    assert status([("Host", "localhost"), ("Host", "evil.lan")]) == 403


def test_the_bound_host_and_where_that_is_everywhere_the_address_that_was_reached() -> None:
    assert status({"Host": "box.lan:80"}, host="box.lan") == 200
    for everywhere in ("0.0.0.0", "::", ""):
        assert status({"Host": "10.0.0.7:8000"}, host=everywhere) == 200
        assert status({"Host": "10.0.0.8:8000"}, host=everywhere) == 403
        assert status({"Host": "evil.lan"}, host=everywhere) == 403


def test_allowed_hosts() -> None:
    for name in ("chat.example.org", "chat.example.org:443", "CHAT.example.org.", "192.168.1.5:80", "[fe80::1]"):
        assert status({"Host": name}, allowed=("Chat.Example.org", "192.168.1.5", "[fe80::1]")) == 200
    assert status({"Host": "x.chat.example.org"}, allowed=("chat.example.org",)) == 403
    assert status({"Host": "evil.lan", "Origin": "null"}, allowed=("*",)) == 200


@pytest.mark.parametrize("name", ["http://a.b", "a.b:80", "a b", "", "a/b", "*.a.b", "a@b"])
def test_what_is_no_host_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match="without scheme, port and path"):
        checked_hosts([name])


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://127.0.0.1:8000", 200),
        ("HTTP://127.0.0.1:8000", 200),
        ("http://evil.lan", 403),
        ("http://127.0.0.1:8500", 403),  # another program of this machine
        ("http://127.0.0.1", 403),
        ("http://localhost:8000", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
        ("http://127.0.0.1:8000.evil.lan", 403),
        ("http://evil.lan/http://127.0.0.1:8000", 403),
        ("http://127.0.0.1:8000 http://evil.lan", 403),
    ],
)
def test_origins(origin: str, expected: int) -> None:
    assert status({"Host": "127.0.0.1:8000", "Origin": origin}, method="POST") == expected


def test_the_site_of_an_allowed_host_may_ask() -> None:
    headers = {"Host": "127.0.0.1:8000", "Origin": "https://chat.example.org"}
    assert status(headers) == 403
    assert status(headers, allowed=("chat.example.org",)) == 200


def test_a_browser_shows_its_answers_to_an_allowed_site_and_no_other() -> None:
    """Without these headers a browser keeps every answer from the page; its question beforehand carries no key."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    async def answer(request: Any) -> PlainTextResponse:
        return PlainTextResponse("yes", headers={"Access-Control-Allow-Origin": "*"})  # as vLLM's server does

    app = KeyGuard(Starlette(routes=[Route("/v1/models", answer, methods=["GET", "POST"])]), "k")
    client = TestClient(HostGuard(app, "127.0.0.1", ("chat.example.org",)), base_url="http://127.0.0.1:8000")
    site, key = {"Origin": "https://chat.example.org"}, {"Authorization": "Bearer k"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    before = client.options("/v1/models", headers=site | asks)
    assert (before.status_code, before.headers["access-control-allow-origin"]) == (204, site["Origin"])
    assert "authorization" in before.headers["access-control-allow-headers"]
    for headers, expected in ((site | key, 200), (site, 401)):
        shown = client.post("/v1/models", headers=headers)
        assert shown.status_code == expected
        assert shown.headers.get_list("access-control-allow-origin") == [site["Origin"]]
        assert shown.headers["vary"] == "Origin"
    for origin in ("https://evil.lan", "http://127.0.0.1:8500", "null"):
        refused = client.options("/v1/models", headers={"Origin": origin} | asks)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
    assert client.options("/v1/models", headers={"Origin": "http://127.0.0.1:8000"} | asks).status_code == 401
    assert client.options("/v1/models", headers=site).status_code == 401


def test_pages_of_other_sites_that_send_no_origin() -> None:
    """An image or a script has none; a link that somebody follows is let in."""
    here = {"Host": "127.0.0.1:8000"}
    assert status({**here, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}) == 403
    assert status({**here, "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}) == 403
    assert status({**here, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}) == 200
    assert status({**here, "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}) == 200
    assert status({**here, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}) == 200
    assert status({**here, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, method="POST") == 403


def test_health_is_told_under_every_name() -> None:
    assert status({"Host": "evil.lan"}, path="/health") == 200
    assert status({}, path="/health") == 200
