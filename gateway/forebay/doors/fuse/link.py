# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One disk's NBD connection as the mount needs it: back when the daemon is, and no request waits for ever."""

import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import trio

from forebay_nbd import Buffer, Client

log = logging.getLogger("forebay.fuse")

CONNECT_SECONDS = 5.0
"""A daemon that runs lets us in at once."""

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
"""Seconds between two attempts to reconnect: systemd starts a daemon that crashed within 200 ms."""

T = TypeVar("T")


class Connected(Protocol):
    """A connection in transmission."""

    size: int
    read_only: bool

    async def aclose(self) -> None:
        """End it. Raises nothing."""


C = TypeVar("C", bound=Connected)
Check = Callable[[Connected], Awaitable[str | None]]


class Lasting(ABC, Generic[C]):
    """A connection to the NBD socket `path` that comes back when the daemon does.

    While the daemon is away a request waits for it, for `wait` seconds counted from when the daemon was first missed;
    then it fails with EIO, and so does every other until the daemon is back. Requests that were not answered are
    repeated with the next connection, which is harmless because reads, writes and flushes of a disk can be. A daemon
    that answers nothing at all for `patience` seconds while it owes answers counts as away, and so does one that lets
    us in and hangs up before it has answered anything. What came back as another disk is ESTALE.
    """

    def __init__(
        self, nursery: trio.Nursery, path: str, export: str, *, wait: float, patience: float
    ) -> None:
        """`nursery` is for the tasks that receive, watch and reconnect. `wait` and `patience` in seconds."""
        self.path = path
        self.export = export
        self.size = 0
        self.read_only = True
        self._nursery = nursery
        self._wait = wait
        self._patience = patience
        self._check: Check | None = None
        self._client: C | None = None
        self._up = trio.Event()
        """Set while there is a connection, and when there will be none again."""
        self._missed_at = 0.0
        """Trio time since when the daemon is away: a connection that ends at once without an answer is none."""
        self._pause = 0.0
        """Seconds until the next attempt to connect."""
        self._stale: str | None = None
        """Why it is not the same disk any more: every request fails with that."""
        self._answers = 0
        """Of all connections."""
        self._connected_at, self._answers_before = 0.0, -1
        """Trio time of the last connection, and how many answers there were by then."""
        self._watching = trio.CancelScope()
        self._reconnecting = trio.CancelScope()

    async def open(self, check: Check | None = None) -> None:
        """Connect. Raises OSError.

        `check` is asked after each reconnection, and returns why this is not the same disk any more, or None.
        """
        client = await self._connect()
        self._client = client
        self.size, self.read_only = client.size, client.read_only
        self._check = check
        self._nursery.start_soon(self._watch)

    async def close(self) -> None:
        """End the connection. Requests in flight, of which there should be none, fail."""
        self._watching.cancel()
        self._reconnecting.cancel()
        self._stale = self._stale or f"{self.export}: closed"
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    # ------------------------------------------------------------------------------------------ away and back again

    async def _returned(self) -> C:
        """The next connection. Raises OSError when the daemon has been away for too long."""
        left = self._missed_at + self._wait - trio.current_time()
        if self._stale is None and left > 0:
            with trio.move_on_after(left):
                await self._up.wait()
        if self._stale is not None:
            raise OSError(errno.ESTALE, self._stale)
        if self._client is None:
            raise OSError(errno.EIO, f"{self.export}: the daemon is away")
        return self._client

    def _lost(self, client: C, fault: OSError) -> None:
        """Note that a connection is of no use any more, and begin to reconnect."""
        if client is not self._client:
            return
        log.warning("%s: %s; reconnecting", self.export, fault.strerror or fault)
        self._client = None
        self._up = trio.Event()
        now = trio.current_time()
        if self._answers != self._answers_before or now - self._connected_at > self._wait:
            self._missed_at, self._pause = now, 0.0
        self._nursery.start_soon(self._reconnect)

    async def _reconnect(self) -> None:
        """Connect again, however long it takes, unless another disk has come in the place of this one."""
        with trio.CancelScope() as self._reconnecting:
            while self._client is None and self._stale is None:
                await trio.sleep(self._pause)
                self._pause = min(max(FIRST_PAUSE, 2 * self._pause), LONGEST_PAUSE)
                try:
                    client = await self._connect()
                    self._stale = await self._different(client)
                except OSError:
                    continue
                if self._stale is None:
                    self._client = client
                    self._connected_at, self._answers_before = trio.current_time(), self._answers
                    log.warning("%s: the daemon is back", self.export)
                else:
                    log.error("%s", self._stale)
                    await client.aclose()
            self._up.set()

    @abstractmethod
    async def _connect(self) -> C:
        """A new connection. Raises OSError."""

    @abstractmethod
    def _silent(self) -> float:
        """For how many seconds answers have been owed, and none has come."""

    @abstractmethod
    async def _give_up(self, client: C, why: str) -> None:
        """Have the next one come in the place of this connection, which is up and of no use."""

    async def _different(self, client: C) -> str | None:
        """Why this is another disk than the one that was opened; None if it is the same. Raises OSError."""
        if (client.size, client.read_only) != (self.size, self.read_only):
            return f"{self.export}: came back with another size or access: open it again"
        return await self._check(client) if self._check else None

    async def _watch(self) -> None:
        """Give up a connection that takes requests and answers none for `patience` seconds."""
        with self._watching:
            while True:
                await trio.sleep(self._patience / 4)
                client, silent = self._client, self._silent()
                if client is not None and silent > self._patience:
                    await self._give_up(client, f"silent for {silent:.0f} s")


class Link(Lasting[Client]):
    """The requests of a disk's users, on a connection that comes back. Offsets and lengths are bytes.

    Every request raises OSError.
    """

    def __init__(
        self, nursery: trio.Nursery, path: str, export: str, *, wait: float, patience: float
    ) -> None:
        super().__init__(nursery, path, export, wait=wait, patience=patience)
        self._owed = 0
        """Requests without an answer."""
        self._heard_at = 0.0
        """Trio time of the last answer, or of the first request after a rest."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """`length` bytes from `offset` on."""
        return await self._ask(lambda client: client.pread(offset, length))

    async def pread_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with what lies from `offset` on. When cancelled, its memory is not to be used again."""
        await self._ask(lambda client: client.pread_into(offset, view))

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`. The daemon has it when this returns: it survives the end of both processes."""
        await self._ask(lambda client: client.pwrite(offset, data))

    async def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""
        await self._ask(lambda client: client.zero(offset, length))

    async def flush(self) -> None:
        """Have what was written survive a power cut: NBD FLUSH."""
        await self._ask(lambda client: client.flush())

    async def _ask(self, request: Callable[[Client], Awaitable[T]]) -> T:
        """What the request returns, made again with the next connection as often as one breaks. Raises OSError."""
        while True:
            client = self._client or await self._returned()
            if not self._owed:
                self._heard_at = trio.current_time()
            self._owed += 1
            try:
                answer = await request(client)
                self._answers += 1
                return answer
            except ConnectionError as fault:
                self._lost(client, fault)
            finally:
                self._owed -= 1
                self._heard_at = trio.current_time()

    async def _connect(self) -> Client:
        return await Client.connect(
            self._nursery, self.path, self.export, contexts=(), timeout=CONNECT_SECONDS
        )

    def _silent(self) -> float:
        return trio.current_time() - self._heard_at if self._owed else 0.0

    async def _give_up(self, client: Client, why: str) -> None:
        self._lost(client, TimeoutError(errno.ETIMEDOUT, why))
        await client.aclose()
