# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One attached disk: its source, what serves it, its socket, and where a fault of its tasks ends."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import trio

from forebay.boot.boots import Boots
from forebay.boot.disk_boot import boot_of
from forebay.checkpoint.dirty import left_dirty
from forebay.config.model import Config
from forebay.daemon.parallel import Progress
from forebay.daemon.record import LIMITS, DiskRecord
from forebay.disk.disk import Disk
from forebay.disk.state import DiskState
from forebay.doors.listener import Listener
from forebay.doors.restart import Sockets
from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.handover.phase import Movement
from forebay.image.boundary import Boundary, breaks_the_cache, in_short, sole_fault
from forebay.image.source import Source
from forebay.overview.detail import connected, settings_told
from forebay_cache import CacheError
from forebay_cache.states import Machine, Table

log = logging.getLogger("forebay.daemon")


class Life(Enum):
    """What an attached disk is doing. The moves are in LIFE; gateway/README.md has the same table."""

    ATTACHING = "attaching"
    """Its clients are not accepted yet."""
    SERVING = "serving"
    DETACHING = "detaching"
    """What is dirty is written back, then its clients leave."""
    STOPPED = "stopped"
    """By a fault of Forebay itself in one of its tasks. Its clients were hung up on, and its data is kept."""
    GONE = "gone"
    """Its tasks have ended for good."""


LIFE: Table[Life] = {
    Life.ATTACHING: {
        Life.SERVING: "its socket accepts clients",
        Life.STOPPED: "one of its tasks failed at once",
        Life.GONE: "it cannot be attached",
    },
    Life.SERVING: {
        Life.DETACHING: "the operator detaches it",
        Life.STOPPED: "one of its tasks failed",
        Life.GONE: "the daemon ends, or a conflict is resolved",
    },
    Life.DETACHING: {
        Life.SERVING: "it cannot be detached now",
        Life.STOPPED: "one of its tasks failed, or it was stopped before and cannot be detached now",
        Life.GONE: "it is detached, or the daemon ends",
    },
    Life.STOPPED: {
        Life.DETACHING: "the operator detaches it",
        Life.GONE: "the detach that was under way is done, or the daemon ends",
    },
    Life.GONE: {},
}


class Attached:
    """A disk that was attached, with everything that lives as long as it."""

    def __init__(
        self,
        record: DiskRecord,
        source: Source,
        disk: Disk,
        listener: Listener,
        boots: Boots | None = None,
    ) -> None:
        """`boots` records its boot, and replays those of before; None: nobody does."""
        self.record = record
        self.source = source
        self.disk = disk
        self.listener = listener
        self.boot = None if record.gives_way else boot_of(disk, boots)
        self.handover: Movement | None = None
        """The handover of its image, or of the overlay; None where that cannot be."""
        self.busy = trio.Lock()
        """Held by what changes the disk as a whole: see `Disks.turn`."""
        self._life = Machine(LIFE, Life.ATTACHING, f"disk '{source.use.disk}'")
        self.fault: Exception | None = None
        """What a task of the disk ended with first; the disk is stopped since."""
        self._untold = ""
        """What kept its status from being told the last time; empty if nothing did."""
        self._boundary: Boundary | None = None
        source.stop_disk = self.stop
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._uses: set[trio.CancelScope] = set()
        """Of commands that work on the disk, and end with it."""

    @property
    def name(self) -> str:
        """The disk's name."""
        return self.source.use.disk

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return self.listener.clients

    # -- life

    async def start(self, nursery: trio.Nursery, earlier: Sockets | None = None) -> None:
        """Begin background work, then accept clients, and go on with those that the process before left.

        Raises ForebayError. If a task fails at once, the disk is stopped when this returns.
        """
        self._boundary = Boundary(nursery, f"disk '{self.name}'", self.stop)
        try:
            await self._boundary.start(self._run)
            await self.listener.open(self._boundary, earlier)
        except BaseException:
            if earlier is not None:
                earlier.hang_up()
            with trio.CancelScope(shield=True):
                await self.rest()
            self.leave()
            raise
        self._go_on()

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The background work of the disk, until `rest` or `stop`."""
        try:
            with self._scope, sole_fault():
                async with trio.open_nursery() as nursery:
                    if self.boot is not None:
                        nursery.start_soon(self.boot.run)
                    if self.handover is not None:
                        nursery.start_soon(self.handover.run)
                    await self.disk.run(task_status=task_status)
        finally:
            self._ended.set()

    def stop(self, fault: Exception) -> None:
        """Stop the disk: a task has ended with `fault`. End the others, hang up on the clients, take the socket away.

        The first fault is the reason that the operator is told. What is dirty stays in the cache.
        """
        self.fault = self.fault or fault
        self._scope.cancel()
        self.listener.hang_up()
        if self._life.may_become(Life.STOPPED):
            self._life.become(Life.STOPPED)

    def _go_on(self) -> None:
        """Note that it is served, unless a task has failed meanwhile: then stop it."""
        if self.fault is None:
            self._life.become(Life.SERVING)
        else:
            self.stop(self.fault)

    def check_serves(self) -> None:
        """Raises ForebayError, which says why and what to do, where the disk is stopped."""
        if self.fault is not None:
            raise ForebayError(f"'{self.name}' is stopped: {self.reason}")

    def begin_detach(self) -> None:
        """Note that the operator wants it gone."""
        self._life.become(Life.DETACHING)

    def give_up_detach(self) -> None:
        """Note that it stays, served or stopped as before."""
        if self._life.state is not Life.GONE:
            self._go_on()

    async def accept_again(self) -> None:
        """Open the socket again, unless the disk is stopped, or the daemon ends. Raises ForebayError."""
        assert self._boundary is not None, "it was started"
        if self.fault is None and self._life.state is not Life.GONE:
            await self.listener.open(self._boundary)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Around each command that works on the disk beside others: it ends with the disk. Raises ForebayError then."""
        with trio.CancelScope() as scope:
            self._uses.add(scope)
            try:
                yield
            finally:
                self._uses.discard(scope)
        if scope.cancelled_caught:
            raise ForebayError(f"'{self.name}' was detached meanwhile: see forebay status")

    async def rest(self) -> None:
        """End background work and what commands do with the disk, and wait until background work has ended."""
        for scope in list(self._uses):
            scope.cancel()
        self._scope.cancel()
        if self._boundary is not None:  # else it was not begun
            await self._ended.wait()

    async def take_down(self, seconds: float) -> None:
        """End everything, and let the image go, but keep all data: the disk is brought back as another object.

        Requests in flight have so many seconds.
        """
        await self.listener.shut(seconds)
        await self.rest()
        with contextlib.suppress(OSError):
            await self.disk.image.leave(self.source, self.disk.view)
        with contextlib.suppress(OSError, ForebayError):
            await self.source.leave()
        self.leave()

    async def end(self) -> None:
        """Hang up on everybody, and end everything."""
        await self.listener.shut(0)
        await self.rest()
        self.leave()

    def leave(self) -> None:
        """Note that it is no disk of the gateway any more."""
        if self.boot is not None:
            self.boot.leave()
        self._life.become(Life.GONE)

    async def drain(self, progress: Progress) -> None:
        """Write back everything that is dirty. Raises OSError.

        Raises ForebayError for a disk that is stopped and cannot be drained because of another fault.
        """
        try:
            await self.disk.drain(progress)
        except (OSError, ForebayError, CacheError):
            raise
        except Exception as fault:
            if self.fault is None or breaks_the_cache(fault):
                raise
            raise ForebayError(
                f"'{self.name}' is stopped, and what is dirty cannot be written back ({in_short(fault)}): restart "
                "the daemon to try again, or detach it with --discard to give that data up"
            ) from fault

    async def preload_trace(self, progress: Progress) -> None:
        """Bring in what boots read. Raises ForebayError where there is no trace of the image, or no room; OSError."""
        if self.disk.view.clean is None:
            raise ForebayError(
                f"'{self.name}' is in mode none, which caches nothing: change its mode"
            )
        if self.boot is None:
            raise ForebayError(f"'{self.name}' has no image, and so no boot trace: leave that out")
        await self.boot.replay(progress)

    # -- what is told

    @property
    def reason(self) -> str:
        """Why the disk is stopped, and what to do: one line."""
        assert self.fault is not None, "it is not stopped"
        again = "restart the daemon to serve it again"
        again += (
            " (a detach drops it)"
            if self.disk.overlay and not self.record.keep
            else ", or detach it and attach it again"
        )
        return f"a fault of Forebay itself ({in_short(self.fault)}): its data is kept: {again}; the log says more"

    def pulse(self) -> tuple[object, ...]:
        """A value that changes whenever something moves: a request is answered, the origin or the cache takes or gives
        something, or the origin comes or goes. Raises nothing: the watchdog looks at the others, too.
        """
        found = self.status()
        counters = ("state", "reads", "writes", "cached_bytes", "private_bytes")
        origin = ("origin_read_bytes", "origin_written_bytes")
        return (self.listener.answered, *(found.get(key) for key in (*counters, *origin)))

    def status(self) -> dict[str, Any]:
        """The keys of the contract, and more. Raises nothing: who asks for all disks is told of the others."""
        try:
            told = self._told()
        except Exception as fault:
            what = in_short(fault)
            if what != self._untold:
                log.exception("disk '%s': its status cannot be told", self.name)
            self._untold = what
            return self._at_least(what)
        self._untold = ""
        return told

    def _told(self) -> dict[str, Any]:
        told = {
            **self.disk.status(),
            **self.record.own(LIMITS),
            **(self.boot.status() if self.boot is not None else {}),
            **(self.handover.status() if self.handover is not None else {}),
            "clients": self.listener.clients,
            "socket": str(self.listener.path),
            **self.listener.tenant.status(),
        }
        if self.fault is not None:
            told |= {"state": DiskState.STOPPED.value, "reason": self.reason}
        return told

    def detail(self, config: Config) -> dict[str, Any]:
        """What is told beyond `status` where this disk alone is asked for."""
        record, store = self.record, self.source.address.store
        sockets = (one.sock for one in self.listener.connected() if one.session is not None)
        return {
            "store": store or None,
            "settings": settings_told(config, store, self.disk.settings, record.own()),
            "connections": connected(sockets),
            "layers": len(self.disk.image.cache.layers.private_of(self.name)),
        }

    def _at_least(self, what: str) -> dict[str, Any]:
        """The keys of the contract, of a disk that a fault of Forebay itself, `what`, keeps from telling more."""
        lag = 0, 0.0
        with contextlib.suppress(Exception):
            lag = left_dirty(self.disk.image.cache, self.name)
        why = (
            f"a fault of Forebay itself ({what}): how it is cannot be told, its data is kept: restart the daemon; "
            "the log says more"
        )
        clients, socket = self.listener.clients, str(self.listener.path)
        told = _at_rest(self.name, self.record, DiskState.FAILED, why, lag)
        return told | {"clients": clients, "socket": socket}


class Absent:
    """A disk on record that cannot be served: its store is no longer configured, say. Shown, and kept."""

    def __init__(
        self, name: str, record: DiskRecord, why: str, lag: Callable[[], tuple[int, float]]
    ) -> None:
        """`why` it is not served, in one line. `lag` says what its image lacks: bytes, and seconds."""
        self.busy = trio.Lock()
        """As that of an attached disk."""
        self.name = name
        self.record = record
        self.why = why
        self._lag = lag
        self.clean_counts = not record.is_behind
        """True if the clean blocks of its image are of what it was served from."""

    @property
    def private_bytes(self) -> int:
        """Bytes that only the cache has of it."""
        return self._lag()[0]

    def detail(self, config: Config) -> dict[str, Any]:
        """Nothing: it is not served."""
        del config
        return {}

    def status(self) -> dict[str, Any]:
        """The same keys as those of a disk that does nothing."""
        state = DiskState.CONFLICT if self.record.conflict else DiskState.FAILED
        return _at_rest(self.name, self.record, state, self.why, self._lag())


def _at_rest(
    name: str, record: DiskRecord, state: DiskState, why: str, lag: tuple[int, float]
) -> dict[str, Any]:
    """The keys of the status of a disk of which nothing is known but its record, why it is in that state, and `lag`:
    bytes that only the cache has of it, and the age of the oldest in seconds.
    """
    private = lag[0]
    dirty, age = (0, 0.0) if record.overlay else lag
    counters = (
        "cached_bytes", "read_hits", "read_misses", "write_hits",
        "write_misses", "origin_read_bytes", "origin_written_bytes", "clients", "queue_depth",
        "slow_requests",
    )  # fmt: skip
    return {
        "name": name,
        "image": record.image,
        "format": record.format or RAW,
        "mode": record.mode or "",
        "state": state.value,
        "read_only": record.read_only,
        "overlay": record.overlay,
        "keep": record.keep,
        "size": record.size,
        **record.own(LIMITS),
        **dict.fromkeys(counters, 0),
        "dirty_bytes": dirty,
        "lag_seconds": round(age, 3),
        "lag_bytes": dirty,
        "private_bytes": private,
        "latency": {},
        "socket": "",
        "reason": why,
    }
