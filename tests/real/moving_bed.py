# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Two gateways in this process, on one store of real files, and a guest that moves from the one to the other.

Each gateway can be killed at any of its calls to the store, before or after it is made, and comes back; such a call can
fail, or all of them for a while: then that host is cut off from the store, while its locks stay, as they do until a
lease ends. What it does in seconds is done in hundredths here.
"""

import errno
import fcntl
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import trio

import forebay_cache
from forebay.carrying import arriving, leaving
from forebay.config.model import Store
from forebay.daemon.attached import Attached
from forebay.daemon.gateway import Gateway
from forebay.disk import watch
from forebay.doors.restart import EarlierSockets
from forebay.errors import ForebayError
from forebay.handover import coming, giving
from forebay.image import reach
from forebay.origin.addresses import FileAddress
from forebay.origin.blocking import BlockingFile
from forebay.origin.threads import Call, StoreThreads
from forebay.sidecar import incoming, locks, tenure
from forebay.sidecar.files import read_owner
from forebay.sidecar.marker import Marker
from forebay.storage.state import open_cache
from forebay.units import Mode
from forebay_cache import CacheError
from real.commands_bed import Bed, nothing

SECTOR, SECTORS = 4096, 48
HURRIED = {
    (giving, "IDLE_SECONDS"): 0.02,
    (giving, "PREPARED_SECONDS"): 0.02,
    (giving, "RETURN_SECONDS"): 0.02,
    (giving, "RELEASED_SECONDS"): 0.05,
    (giving, "STALE_SECONDS"): 1.5,
    (coming, "BEAT_SECONDS"): 0.04,
    (coming, "TAKE_SECONDS"): 0.01,
    (coming, "LATER_SECONDS"): 0.02,
    (coming, "TRY_SECONDS"): 0.2,
    (incoming, "LOOK_SECONDS"): 0.02,
    (reach, "WATCH_SECONDS"): 0.05,
    (reach, "LOOK_SHARED_SECONDS"): 0.02,
    (reach, "RETRY_SECONDS"): 0.05,
    (reach, "RETRY_MOST"): 0.1,
    (reach, "LEAST_PAUSE"): 0.02,
    (watch, "WATCH_SECONDS"): 0.05,
    (leaving, "IDLE_SECONDS"): 0.02,
    (leaving, "ASKED_SECONDS"): 0.02,
    (leaving, "PREPARED_SECONDS"): 0.02,
    (leaving, "RELEASED_SECONDS"): 0.05,
    (leaving, "RETRY_SECONDS"): 0.05,
    (arriving, "BEAT_SECONDS"): 0.04,
    (arriving, "TAKE_SECONDS"): 0.01,
    (arriving, "LATER_SECONDS"): 0.02,
    (arriving, "LOOK_SECONDS"): 0.02,
    (arriving, "AGAIN_SECONDS"): 2.0,
}


class Fault:
    """What happens at the n-th call of a host to the store, from 1, while `armed`."""

    def __init__(self, number: int, kind: str, seconds: float = 0.3) -> None:
        """`kind`: `kill` or `fail`, `before` or `after` behind a space; `cut` or, of both hosts, `away`, for so many
        seconds; `late`: it fails, and is made after so many all the same; `clock`: it jumps, forth or back; `again`: an
        operator gives a command once more.
        """
        self.number = number
        self.kind = kind
        self.seconds = seconds
        self.calls = 0
        self.hit = False


NO_FAULT = Fault(0, "none")


class Host(Bed):
    """One host: a gateway, life after life, as a task."""

    def __init__(self, directory: Path, images: Path, mode: Mode) -> None:
        super().__init__(directory)
        store = Store(path=images, mode=mode, origin_timeout=2.0, with_data=True)
        self.config = self.config.model_copy(update={"stores": {"images": store}})
        self.fault = NO_FAULT
        self.cut_until = -1.0
        self.clients = 0
        self.is_gone = False
        """True if it does not come back after a kill."""
        self.skew = 0.0
        """Seconds that its clock is ahead."""
        self.together: Bed2
        self.killed = trio.Event()
        self.drop_locks: Callable[[str], None] = lambda _gateway: None
        self.up = trio.Event()

    async def run(self) -> None:
        """Live, until cancelled, and again after each kill."""
        while True:
            cache = open_cache(self.config)
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(cache.run)
                    nursery.start_soon(forebay_cache.come_back, cache)
                    self.gateway = Gateway(self.config, cache, nursery)
                    await self.gateway.resume(EarlierSockets())
                    self.up.set()
                    await self.killed.wait()
                    nursery.cancel_scope.cancel()
            finally:
                cache.release()
                self.drop_locks(cache.uuid)
            self.up = trio.Event()
            if self.is_gone:
                await trio.sleep_forever()
            await trio.sleep(0.02)
            self.killed = trio.Event()

    async def call(self, threads: StoreThreads, call: Call[Any], how: dict[str, Any]) -> Any:
        """One call to the store."""
        fault, real, do = self.fault, WAIT_FOR, call._do
        call._do = lambda: self._by_its_clock(do)
        if self.killed.is_set():
            call.stop_waiting(taken=False)
            raise OSError(errno.EIO, "the process is gone")
        if trio.current_time() < self.cut_until:
            call.stop_waiting(taken=False)
            raise OSError(errno.EIO, "cut off from the store")
        if fault.number and not fault.hit:
            fault.calls += 1
            if fault.calls == fault.number:
                fault.hit = True
                what, _, when = fault.kind.partition(" ")
                if what in ("clock", "again"):
                    self._odd(what)
                    return await real(threads, call, **how)
                if what in ("cut", "away"):
                    for host in (self.together.a, self.together.b) if what == "away" else (self,):
                        host.cut_until = trio.current_time() + fault.seconds
                    call.stop_waiting(taken=False)
                    raise OSError(errno.EIO, "cut off from the store")
                is_ours = do.__module__.startswith("forebay.carrying")  # and holds no descriptor
                if what == "late" and is_ours:
                    call.stop_waiting(taken=False)
                    self.together.nursery.start_soon(self._late, call, do)
                    raise OSError(errno.ETIMEDOUT, "no answer")
                if when == "after":
                    await real(threads, call, **how)
                    if call._drop_result is not None:
                        call._drop_result()
                else:
                    call.stop_waiting(taken=False)
                if what == "kill":
                    self.killed.set()
                    await trio.sleep_forever()
                raise OSError(errno.EIO, "planted: the store fails")
        return await real(threads, call, **how)

    async def _late(self, call: Call[Any], do: Callable[[], Any]) -> None:
        """What a server does with a request that it had when nobody waited any more."""
        await trio.sleep(self.fault.seconds)
        with suppress(OSError, ForebayError):
            result = await trio.to_thread.run_sync(do)
            if call._drop is not None:
                call._drop(result)

    def _odd(self, what: str) -> None:
        """Nothing fails, and yet."""
        if what == "clock":
            self.skew += self.together.rng.choice((-1e6, -100.0, 100.0, 1e6))
        else:
            self.together.nursery.start_soon(self.together.command)

    def _by_its_clock(self, do: Callable[[], Any]) -> Any:
        """What the call returns, in a thread that sees this host's clock."""
        CLOCK.skew = self.skew
        try:
            return do()
        finally:
            CLOCK.skew = 0.0


WAIT_FOR = StoreThreads.wait_for


class Clock(threading.local):
    """How far ahead the clock is that this thread sees."""

    skew = 0.0


CLOCK = Clock()


async def until(what: Callable[[], bool]) -> None:
    """Return when it is so."""
    while not what():  # noqa: ASYNC110 (nobody tells)
        await trio.sleep(0.01)


async def _until_set(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


class Bed2:
    """Both hosts, and the image between them."""

    def __init__(self, directory: Path, rng: random.Random, mode: Mode = Mode.WRITE_BACK) -> None:
        images = directory / "store"
        images.mkdir(parents=True)
        self.rng = rng
        self.image = images / "vm.img"
        self.image.write_bytes(bytes(SECTOR * SECTORS))
        self.a = Host(directory / "a", images, mode)
        self.b = Host(directory / "b", images, mode)
        self.may_be: list[set[bytes]] = [{bytes(SECTOR)} for _ in range(SECTORS)]
        """What each sector may hold: one thing, where its last write was acknowledged."""
        self.faults: list[str] = []
        self.is_overlay = False
        """True if the disk is an overlay, which moves with what it has."""
        self._owners: dict[int, str] = {}
        self._count = 0
        self.nursery: trio.Nursery
        """For what is asked of hosts: it outlives them."""
        self.a.drop_locks = self.b.drop_locks = self._drop_locks
        self.a.together = self.b.together = self

    def _drop_locks(self, gateway: str) -> None:
        """What the end of a process does."""
        for fd in [fd for fd, owner in self._owners.items() if owner == gateway]:
            with suppress(OSError):
                if os.path.samestat(os.fstat(fd), self.image.stat()):
                    locks.set_lock(fd, fcntl.F_UNLCK)

    @contextmanager
    def planted(self) -> Iterator[None]:  # noqa: C901 (what replaces what)
        """Within it the clocks are fast, calls may fail, and each write of the image is looked at."""
        take, write, allocate = Marker.take.__func__, BlockingFile.write, BlockingFile.allocate  # type: ignore[attr-defined]
        admit = Marker.admit
        address = FileAddress("images", self.image.parent, self.image.name)

        def taken(kind: Any, /, where: Any, file: Any, me: Any, **how: Any) -> Any:
            marker = take(kind, where, file, me, **how)
            self._owners[file.fd] = me.gateway
            return marker

        def admitted(marker: Marker, file: Any, **how: Any) -> None:
            admit(marker, file, **how)
            assert marker.owner is not None
            self._owners[file.fd] = marker.owner.gateway

        def check(file: BlockingFile) -> None:
            with file.descriptor as fd:
                writer = self._owners.get(fd, "")
            owner = read_owner(address)
            if owner is None or owner.gateway != writer:
                self.faults.append(f"written by {writer}, owned by {owner}")

        def written(file: BlockingFile, *args: Any) -> None:
            check(file)
            write(file, *args)

        def allocated(file: BlockingFile, *args: Any) -> None:
            check(file)
            allocate(file, *args)

        async def called(threads: StoreThreads, call: Call[Any], **how: Any) -> Any:
            for host in (self.a, self.b):
                gateway = getattr(host, "gateway", None)
                if gateway is not None and threads in gateway._arrivals._threads.values():
                    return await host.call(threads, call, how)
            return await WAIT_FOR(threads, call, **how)

        def clients(attached: Attached) -> int:
            for host in (self.a, self.b):
                gateway = getattr(host, "gateway", None)
                if gateway is not None and attached in gateway._disks.all_attached():
                    return host.clients
            return 0

        clock = time.time
        with ExitStack() as stack:
            seen = SimpleNamespace(time=lambda: clock() + CLOCK.skew)
            stack.enter_context(mock.patch.object(tenure, "time", seen))
            for (module, name), value in HURRIED.items():
                stack.enter_context(mock.patch.object(module, name, value))
            stack.enter_context(mock.patch.object(Marker, "take", classmethod(taken)))
            stack.enter_context(mock.patch.object(Marker, "admit", admitted))
            stack.enter_context(mock.patch.object(BlockingFile, "write", written))
            stack.enter_context(mock.patch.object(BlockingFile, "allocate", allocated))
            stack.enter_context(mock.patch.object(StoreThreads, "wait_for", called))
            stack.enter_context(mock.patch.object(Attached, "clients", property(clients)))
            yield

    # ---------------------------------------------------------------------------------------------------- the guest

    async def _until(
        self, host: Host, do: Callable[[], Awaitable[object]], seconds: float = 20.0
    ) -> Any:
        """What it returns, tried until it is done, as QEMU does whose daemon is away or whose disk fails."""
        last: list[BaseException] = []
        result: list[Any] = []

        async def once(ended: trio.Event, killed: trio.Event) -> None:
            """What is shielded in a process that is gone is not waited for."""
            try:
                with trio.move_on_after(15.0 if self.is_overlay else 3.0):
                    result.append(await do())
            except (OSError, ForebayError, CacheError) as fault:
                last[:] = [fault]
            except RuntimeError:
                if not killed.is_set():
                    raise
            ended.set()

        with trio.move_on_after(seconds):
            while not result:
                await host.up.wait()
                ended = trio.Event()
                killed = host.killed
                self.nursery.start_soon(once, ended, killed)
                async with trio.open_nursery() as nursery:
                    for event in (ended, killed):
                        nursery.start_soon(_until_set, event, nursery.cancel_scope)
                await trio.sleep(0 if result else 0.02)
            return result[0]
        raise AssertionError(f"not done in {seconds} s: {last}")

    async def write(self, host: Host) -> None:
        """Write one sector, acknowledged."""
        self._count += 1
        n = self.rng.randrange(SECTORS)
        data = (b"%8d" % self._count) * (SECTOR // 8)
        self.may_be[n].add(data)
        await self._until(
            host, lambda: host.disk("d").disk.write(n * SECTOR, memoryview(data), False)
        )
        self.may_be[n] = {data}

    async def flush(self, host: Host) -> None:
        await self._until(host, lambda: host.disk("d").disk.flush())  # noqa: PLW0108 (another after a kill)

    async def check(self, host: Host) -> None:
        """All that was acknowledged is there."""

        async def read() -> list[bytes]:
            disk = host.disk("d").disk
            parts = await disk.read(0, SECTOR * SECTORS)
            return [b"".join(bytes(part) for part in parts)]

        (whole,) = await self._until(host, read)
        for n, may_be in enumerate(self.may_be):
            found = whole[n * SECTOR : (n + 1) * SECTOR]
            assert found in may_be, f"sector {n} has {found[:8]!r}, not {[x[:8] for x in may_be]}"
        assert not self.faults, self.faults

    async def command(self) -> None:
        """Commands that belong to the move are given once more, two at once. What is refused is nothing."""

        async def once(do: Callable[[], Awaitable[object]]) -> None:
            with suppress(OSError, ForebayError, CacheError, RuntimeError), trio.move_on_after(1.0):
                await do()

        for host in (self.a, self.b):
            if host.up.is_set() and "d" in host.gateway._disks.names():
                gateway = host.gateway
                attach = partial(self._attach_incoming, gateway, 0.5)
                for do in (partial(gateway.moves.prepare, "d", "", 0.5, nothing), attach):
                    self.nursery.start_soon(once, do)
                    self.nursery.start_soon(once, do)

    async def attach_incoming(self, host: Host) -> None:
        """As the hook does, again and again; one that was done counts."""

        async def attach() -> None:
            if "d" not in host.gateway._disks.names():
                await self._attach_incoming(host.gateway, 2.0)

        await self._until(host, attach, 60.0 if self.is_overlay else 20.0)

    async def _attach_incoming(self, gateway: Gateway, patience: float) -> None:
        overlay, patience = self.is_overlay, patience * (5.0 if self.is_overlay else 1.0)
        await gateway.attach(
            "d",
            "images:vm.img",
            incoming=True,
            patience=patience,
            overlay=overlay,
            with_data=overlay,
        )

    async def detach(self, host: Host) -> None:
        async def detach() -> None:
            if "d" in host.gateway._disks.names():
                await host.gateway.detach("d", force=True, progress=nothing)

        await self._until(host, detach)

    async def move(
        self, source: Host, to: Host, *, stays: bool, fails: bool, reads: bool = True
    ) -> Host:
        """The guest moves; where it runs then. `stays`: QEMU does not disconnect. `fails`: it goes on at the source."""
        await self.attach_incoming(to)
        to.clients = 1
        for _ in range(self.rng.randrange(4)):
            await self.write(source)
        if reads:
            await self._until(to, lambda: to.disk("d").disk.read(0, 512))
        await self.flush(source)
        if not stays:
            source.clients = 0
        if self.rng.random() < 0.5:
            await trio.sleep(self.rng.random() * 0.1)
        if fails:
            source.clients = 1
            await self.write(source)
            await self.flush(source)
            to.clients = 0
            await self.detach(to)
            return source
        await self.write(to)
        source.clients = 0
        for _ in range(3):
            await self.write(to)
        await self.flush(to)
        return to
