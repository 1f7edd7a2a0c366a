# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One disk's NBD connection where the core has its requests: it comes back as `Link`'s does."""

import contextlib
import errno
import socket
import time
from typing import TYPE_CHECKING

import trio

from forebay.doors.fuse.link import CONNECT_SECONDS, Check, Lasting
from forebay_fast.loop import rest
from forebay_nbd import Negotiated, open_export

if TYPE_CHECKING:
    from forebay_fast import core

SEND_BYTES = 1 << 20
"""What the socket takes at once, if the system lets it: a write of the kernel is so large, and each part of it that has
to wait for room wakes both processes."""

DISCONNECT = bytes.fromhex("25609513 0000 0002") + bytes(20)
"""NBD_CMD_DISC."""


class Line:
    """A connection in transmission, whose socket the core reads and writes."""

    def __init__(self, sock: socket.socket, negotiated: Negotiated) -> None:
        self.sock = sock
        self.size, self.flags = negotiated.size, negotiated.flags
        self.read_only = negotiated.read_only

    async def aclose(self) -> None:
        """Say goodbye, if there is room for it, and close."""
        with contextlib.suppress(OSError):
            self.sock.send(DISCONNECT)
        self.sock.close()


class CoreLink(Lasting[Line]):
    """As `Link`, with the same promises, but requests come from the kernel: see `core.DiskConnection`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        path: str,
        export: str,
        *,
        wait: float,
        patience: float,
        requests: "core.DiskConnection",
        loop_wait: "core.Wait",
    ) -> None:
        """`requests` has those of all who have the disk open; they are served in `loop_wait`."""
        super().__init__(nursery, path, export, wait=wait, patience=patience)
        self.requests = requests
        self._loop_wait = loop_wait
        self._serving = trio.CancelScope()
        self._served = trio.Event()

    async def open(self, check: Check | None = None) -> None:
        """As `Lasting.open`."""
        await super().open(check)
        self._nursery.start_soon(self._serve)

    async def close(self) -> None:
        """As `Lasting.close`."""
        self._serving.cancel()
        with trio.CancelScope(shield=True):
            await self._served.wait()
        await super().close()

    async def _serve(self) -> None:
        """Have the core serve with one connection after the other."""
        try:
            with self._serving:
                line = await self._returned()
                while True:
                    self.requests.begin(line.sock.fileno(), line.flags)
                    await rest(self._loop_wait, self.requests)
                    self._answers = self.requests.answers
                    self._lost(line, ConnectionError(errno.ENOTCONN, self.requests.why))
                    line.sock.close()
                    line = await self._next()
        finally:
            self.requests.refuse(errno.EIO)
            self._served.set()

    async def _next(self) -> Line:
        """The next connection, however long it takes. When that is too long, requests get the error."""
        while True:
            try:
                return await self._returned()
            except OSError as fault:
                self.requests.refuse(fault.errno or errno.EIO)
                if self._stale is not None:
                    await trio.sleep_forever()
                await self._up.wait()

    async def _connect(self) -> Line:
        sock, negotiated, early = await open_export(
            self.path, self.export, structured=False, timeout=CONNECT_SECONDS
        )
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if early or negotiated.minimum_block > 1:
            sock.close()
            raise ConnectionError(errno.EPROTO, f"{self.path}: this is no disk of Forebay")
        return Line(sock, negotiated)

    def _silent(self) -> float:
        return time.monotonic() - self.requests.heard if self.requests.owed else 0.0

    async def _give_up(self, line: Line, why: str) -> None:
        self.requests.give_up(why)
        line.sock.shutdown(socket.SHUT_RDWR)  # which wakes `_serve`
