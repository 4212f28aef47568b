"""Who asks: a random number that the server gave this browser, and the address that it asks from.

The page's own session number is made by the page, so whoever wants another one takes another one. The cookie is made
and signed here; it says nothing about who it is. It is new after a restart of the server. What a visitor may ask is
counted by both, so that neither a new page nor a thrown-away cookie is a new allowance.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass

_YEAR_S = 31_536_000
_ID_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Asker:
    """One asker."""

    page: str
    """Session number that the page made; it says which answers belong to one page."""
    visitor: str
    """Random number of the browser, 32 hexadecimal digits; of those without the cookie, one for each address."""
    address: str
    """IPv4 address, or the first half of an IPv6 address, which is what one customer gets."""


class Visitors:
    """Makes and reads the cookie.

    Args:
        port: of the server; it is in the cookie's name, since all ports of a host share their cookies.
    """

    def __init__(self, port: int = 0) -> None:
        self.name = f"almost_visitor_{port}"
        self._secret = secrets.token_bytes(32)
        # Python's own reader of cookies takes seconds for one of 60 KB (CVE-2024-7592).
        self._cookie = re.compile(rf"(?:^|; ?){self.name}=([0-9a-f]{{{_ID_LENGTH}}})\.([0-9a-f]{{64}})(?:;|$)")

    def cookie(self) -> str:
        """A `Set-Cookie` for a browser that has none."""
        return f"{self.pair(secrets.token_hex(_ID_LENGTH // 2))}; Path=/; Max-Age={_YEAR_S}; HttpOnly; SameSite=Lax"

    def pair(self, number: str) -> str:
        """Name and value of the cookie with this number."""
        return f"{self.name}={number}.{self._signature(number)}"

    def number_in(self, cookies: str) -> str | None:
        """The number in a `Cookie` header; None where there is none that was made here."""
        match = self._cookie.search(cookies)
        if match is None:
            return None
        number, signature = match.groups()
        return number if hmac.compare_digest(signature, self._signature(number)) else None

    def asker(self, page: str | None, cookies: str, host: str | None) -> Asker:
        """Who asks, by the page's session number, its `Cookie` header and where the connection comes from."""
        address = network_of(host or "")
        nobody = hashlib.sha256(self._secret + address.encode()).hexdigest()[:_ID_LENGTH]
        return Asker(str(page), self.number_in(cookies) or nobody, address)

    def _signature(self, number: str) -> str:
        return hmac.new(self._secret, number.encode(), hashlib.sha256).hexdigest()


def network_of(host: str) -> str:
    """What is counted as one address: of IPv6 the first 64 bits."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
