# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A gateway in this process, on real files: for what its commands leave behind when a call of theirs fails."""

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import trio

import forebay_cache
import forebay_cache.durable.commit as commit_module
from forebay.config.model import Config, DiskSettings, Store
from forebay.config.sections import CacheSection, GatewaySection
from forebay.daemon.attached import Attached
from forebay.daemon.gateway import Gateway
from forebay.doors.restart import EarlierSockets
from forebay.errors import ForebayError
from forebay.origin.threads import Call, StoreThreads
from forebay.storage.state import open_cache
from forebay.units import MIB
from forebay_cache import Cache
from forebay_cache.errors import IndexFault
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index

SIZE = 2 * MIB
OLD, NEW = b"o", b"n"


def nothing(_done: int, _total: int) -> None:
    """A progress that nobody watches."""


class Faults:
    """Fails the n-th call, from 1, to the index or to a store that is made while it is armed, before or after it is
    done.
    """

    def __init__(self) -> None:
        self.number = 0
        self.after = False
        self.calls = 0
        self.hit = ""

    def _is_due(self) -> bool:
        if not self.number:
            return False
        self.calls += 1
        return self.calls == self.number

    @contextmanager
    def planted(self) -> Iterator[None]:
        commit, wait_for = Index._commit, StoreThreads.wait_for

        def committed(index: Index, changes: Changes) -> None:
            if self._is_due():
                self.hit = "index"
                raise IndexFault(errno.ENOSPC, "planted: the index is full")
            commit(index, changes)

        async def called(threads: StoreThreads, call: Call[Any], **how: Any) -> Any:
            if not self._is_due():
                return await wait_for(threads, call, **how)
            self.hit = "store"
            if self.after:
                await wait_for(threads, call, **how)
                if call._drop_result is not None:  # as of one that came too late
                    call._drop_result()
            else:
                call.stop_waiting(taken=False)  # it is not made
            raise OSError(errno.EIO, "planted: the store fails")

        with (
            mock.patch.object(commit_module, "COMMIT_SECONDS", 3600.0),
            mock.patch.object(Index, "_commit", committed),
            mock.patch.object(StoreThreads, "wait_for", called),
        ):
            yield


class Bed:
    """One life of the gateway after the other, on the same directories."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.images.mkdir(parents=True)
        (directory / "run" / "disks").mkdir(parents=True)
        (directory / "state").mkdir()
        self.config = Config(
            gateway=GatewaySection(
                state=directory / "state", run=directory / "run", socket_group=None
            ),
            cache=CacheSection(size=32 * MIB),
            defaults=DiskSettings(max_lag=3600.0),
            stores={"images": Store(path=self.images)},
        )
        self.gateway: Gateway
        self.nursery: trio.Nursery

    def image(self, name: str) -> Path:
        path = self.images / name
        path.write_bytes(OLD * SIZE)
        return path

    @asynccontextmanager
    async def life(self) -> AsyncIterator[Gateway]:
        """The daemon without its control API; ended as by a kill."""
        async with self.served(open_cache(self.config)) as gateway:
            yield gateway

    @asynccontextmanager
    async def served(self, cache: Cache) -> AsyncIterator[Gateway]:
        """The same on a cache that is open."""
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            nursery.start_soon(forebay_cache.come_back, cache)
            self.gateway = Gateway(self.config, cache, nursery)
            await self.gateway.resume(EarlierSockets())
            yield self.gateway
            for one in self.gateway.attached():
                await self._let_go(one)
            nursery.cancel_scope.cancel()
        cache.release()

    async def _let_go(self, one: Attached) -> None:
        """What the end of the process does with descriptors."""
        origin = one.disk.image.origin
        if origin is not None:
            await origin.close()
        await one.source.leave()

    def disk(self, name: str) -> Attached:
        return self.gateway._disks.attached(name)

    async def write(self, name: str, what: bytes = NEW) -> None:
        """64 KiB at the start of the disk, durably."""
        disk = self.disk(name).disk
        await disk.write(0, memoryview(what * 65536), True)

    async def starts_with(self, name: str, what: bytes) -> None:
        got = b"".join(bytes(x) for x in await self.disk(name).disk.read(0, 65536))
        assert got == what * 65536, got[:8]

    def told(self) -> dict[str, tuple[str, str]]:
        """Mode and state of each disk, by name."""
        return {one["name"]: (one["mode"], one["state"]) for one in self.gateway.status()}


async def outcome(do: Callable[[], Any]) -> str:
    """Empty if it was done, else what was refused."""
    try:
        await do()
    except (ForebayError, OSError) as fault:
        return str(fault) or "failed"
    return ""
