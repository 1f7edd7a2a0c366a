# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Requests to one NBD server: in flight together, over connections that are made again when they break.

Every request runs in a task of its own, so that a caller who gives up does not cut a request off half-sent, and the
connection with it. While a change that was given up has no answer, nobody else reads or writes its range (file.py has
the same rule).
"""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import trio

from forebay.errors import ForebayError
from forebay.origin.addresses import NbdAddress
from forebay.origin.threads import Background, Lanes, bounded
from forebay_nbd.client.client import Client
from forebay_nbd.protocol.wire import Flag

log = logging.getLogger("forebay.origin")

T = TypeVar("T")

FOREGROUND_REQUESTS = 64
"""In flight at one server for what guests wait for: hides 1 ms of latency at 64 KiB up to 4 GB/s."""

BACKGROUND_REQUESTS = 8
"""In flight for write-back, and as many for preload and read-ahead: fills a gigabit link at some 50 ms of latency with
1 MiB requests."""

CONNECTIONS = 4
"""To a server that allows several. More than its threads for one disk are of no use."""

SPREAD = 8
"""Requests in flight on each connection before another one is opened."""

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between attempts to connect: at first, and at most, so that a server that is back is found soon."""

MORE_PAUSE = 60.0
"""Seconds before another further connection is tried, after one was refused."""


@dataclass(eq=False)
class _Link:
    """One connection, and how many requests are in flight on it."""

    client: Client
    in_flight: int = 0


@dataclass(eq=False)
class _Job:
    """One request, which a task of its own makes."""

    do: Callable[[Client], Awaitable[Any]]
    background: Background
    first: int
    last: int
    """The first byte that it touches, and the first one after it that it does not."""
    kind: Literal["ask", "change", "flush"]
    out: bool = False
    """True while it is with the server."""
    given_up: bool = False
    """True once nobody waits for it any more."""
    result: Any = None
    error: Exception | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Requests:
    """The requests of one image to its export."""

    def __init__(
        self,
        nursery: trio.Nursery,
        address: NbdAddress,
        label: str,
        client: Client,
        *,
        read_only: bool,
        timeout: Callable[[], float],
    ) -> None:
        """Take over a connected client; tasks run in `nursery`. `timeout` returns seconds, of a request."""
        self.sync_failures = 0
        """How many flushes so far ended without anybody knowing what they made durable."""
        self._timeout = timeout
        self.sector = client.negotiated.minimum_block
        """Bytes of the smallest unit that the server reads and writes."""
        self.flags = client.negotiated.flags
        """What the server said that it can do."""
        self._size = client.size
        self._read_only = read_only
        self._label = label
        self._nursery = nursery
        self._address = address
        self._links = [_Link(client)]
        self._lanes = Lanes(FOREGROUND_REQUESTS, BACKGROUND_REQUESTS)
        self._jobs: set[_Job] = set()
        self._connecting = trio.Lock()
        self._pause = FIRST_PAUSE
        self._adding = False
        """True while a further connection is being made."""
        self._closed = False
        self._written = 0
        """How many changes the server acknowledged."""
        self._flushed = 0
        """How many of them are durable, or are taken for lost."""
        self._failures_told = 0
        """Of how many `sync_failures` somebody was told by an error of `flush`."""

    async def flush(self) -> None:
        """Make durable every change that was acknowledged before. Raises OSError: make all of them again."""
        told, written = self._failures_told, self._written
        try:
            await self.ask(f"flushing {self._label}", lambda client: client.flush(), kind="flush")
        except OSError:
            self.sync_failures += 1
            self._failures_told = self.sync_failures
            raise
        if self.sync_failures != told:
            self._failures_told = self.sync_failures
            text = "the connection broke before a flush, its data may be lost"
            raise OSError(errno.EIO, f"{self._label}: {text}")
        self._flushed = max(self._flushed, written)

    async def close(self) -> None:
        """Disconnect from the server. Implies no flush."""
        self._closed = True
        links, self._links = self._links, []
        for link in links:
            await link.client.aclose()

    async def wait_for_range(self, first: int, last: int, *, alone: bool = False) -> None:
        """Wait for changes of the bytes from `first` to `last` (exclusive) that were given up.

        With `alone`, wait for all changes of them: one of part of a sector reads and writes all of that sector, and
        must not do so beside another one.
        """
        while under_way := [
            job
            for job in self._jobs
            if job.kind == "change"
            and (job.given_up or alone)
            and job.first < last
            and first < job.last
        ]:
            await under_way[0].ended.wait()

    async def ask(
        self,
        what: str,
        do: Callable[[Client], Awaitable[T]],
        offset: int = 0,
        length: int = 0,
        background: Background = False,
        *,
        kind: Literal["ask", "change", "flush"] = "ask",
    ) -> T:
        """Await `do` with a connected client, again on another connection if that one breaks. What `do` returns.

        `offset` and `length` say which bytes it touches, `what` names it in the error of a time-out. Raises OSError.
        Cancellation gives the request up; if it is with the server already, its answer is waited for in the background.
        """
        job = _Job(do, background, offset, offset + length, kind)
        with bounded(self._timeout(), what):
            await self.wait_for_range(
                job.first, job.last, alone=kind == "change" and self.sector > 1
            )
            self._jobs.add(job)
            self._nursery.start_soon(self._run, job)
            try:
                await job.ended.wait()
            finally:
                job.given_up = True
                if not job.out:
                    job.scope.cancel()
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result

    async def _run(self, job: _Job) -> None:
        """Make the request, in a task of its own. Raises nothing, whatever `do` raises: the nursery is everybody's."""
        try:
            with job.scope, self._lanes.queue(job.background) as place:
                async with place:
                    await self._until_answered(job)
            if job.scope.cancelled_caught:
                job.error = OSError(errno.ECANCELED, "given up")
        except Exception as error:  # noqa: BLE001
            job.error = error
        finally:
            if job.error is None and job.kind == "change":
                self._written += 1
            if job.error is not None and job.kind == "flush" and job.given_up:
                self.sync_failures += 1  # the server told nobody who still listens
            self._jobs.discard(job)
            job.ended.set()

    async def _until_answered(self, job: _Job) -> None:
        """Send the request until a connection lives long enough for its answer; once only if it was given up."""
        while True:
            link = await self._link()
            try:
                async with _counted(link, job):
                    job.result = await job.do(link.client)
                return
            except ConnectionError as error:
                self._lost(link, error)
                if job.given_up:
                    raise

    def _lost(self, link: _Link, error: Exception) -> None:
        """Note that a connection broke: what was written and not flushed may be lost, on whichever connection."""
        if link not in self._links:
            return
        self._links.remove(link)
        if not self._closed:
            log.warning("%s: the connection broke: %s", self._label, error)
        if self._written != self._flushed:
            self._flushed = self._written
            self.sync_failures += 1

    # --------------------------------------------------------------------------------------------- connections

    async def _link(self) -> _Link:
        """The connection with the fewest requests in flight; a new one when there is none. Raises OSError."""
        while not self._links:
            async with self._connecting:
                if not self._links:
                    await self._reconnect()
        link = min(self._links, key=lambda one: one.in_flight)
        if link.in_flight >= SPREAD and not self._adding and self._may_add(link.client):
            self._adding = True
            self._nursery.start_soon(self._add)
        return link

    def _may_add(self, client: Client) -> bool:
        """True if the server keeps several connections coherent, and there are fewer than are of use."""
        return len(self._links) < CONNECTIONS and bool(
            client.negotiated.flags & Flag.CAN_MULTI_CONN
        )

    async def _reconnect(self) -> None:
        """Connect, however long it takes. Raises OSError(ESTALE) if another image is there now."""
        while True:
            if self._closed:
                raise OSError(errno.EBADF, f"{self._label}: closed")
            try:
                self._links.append(_Link(await self._same_image()))
            except ForebayError as fault:
                raise OSError(errno.ESTALE, str(fault)) from fault
            except OSError as error:
                log.info("%s: not connected: %s", self._label, error)
                pause, self._pause = self._pause, min(LONGEST_PAUSE, 2 * self._pause)
                await trio.sleep(pause)
            else:
                self._pause = FIRST_PAUSE
                return

    async def _add(self) -> None:
        """Make one more connection, in the background: a server may leave it waiting. Raises nothing."""
        try:
            link = _Link(await self._same_image())
        except (OSError, ForebayError) as error:
            log.info("%s: no further connection: %s", self._label, error)
            await trio.sleep(MORE_PAUSE)
        except Exception:
            log.exception("%s: no further connection", self._label)
            await trio.sleep(MORE_PAUSE)
        else:
            self._links.append(link)
        finally:
            self._adding = False

    async def _same_image(self) -> Client:
        """A new connection to the same export. Raises OSError, and ForebayError if its size or access has changed."""
        client = await connect(self._nursery, self._address, self._timeout())
        if client.size != self._size or (client.read_only and not self._read_only) or self._closed:
            size = client.size
            await client.aclose()
            raise ForebayError(
                f"{self._label} has {size} bytes or another access now, and had {self._size}: "
                "detach the disk and attach it again"
            )
        return client


@contextlib.asynccontextmanager
async def _counted(link: _Link, job: _Job) -> AsyncIterator[None]:
    """Count the request as in flight on the connection while the body runs."""
    link.in_flight += 1
    job.out = True
    try:
        yield
    finally:
        link.in_flight -= 1
        job.out = False


async def connect(nursery: trio.Nursery, address: NbdAddress, timeout: float) -> Client:
    """A client, connected in one attempt of at most `timeout` seconds. Its tasks run in `nursery`. Raises OSError."""
    server = address.socket or (address.host, address.port)
    return await Client.connect(nursery, server, address.export, timeout=timeout)
