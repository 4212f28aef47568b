"""Which names a server answers to, and which sites may ask it.

A page of any site can send requests to a server of the machine that it is shown on, and read the answers once its name
is made to point there (DNS rebinding). Two headers, which no page can set, tell: `Host` is the name that the browser
asked, `Origin` the site of the page. So only these names are answered: those of the loopback interface, the address
that is listened on (where it is every address: the one that the connection came in at), and those of `--allowed-host`.
An origin must be the server's own, or one of `--allowed-host`. To pages of the latter a browser shows an answer only
where the server says so (CORS), which is done here too.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from almost_eval.errors import InputError
from almost_eval.models.endpoints import LOOPBACK
from serving.door.keys import HEALTH
from serving.door.refusals import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"
_WILDCARDS = ("", "0.0.0.0", "::")
_NETLOC = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]?#]+))(?::\d{1,5})?")
_ORIGIN = re.compile(r"https?://(?P<netloc>[^\s/]+)", re.IGNORECASE)
_PREFLIGHT = (
    (b"access-control-allow-methods", b"*"),
    (b"access-control-allow-headers", b"authorization, content-type, x-api-key, *"),  # `*` alone is not the first one
    (b"access-control-max-age", b"600"),
)
_OTHER_SITES = (b"cross-site", b"same-site")


def checked_hosts(names: Iterable[str]) -> tuple[str, ...]:
    """Values of `--allowed-host`, in the form in which they are compared.

    Raises:
        InputError: one is no name and no address.
    """
    return tuple(name if name == ANY else _checked(name) for name in names)


def _checked(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        host = _name_of(name)
    if host is None or ":" in name or ANY in name:
        raise InputError(
            f"--allowed-host {name!r} is no host: give a name or an address without scheme, port and path, "
            "as in chat.example.org, or * for any"
        )
    return host


def _name_of(netloc: str) -> str | None:
    """The name in `name:port` or `[address]:port`, in lower case; None where it is neither."""
    match = _NETLOC.fullmatch(netloc)
    if match is None:
        return None
    return (match["v6"] or match["name"]).lower().removesuffix(".") or None


class HostGuard:
    """ASGI middleware: answers 403 to a request or websocket for another name, or from another site.

    `/health` is answered under every name: it says nothing, and load balancers ask for it by address.

    Args:
        app: what answers the others.
        host: the address that is listened on.
        allowed: names as `checked_hosts` returns them; `*` for any name and any site.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str] = ()) -> None:
        self.app = app
        self._everywhere = host in _WILDCARDS
        self._allowed = frozenset(allowed)
        own = () if self._everywhere else (host.lower().removesuffix("."),)
        self._hosts = frozenset((*LOOPBACK, *own, *self._allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in, or answer 403."""
        http = scope["type"] == "http"
        is_open = scope["path"] == HEALTH if http else scope["type"] != "websocket"
        if is_open or ANY in self._allowed:
            return await self.app(scope, receive, send)
        sent: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name in sent:
                sent[name].append(value.decode("latin-1"))
        host = sent[b"host"][0] if len(sent[b"host"]) == 1 else ""
        if not self._answers_to(host, scope):
            message = (
                f"this server does not answer to the host {host[:100]!r}; if that is its name, start it with "
                "--allowed-host and the name"
            )
            return await refuse(scope, receive, send, 403, message, "host_not_allowed")
        if not self._takes_from(sent[b"origin"], host, scope):
            message = (
                "this server takes no requests from pages of other sites; to allow one, start it with --allowed-host "
                "and that site's host"
            )
            return await refuse(scope, receive, send, 403, message, "origin_not_allowed")
        if http and sent[b"origin"] and not _is_own(sent[b"origin"][0], host):
            return await self._answer_site(sent[b"origin"][0].encode("latin-1"), scope, receive, send)
        return await self.app(scope, receive, send)

    async def _answer_site(self, origin: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a page of an allowed site. What its browser asks beforehand carries no key, so it is answered here."""
        shared = [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        asks_first = any(name == b"access-control-request-method" for name, _ in scope["headers"])
        if asks_first and scope["method"] == "OPTIONS":
            await send({"type": "http.response.start", "status": 204, "headers": [*shared, *_PREFLIGHT]})
            return await send({"type": "http.response.body", "body": b""})

        async def send_shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                # vLLM's own `*` beside it would be one too many for a browser.
                own = [item for item in message.get("headers", ()) if item[0] != b"access-control-allow-origin"]
                message = {**message, "headers": [*own, *shared]}
            await send(message)

        return await self.app(scope, receive, send_shared)

    def _answers_to(self, netloc: str, scope: Scope) -> bool:
        name = _name_of(netloc)
        if name is None or name in self._hosts:
            return name is not None
        # An address as a name cannot be rebound: whoever asks by it has it from the user, and not from a name server.
        arrived = (scope.get("server") or ("",))[0]
        return self._everywhere and name == str(arrived).lower()

    def _takes_from(self, origins: list[str], host: str, scope: Scope) -> bool:
        if not origins:
            # Images, scripts and forms of other sites send no origin; newer browsers say here where they come from.
            fetch = {name: value for name, value in scope["headers"] if name.startswith(b"sec-fetch-")}
            navigates = fetch.get(b"sec-fetch-mode") == b"navigate" and scope.get("method") in ("GET", "HEAD")
            return navigates or fetch.get(b"sec-fetch-site") not in _OTHER_SITES
        match = _ORIGIN.fullmatch(origins[0])
        if len(origins) > 1 or match is None:  # `null` is a page without a site: a file, or a frame in a sandbox
            return False
        return _is_own(origins[0], host) or _name_of(match["netloc"]) in self._allowed


def _is_own(origin: str, host: str) -> bool:
    """Whether a page is of the very server that it asks. Browsers leave out a port that is the scheme's own in both."""
    return origin.partition("://")[2].lower() == host.lower()
