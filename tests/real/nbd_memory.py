# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An export in memory, and our server on a Unix socket in the test's own loop."""

import contextlib
import errno
import mmap
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from forebay_nbd import (
    Budgets,
    Buffer,
    Connection,
    Export,
    Exports,
    KnownExports,
    Limits,
    Server,
    Timing,
)

HOLE_AND_ZERO = 3


@dataclass
class MemoryExport:
    """A disk in memory that does as it is told: `slow` makes every request wait for `gate`."""

    name: str = "disk"
    size: int = 8 << 20
    read_only: bool = False
    rotational: bool = False
    preferred_block: int = 4096
    contexts: tuple[str, ...] = ("forebay:cached",)
    throttle = None
    slow: bool = False
    gate: trio.Event = field(default_factory=trio.Event)
    error: OSError | None = None
    publish_error: OSError | None = None
    clients: int = 0
    pins: int = 0
    waiting: int = 0
    most_waiting: int = 0
    most_at_once: int = 1 << 20
    """Writes that one write_now() takes."""
    now: int = 0
    """Requests answered by read_now() and write_now()."""
    publications: int = 0
    unpublished: int = 0
    log: list[str] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, self.size))

    def opened(self) -> None:
        self.clients += 1

    def closed(self) -> None:
        self.clients -= 1

    def unreadable(self) -> None:
        pass

    def pin(self) -> int:
        self.pins += 1
        return self.pins

    def unpin(self, token: int) -> None:
        assert token
        self.pins -= 1

    def read_now(self, offset: int, length: int) -> Buffer | None:
        if self.slow:
            return None
        self._fail()
        self.now += 1
        return self.memory[offset : offset + length]

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        if self.slow:
            return 0
        for taken, (offset, data) in enumerate(writes):
            if taken == self.most_at_once:
                return taken
            try:
                self._fail()
            except OSError:
                if not taken:
                    raise
                return taken
            self.now += 1
            self.unpublished += 1
            self.memory[offset : offset + len(data)] = data
        return len(writes)

    def answered(self) -> None:
        pass

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        return False

    def begin_flush(self) -> None:
        pass

    def flush_now(self) -> bool:
        return False

    def publish(self) -> None:
        self.publications += 1
        self.unpublished = 0
        if self.publish_error is not None:
            raise self.publish_error

    async def read(self, offset: int, length: int) -> list[Buffer]:
        await self._work(f"read {offset} {length}")
        half = length // 2
        return [self.memory[offset : offset + half], self.memory[offset + half : offset + length]]

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        await self._work(f"write {offset} {len(data)} fua={fua:d}")
        self.memory[offset : offset + len(data)] = data

    async def flush(self) -> None:
        await self._work("flush")

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        await self._work(f"trim {offset} {length} fua={fua:d}")
        self.memory[offset : offset + length] = bytes(length)

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        await self._work(f"zero {offset} {length} fua={fua:d} no_hole={no_hole:d} fast={fast:d}")
        if fast and offset % 4096:
            raise OSError(errno.ENOTSUP, "not fast")
        self.memory[offset : offset + length] = bytes(length)

    async def cache(self, offset: int, length: int) -> None:
        await self._work(f"cache {offset} {length}")

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """For base:allocation what is zero per 64 KiB, for others everything in one, far too long."""
        await self._work(f"extents {context} {offset} {length} one={one:d}")
        if context != "base:allocation":
            return [(1 << 40, 1)]
        found, at = [], offset
        while at < offset + length:
            stop = min(at // 65536 * 65536 + 65536, self.size)
            found.append((stop - at, 0 if any(self.memory[at:stop]) else HOLE_AND_ZERO))
            at = stop
        return found

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def _work(self, what: str) -> None:
        self.log.append(what)
        self._fail()
        if self.slow:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
            try:
                await self.gate.wait()
            finally:
                self.waiting -= 1


@dataclass
class Running:
    """A server and where it listens."""

    server: Server
    export: MemoryExport
    path: str
    scope: trio.CancelScope
    ended: trio.Event

    def uri(self, export: str = "disk") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"

    async def stop(self) -> None:
        """Cancels serve() and returns when it has."""
        self.scope.cancel()
        await self.ended.wait()


def listener(path: Path) -> trio.SocketListener:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(200)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


@contextlib.asynccontextmanager
async def serving(
    directory: Path,
    export: MemoryExport | None = None,
    limits: Limits | None = None,
    budgets: Budgets | None = None,
    exports: Callable[[MemoryExport, Connection], Exports] | None = None,
) -> AsyncIterator[Running]:
    """Our server with one export, named and as the default; or with what `exports` makes of that for each client.

    Whatever the test left waiting is let go at the end.
    """
    export = export or MemoryExport()
    checked: Export = export

    def known(_connection: Connection) -> Exports:
        return KnownExports(
            lambda name: checked if name in ("", checked.name) else None, lambda: [checked.name]
        )

    server = Server(partial(exports, export) if exports else known, limits, budgets=budgets)
    scope, ended = trio.CancelScope(), trio.Event()
    path = directory / "disk.sock"

    async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with scope:
            await server.serve(listener(path), task_status=task_status)
        ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        try:
            yield Running(server, export, str(path), scope, ended)
        finally:
            export.gate.set()
            scope.cancel()
    assert not server.connections
    assert export.clients == 0
    assert export.pins == 0
    assert export.unpublished == 0
