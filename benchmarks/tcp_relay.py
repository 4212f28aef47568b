"""Passes bytes between two ports and does nothing else: what any process between client and server costs at least.

python benchmarks/tcp_relay.py LISTEN_PORT SERVER_PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop


class Side(asyncio.Protocol):
    """One of two connections; what comes here is written there."""

    def __init__(self, other: Side | None = None) -> None:
        self.other = other
        self.transport: Any = None  # uvloop's are none of asyncio's classes
        self.early: list[bytes] = []
        """What came before the other connection stood."""

    def connection_made(self, transport: Any) -> None:
        """Remember it; of a client's, make the server's too."""
        self.transport = transport
        if self.other is None:
            self.task = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        transport, self.other = await loop.create_connection(lambda: Side(self), "127.0.0.1", int(sys.argv[2]))
        transport.write(b"".join(self.early))

    def data_received(self, data: bytes) -> None:
        """Write it to the other, or keep it until there is one."""
        if self.other is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        """End the other too."""
        if self.other is not None:
            self.other.transport.close()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Side, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
