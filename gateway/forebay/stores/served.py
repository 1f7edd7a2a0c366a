# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One image of a store while clients of the store's socket read it: attached by the first, let go after the last."""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from forebay.boot.disk_boot import DiskBoot
from forebay.config.model import DiskSettings
from forebay.disk.disk import Disk
from forebay.doors.accepting import Clients
from forebay.errors import ForebayError
from forebay.image.boundary import in_short, sole_fault
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.origin.opening import NoSuchImageError
from forebay_cache import CacheError
from forebay_nbd import Connection, Export, Refused
from forebay_nbd.protocol.wire import Rep

log = logging.getLogger("forebay.stores")

LINGER_SECONDS = 2.0
"""How long an image stays attached when nobody reads it any more: tools open an image several times in a row. Not
longer, because no other host can attach it for writing meanwhile."""

CLOSE_SECONDS = 10.0
"""How long a store may take to take an image back; what it has not done by then it does when it can."""


class Readers(Protocol):
    """Who reads images without being a disk of the gateway: `forebay.daemon.disks.Disks`."""

    def reading(
        self, source: Source, why_busy: Callable[[], str | None]
    ) -> AbstractAsyncContextManager[object | None]:
        """Around such work; gives the disk that writes the image, if there is one. Cancels the body when one comes,
        unless `why_busy` says in one line why the image is needed as it is. Raises ForebayError.
        """

    def check_alone(self, source: Source) -> None:
        """Raises ForebayError where a disk excludes the use of the image that the source is for."""


class Holder(Protocol):
    """Who may use an image: a connection, or work of the daemon's own."""

    @property
    def export(self) -> Export | None:
        """What it has of the image as a client; None before that, and of what is no client."""

    def abort(self) -> None:
        """Have it let the image go at once."""


@dataclass(frozen=True)
class Attaching:
    """What it takes to attach images: what the daemon has of each."""

    images: Images
    readers: Readers
    base: Callable[[str, int | None], tuple[Source, DiskSettings]]
    """Makes the source of an image, and its settings; its size in bytes is given where that is known. Raises
    ForebayError."""
    cached_size: Callable[[str], int | None]
    """Returns the bytes of an image of which the cache has something; None where it has nothing, or it is not known."""
    boot_of: Callable[[Disk], DiskBoot | None] = lambda _disk: None
    """Makes what records the boots from an image, and replays them."""
    preloaded: set[str] = field(default_factory=set)
    """The keys of the images that were preloaded since the daemon was started."""


class ServedImage:
    """One image. `run` attaches it, serves it for as long as somebody holds it, and lets it go."""

    def __init__(
        self,
        key: str,
        attaching: Attaching,
        size: int | None = None,
    ) -> None:
        """`key` names the image. `size` in bytes: what clients of the process before were told."""
        self.key = key
        self.name = key
        """As a disk has one, for the watchdog."""
        self.disk: Disk | None = None
        """The export, once it is attached."""
        self.refusal: Refused | None = None
        """Why it cannot be attached, or could not go on."""
        self.ready = trio.Event()
        """Set when it is attached, or refused."""
        self.ended = trio.Event()
        self.is_ending = False
        """True once nobody can have it any more."""
        self.listener = Clients(
            lambda: [x for x in self._holders if isinstance(x, Connection) and x.export]
        )
        self.idle_since = float("-inf")
        """Trio time since when nobody holds it."""
        self._holders: dict[Holder, int] = {}
        """Who may use it, and how often each of them holds it: its clients, and who is about to be."""
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._leaves_at_once = False
        self._daemon_ends = False
        self._attaching = attaching
        self._size = size

    # -- who holds it

    @property
    def conflict(self) -> str | None:
        """Why nothing of it is read any more: somebody has changed the image. It ends when nobody holds it."""
        return self.disk.image.conflict if self.disk is not None else None

    @property
    def is_idle(self) -> bool:
        """True if nobody holds it."""
        return not self._holders

    async def hold(self, connection: Holder) -> bool:
        """Keep it for a connection once more, as soon as it is attached; False if it is not, or not any more."""
        if self.is_ending:
            await self.ended.wait()
            return False
        self._holders[connection] = self._holders.get(connection, 0) + 1
        self._tell()
        has_come = False
        try:
            await self.ready.wait()
            has_come = self._may_be_read()
        finally:
            if not has_come:
                self.release(connection)
        return has_come

    def _may_be_read(self) -> bool:
        return not self.is_ending and self.conflict is None

    def release(self, connection: Holder) -> None:
        """Take one such hold back."""
        self._holders[connection] -= 1
        if not self._holders[connection]:
            del self._holders[connection]
        self.idle_since = trio.current_time()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def leave_at_once(self) -> None:
        """Have it let go without delay when nobody holds it: another one needs its place."""
        self._leaves_at_once = True
        self._tell()

    def why_busy(self) -> str | None:
        """Why nobody may write the image now, in one line; None if somebody may."""
        count = self.listener.clients
        if not count:
            return None
        who = "a client reads it" if count == 1 else f"{count} clients read it"
        store = self.key.partition(":")[0]
        return (
            f"{self.key}: {who} by the socket of store '{store}', and the images that lie over it need it as it is: "
            "shut down the VMs on these first (see forebay stores)"
        )

    # -- life

    def stop(self, fault: Exception) -> None:
        """End it whoever holds it, for a fault of Forebay itself."""
        self.refusal = Refused(f"{self.key}: a fault of Forebay itself: {in_short(fault)}")
        self._scope.cancel()

    def leave_to_the_end(self) -> None:
        """End it with the daemon, which waits for no store: what holds the image ends with the process."""
        self._daemon_ends = True
        self._scope.cancel()

    async def run(self) -> None:
        """Until nobody has held it for LINGER_SECONDS, a disk comes that writes the image, or `stop`.

        Raises what is a fault of Forebay itself.
        """
        source: Source | None = None
        try:
            with self._scope:
                source, settings = self._attaching.base(self.key, self._size)
                source.stop_disk = self.stop
                async with self._attaching.readers.reading(source, self.why_busy) as writer:
                    if writer is not None:
                        raise ForebayError(
                            f"{self.key} is written by a disk, and an overlay needs an image that stays as it is: "
                            "detach that disk first"
                        )
                    await self._attached(source, settings)
        except (ForebayError, OSError, CacheError) as fault:
            self._refuse(fault)
        except Exception as fault:
            self._refuse(fault)
            raise
        finally:
            self.is_ending = True
            self.ready.set()
            self.ended.set()

    def _refuse(self, fault: Exception) -> None:
        reply = Rep.ERR_UNKNOWN if isinstance(fault, NoSuchImageError) else Rep.ERR_POLICY
        text = str(fault) if isinstance(fault, ForebayError | OSError) else in_short(fault)
        self.refusal = self.refusal or Refused(text or type(fault).__name__, reply)

    async def _attached(self, source: Source, settings: DiskSettings) -> None:
        """Attach the image, serve it, let it go. Raises ForebayError, OSError and CacheError."""
        if not source.resumed:
            source = await self._prepared(source)
        try:
            self._attaching.readers.check_alone(source)
            amount = settings.preload if settings.preload != "trace" else 0
            settings = settings.model_copy(update={"preload": 0 if amount else settings.preload})
            self.disk = disk = await Disk.open(self._attaching.images, source, settings)
        except BaseException:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await source.abandon()
            raise
        boot = self._attaching.boot_of(disk)
        try:
            await source.close_prepared()
            log.debug("%s: attached for the socket of its store", self.key)
            await self.opened(disk)
            with sole_fault():
                await self._serve(disk, boot, amount)
        finally:
            self.is_ending = True
            if not self._daemon_ends:
                with trio.CancelScope(shield=True):
                    await self._close(disk)
            if boot is not None:
                boot.leave()

    async def _serve(self, disk: Disk, boot: DiskBoot | None, amount: int | str) -> None:
        """Serve the image until nobody wants it any more; `amount` is what is brought in, once."""
        async with trio.open_nursery() as nursery:
            await nursery.start(disk.run)
            if boot is not None:
                nursery.start_soon(boot.run)
            if amount and self.key not in self._attaching.preloaded:
                nursery.start_soon(self._preload, disk, amount)
            self.ready.set()
            await self._until_idle()
            nursery.cancel_scope.cancel()

    @property
    def export(self) -> Export | None:
        """What clients get, once it is attached. Raises Refused."""
        return self.disk

    async def opened(self, disk: Disk) -> None:
        """Called once, before anybody has it. Raises ForebayError and OSError, which end it."""

    async def _prepared(self, source: Source) -> Source:
        """The source with the image open. One that the store does not give now, and of which the cache has something,
        is served from that, as a disk is that comes back while its store is away. Raises ForebayError and OSError.
        """
        try:
            await source.prepare()
        except OSError:
            size = self._attaching.cached_size(self.key)
            if size is None:
                raise
            source, _settings = self._attaching.base(self.key, size)
            source.stop_disk = self.stop
        return source

    async def _preload(self, disk: Disk, amount: int | str) -> None:
        """Bring in what the store's settings say, once for each image in the life of the daemon.

        What is cut off, by the end of this or by its store, is done when it is attached again.
        """
        try:
            await disk.preload(amount, lambda _done, _total: None)
        except OSError as error:
            log.warning("%s: preload ended: %s", self.key, error.strerror)
            return
        except ForebayError as error:
            log.warning("%s: no preload: %s", self.key, error)
        self._attaching.preloaded.add(self.key)

    async def _until_idle(self) -> None:
        """Return when nobody has held it for long enough. From then on nobody may."""
        while True:
            while not self.is_idle:
                await self._changed.wait()
            with trio.move_on_after(LINGER_SECONDS):
                while self._lingers():
                    await self._changed.wait()
            if self.is_idle:
                self.is_ending = True
                return

    def _lingers(self) -> bool:
        """True if it may stay for a while although nobody holds it."""
        return self.is_idle and not self._leaves_at_once and self.conflict is None

    async def _close(self, disk: Disk) -> None:
        """Hang up on who is left, and give the image back."""
        for connection in list(self._holders):
            connection.abort()
        with trio.move_on_after(CLOSE_SECONDS):
            while not self.is_idle:
                await self._changed.wait()
            await disk.close(discard=False)
        log.debug("%s: let go", self.key)

    # -- what is told

    def pulse(self) -> tuple[object, ...]:
        """A value that changes whenever something moves, for the watchdog."""
        if self.disk is None:
            return ()
        counters = self.disk.counters
        return self.listener.answered, self.disk.view.hits, counters.origin_read_bytes

    def status(self) -> dict[str, Any]:
        """What is told of it: keys of a disk's status, and who is connected."""
        told: dict[str, Any] = {
            "image": self.key,
            "clients": self.listener.clients,
            "state": "attaching",
            "reason": None,
        }
        if self.disk is None:
            return told
        found = self.disk.status()
        keys = ("size", "mode", "state", "reason", "cached_bytes", "read_hits", "read_misses")
        return told | {key: found[key] for key in (*keys, "read_bytes", "origin_read_bytes")}
