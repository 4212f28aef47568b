"""OpenAI-compatible endpoints: address, key and SDK client. The one place for all three packages.

A key is read from `ALMOST_API_KEY`, else `OPENAI_API_KEY`; for OpenAI's own hosts in the other order, so that the key
of a server of one's own is not sent to OpenAI. A key is in no setting, log, result or error: what a server says passes
`hide_key` or `server_words` before it is shown or stored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit, urlunsplit

from almost_eval.errors import InputError

if TYPE_CHECKING:
    import httpx
    import openai

KEYS = ("ALMOST_API_KEY", "OPENAI_API_KEY")
"""Environment variables that a key is read from, the first that is set."""
BASE_URL = "OPENAI_BASE_URL"
"""Environment variable of the address where no flag names one."""
OPENAI = "https://api.openai.com/v1"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_NO_KEY = "none"
"""The SDK does not start without a key. A server that wants none ignores this one."""
_HIDDEN = "***"
_KEY_LIKE = re.compile(r"\bsk-[\w*.-]+")
_WORD = re.compile(r"\S+")
_SEVERAL = re.compile(r"\s|[;|]https?://", re.I)
"""Two addresses in one, by something else than a comma."""
_MAX_WORDS = 300
"""Characters of a server's message that are shown."""


@dataclass(frozen=True, slots=True)
class EndpointAddress:
    """Where an endpoint is, up to and including `/v1`."""

    url: str
    """As it was written; it may hold a user and a password."""

    @classmethod
    def parse(cls, url: str, option: str, example: str = "http://localhost:8000/v1") -> EndpointAddress:
        """Check an address; an error names the flag or argument `option`, and `example`, an address that would do.

        Raises:
            InputError: it is no http(s) address. It is not repeated, since it may be a key in the wrong place.
        """
        try:
            parts = urlsplit(url)
            well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and not _SEVERAL.search(url)
            _ = parts.port  # raises where it is no number
        except ValueError:
            well_formed = False
        if not well_formed:
            raise InputError(f"{option} is not an http(s) address; it must look like {example}")
        return cls(url)

    @classmethod
    def parse_all(cls, urls: str, option: str) -> tuple[EndpointAddress, ...]:
        """Check one address, or several by commas.

        Raises:
            InputError: see `parse`; or two are the same.
        """
        addresses = tuple(cls.parse(url.strip(), option) for url in urls.split(",") if url.strip())
        if not addresses:
            raise InputError(f"{option} is empty; it must look like http://localhost:8000/v1")
        for at, address in enumerate(addresses):
            if address.place in {one.place for one in addresses[:at]}:
                raise InputError(f"{option} names {address.shown} twice; give each endpoint once")
        return addresses

    @property
    def parts(self) -> SplitResult:
        """The address, taken apart."""
        return urlsplit(self.url)

    @property
    def place(self) -> tuple[str | int | None, ...]:
        """The same for all spellings of an address."""
        parts = self.parts
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return parts.scheme, parts.hostname, port, parts.path.rstrip("/"), parts.query

    @property
    def shown(self) -> str:
        """The address without user and password: for errors and specs."""
        parts = self.parts
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def has_user(self) -> bool:
        """Whether it holds a user or a password."""
        return "@" in self.parts.netloc

    @property
    def is_local(self) -> bool:
        """Whether it is of this machine."""
        return self.parts.hostname in LOOPBACK

    @property
    def is_openai(self) -> bool:
        """Whether the host is one of OpenAI's own."""
        host = self.parts.hostname or ""
        return host == "openai.com" or host.endswith(".openai.com")

    def beside(self, path: str) -> str:
        """The address of what lies beside `/v1`."""
        above = self.parts.path.rstrip("/").removesuffix("/v1")
        return urlunsplit(self.parts._replace(path=f"{above}{path}", query="", fragment=""))


# --- keys ---


def read_key(address: EndpointAddress) -> str | None:
    """The key of the environment for an endpoint, or None where none is set.

    Raises:
        InputError: it holds characters that no HTTP header can carry. It is not repeated.
    """
    for name in reversed(KEYS) if address.is_openai else KEYS:
        key = os.environ.get(name, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise InputError(f"{name} holds spaces or characters that no key has; set it again")
        if key:
            return key
    return None


def hide_key(text: str, key: str | None) -> str:
    """What a server sent, with the key that it was sent replaced by `***`."""
    return text.replace(key, _HIDDEN) if key else text


def server_words(text: str, key: str | None) -> str:
    """What a server said, fit to be shown: one line, no key and nothing that looks like one, 300 characters at most."""
    words: list[str] = []
    length = 0
    # Word by word, not by one pattern: a server's word may have megabytes, and must be gone through once.
    for match in _WORD.finditer(hide_key(text, key)):
        word = match[0]
        # Masked in part by the server, or all of it by us.
        words.append(_HIDDEN if _HIDDEN in word else _KEY_LIKE.sub(_HIDDEN, word))
        length += len(words[-1]) + 1
        if length > _MAX_WORDS:
            break
    return " ".join(words)[:_MAX_WORDS]


# --- clients ---


def sdk_client(
    address: EndpointAddress,
    key: str | None,
    *,
    retries: int,
    timeout: float,
    query: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> openai.OpenAI:
    """The SDK's client; see `async_sdk_client`. `retries` are of one request, `transport` replaces the SDK's own."""
    import openai

    client = None
    if transport is not None:
        import httpx

        client = httpx.Client(transport=transport, timeout=timeout, follow_redirects=True)
    return openai.OpenAI(
        http_client=client,  # type: ignore[arg-type]  # the SDK's own is of httpx2 from 3.5 on; it takes both
        base_url=address.url,
        api_key=key or _NO_KEY,
        max_retries=retries,
        timeout=timeout,
        default_query=dict(query or {}),
        default_headers=dict(headers or {}),
    )


def async_sdk_client(
    address: EndpointAddress,
    key: str | None,
    *,
    timeout: float,
    query: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> openai.AsyncOpenAI:
    """The SDK's client of an event loop, without retries of its own. Use as a context manager.

    Args:
        address: the endpoint.
        key: see `read_key`.
        timeout: seconds that one read of an answer may take.
        query: of every request, as Azure's `api-version`.
        headers: of every request, besides the SDK's own.
    """
    import openai

    return openai.AsyncOpenAI(
        base_url=address.url,
        api_key=key or _NO_KEY,
        max_retries=0,
        timeout=timeout,
        default_query=dict(query or {}),
        default_headers=dict(headers or {}),
    )
