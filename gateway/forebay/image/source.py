"""The source of one disk: its image, opened when it can be, with the claim on it where the disk writes to it."""

import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from forebay.errors import ForebayError
from forebay.origin.addresses import Address, DeviceAddress, FileAddress
from forebay.origin.block import BlockOrigin
from forebay.origin.file import FileOrigin
from forebay.origin.mounts import unsafe
from forebay.origin.nbd import NbdOrigin
from forebay.origin.opening import OpenImage, open_device, open_image
from forebay.origin.protocol import Origin
from forebay.origin.threads import Descriptor, StoreThreads, bounded
from forebay.sidecar.claim import Claim
from forebay.sidecar.locks import LOOKS, READS, WRITES, Access, InUse, NoLocks, hold
from forebay.sidecar.marker import read_owner
from forebay.sidecar.record import Owner, TakenOver, in_use
from forebay.sidecar.redo import Redo
from forebay.units import Mode
from forebay_cache.blocks.frozen import Range

log = logging.getLogger("forebay.origin")

START_SECONDS = 2.0
"""What a store may take at the daemon's start before its disks come up without it. Local ones need milliseconds, and
QEMU's reconnect-delay is tens of seconds."""


@dataclass(frozen=True)
class Use:
    """What a disk does with its image: writes it, lies over it, or reads it only."""

    disk: str
    gateway: str
    read_only: bool = False
    overlay: bool = False
    need_locks: bool = True
    """Whether an image without file locks is refused."""
    refresh: bool = True
    """Whether to go on with an image that somebody else changed, from what it has now, where nothing is lost by it."""

    @property
    def writes(self) -> bool:
        """Whether the image itself is written."""
        return not (self.read_only or self.overlay)


class Source:
    """An image for one disk. `key` names it for ever; `label` is what the operator wrote.

    `size` in bytes: as recorded, or what the first `open` found. It never changes under a disk: an image that has
    another one is refused.
    """

    def __init__(
        self,
        image: Address,
        label: str,
        use: Use,
        *,
        threads: StoreThreads,
        timeout: float,
        nursery: trio.Nursery,
        size: int | None = None,
    ) -> None:
        """`nursery`: for connections. `size`: as recorded when the disk was attached; None at the first time."""
        self.image = image
        self.key = image.key
        self.label = label
        self.use = use
        self.file_id: tuple[int, int] | None = None
        self.unsafe: str | None = None
        """Why nothing is to be written back to where the image lies; known once it was opened."""
        self._size = size
        self._threads = threads
        self._timeout = timeout
        self._nursery = nursery
        self._claim: Claim | None = None
        self._origin: Origin | None = None  # the last one handed out
        self._prepared: Origin | None = None
        self.resumed = (
            size is not None
        )  # it comes back after a restart: its clients are still there
        self.on_lost: Callable[[str], None] = log.error
        self.dirty_bytes: Callable[[], int] = lambda: 0  # that the image lacks
        self.left_by: Callable[[str], int] = lambda _: 0
        """Bytes that the cache has of a disk of that name which is not served."""
        self._lost: str | None = None
        self._hurried = self.resumed
        self._ours = self.resumed and self.marker is not None  # a marker was left at the last end

    @property
    def size(self) -> int:
        """Bytes."""
        assert self._size is not None, "neither recorded nor opened"
        return self._size

    @property
    def marker(self) -> "Source | None":
        """Where to say whether the image lacks data (`dirty`, `clean`); None for a disk that never writes it."""
        return self if self.use.writes and isinstance(self.image, FileAddress) else None

    def same_image(self, other: "Source") -> bool:
        """Whether both lead to one image, be it by two stores or two mounts."""
        if self.file_id is not None and self.file_id == other.file_id:
            return True
        return self.key == other.key or _path(self.image) == _path(other.image) != ""

    def check_safe(self, mode: Mode) -> None:
        """Raise ForebayError where a disk in that mode acknowledges what its store may lose later without a word."""
        if (
            self.unsafe is not None
            and self.use.writes
            and mode in (Mode.WRITE_BACK, Mode.FULL_COPY)
        ):
            raise ForebayError(
                f"{self.key}: {mode.value} needs a store that keeps what it took, and {self.unsafe}, "
                "or use --mode write-through"
            )

    async def prepare(self) -> None:
        """Open the image now, for the next `open` to hand out. For attach: a fault shows before anything is changed.

        Raises ForebayError, and OSError from failing storage.
        """
        self._prepared = await self._open(first=True)

    async def open(self) -> Origin:
        """An origin, claimed if the disk writes. Raises OSError, also for what an operator has to put right, and
        TakenOver: `begin_anew` then, or never open it again.

        The first attempt after a restart is short: a disk that is warm must not wait for a store that hangs.
        """
        if self._prepared is not None:
            self._origin, self._prepared = self._prepared, None
            return self._origin
        hurried, self._hurried = self._hurried, False
        patience = START_SECONDS if hurried else float("inf")
        try:
            with bounded(patience, f"opening {self.label}"):
                self._origin = await self._open(first=False)
        except TakenOver:
            raise
        except ForebayError as fault:
            raise OSError(errno.EIO, str(fault)) from fault
        return self._origin

    def begin_anew(self) -> None:
        """Nothing is left of what we had of the image, so it may be claimed as if for the first time."""
        self._ours = False

    async def close_prepared(self) -> None:
        """Another disk on the same image was there before: its origin serves both."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await _closed(prepared)

    async def _open(self, first: bool) -> Origin:
        origin = await self._opened(first)
        if self._size is None:
            self._size = origin.size
        if origin.size != self._size:
            await _closed(origin)
            raise ForebayError(
                f"{self.label} has {origin.size} bytes and had {self._size}: detach the disk and attach it again"
            )
        return origin

    async def _opened(self, first: bool) -> Origin:
        image, read_only = self.image, not self.use.writes
        if isinstance(image, FileAddress):
            file = await self._in_thread(
                lambda: open_image(image, read_only=read_only, any_format=not first)
            )
            origin = FileOrigin(file, self.label, threads=self._threads, timeout=self._timeout)
            try:
                if file.status is not None:
                    place = file.status.device
                    self.unsafe = await self._threads.run(
                        lambda: unsafe(place, locks=self.use.need_locks)
                    )
                if self.use.writes:
                    await self._take(image, file, origin.descriptor)
                else:
                    await self._share(image, file, origin.descriptor)
            except BaseException:
                await _closed(origin)
                raise
            return origin
        if isinstance(image, DeviceAddress):
            file = await self._in_thread(lambda: open_device(image, read_only=read_only))
            device = BlockOrigin(file, self.label, threads=self._threads, timeout=self._timeout)
            try:
                await self._lock(device.descriptor, READS if read_only else WRITES)
            except BaseException:
                await _closed(device)
                raise
            return device
        return await NbdOrigin.open(
            self._nursery, image, self.label, read_only=read_only, timeout=self._timeout
        )

    async def _in_thread(self, do: Callable[[], OpenImage]) -> OpenImage:
        with bounded(self._timeout, f"opening {self.label}"):
            return await self._threads.run(do, drop=lambda late: os.close(late.fd))

    # ------------------------------------------------------------------------------------------------------- the owner

    async def _share(self, image: FileAddress, file: OpenImage, descriptor: Descriptor) -> None:
        """Read the image: nobody is to write it meanwhile, unless a gateway does that already."""
        self._identified(file)
        owner = await self._owner(image)
        if owner is None or owner.gateway == self.use.gateway:
            if self.use.overlay:
                self._check_left(owner)
            await self._lock(descriptor, READS)
            return
        if self.use.overlay:
            raise ForebayError(
                f"{self.key} is written by {owner}, and an overlay needs an image that stays as it is: "
                "detach it there first"
            )
        log.warning("%s is written by %s: '%s' may read old data", self.key, owner, self.use.disk)
        # its writes, and its restart, are not to fail because of us
        await self._lock(descriptor, LOOKS)

    async def _owner(self, image: FileAddress) -> Owner | None:
        with bounded(self._timeout, f"looking for the owner of {self.label}"):
            return await self._threads.run(lambda: read_owner(image))

    def _check_left(self, owner: Owner | None) -> None:
        """A disk of this gateway that cannot be served now may have what the image lacks. Raises ForebayError."""
        if owner is None or owner.state == "clean" or owner.gateway != self.use.gateway:
            return
        left = 0 if owner.disk == self.use.disk else self.left_by(owner.disk)
        if left:
            raise ForebayError(
                f"{self.key} lacks {left} bytes that disk '{owner.disk}' of this gateway has: bring that disk back "
                f"('forebay status' says why it is not served), or give them up: forebay detach {owner.disk} --discard"
            )

    def _identified(self, file: OpenImage) -> None:
        if file.status is not None:
            self.file_id = (file.status.device, file.status.inode)

    async def _lock(self, descriptor: Descriptor, access: Access) -> None:
        """QEMU's locks, where no marker comes with them. Raises ForebayError."""

        def lock() -> None:
            with descriptor as fd:
                hold(fd, access)

        try:
            with bounded(self._timeout, f"locking {self.label}"):
                await self._threads.run(lock)
        except InUse as fault:
            raise in_use(self.key, fault) from None
        except NoLocks as error:
            log.info("%s: no file locks: %s", self.key, error.strerror)

    async def _take(self, image: FileAddress, file: OpenImage, descriptor: Descriptor) -> None:
        self._identified(file)
        need_locks = self.use.need_locks
        if self._claim is not None:
            await self._claim.admit(file, descriptor, need_locks=need_locks)
            return
        self._check_left(await self._owner(image))
        me = Owner.of_this_process(self.use.gateway, self.use.disk)
        self._claim = await Claim.take(
            image,
            file,
            me,
            self._threads,
            self._timeout,
            again=self._ours,
            need_locks=need_locks,
            descriptor=descriptor,
        )
        self._ours = True

    async def check(self) -> None:
        """See that the image is still ours to write, if it was. Raises OSError, after `on_lost` when it is not."""
        if self._claim is not None:
            async with self._ours_or_lost() as claim:
                await claim.check(self.dirty_bytes())

    async def dirty(self) -> None:
        """Durably on record: the image lacks data that this gateway has. Raises OSError, also before the first open."""
        async with self._ours_or_lost() as claim:
            await claim.dirty()

    @property
    def is_dirty(self) -> bool:
        """Whether that is on record now, or may be. False before the first open."""
        return self._claim is not None and self._claim.is_dirty

    async def clean(self) -> None:
        """Durably on record: the image has everything. Raises OSError."""
        async with self._ours_or_lost() as claim:
            await claim.clean()

    async def begin_redo(self, as_of: str) -> "Journal":
        """A redo journal for a checkpoint of that instant. Raises OSError."""
        async with self._ours_or_lost() as claim:
            journal = await claim.begin_redo(as_of)
        return Journal(self, journal, as_of, self._threads, self._timeout)

    async def commit_redo(self, journal: Redo) -> None:
        """See `Journal`. Raises OSError."""
        async with self._ours_or_lost() as claim:
            await claim.commit_redo(journal)

    async def drop_redo(self, journal: Redo) -> None:
        """See `Journal`. Raises OSError."""
        await self._held().drop_redo(journal)

    async def end_redo(self, as_of: str, dirty_bytes: int) -> None:
        """See `Journal`. Raises OSError."""
        async with self._ours_or_lost() as claim:
            await claim.end_redo(as_of, dirty_bytes)

    @asynccontextmanager
    async def _ours_or_lost(self) -> AsyncIterator[Claim]:
        """The claim. Once somebody else has the image it is lost for good, which is an OSError each time."""
        if self._lost is not None:
            raise OSError(errno.EIO, self._lost)
        try:
            yield self._held()
        except TakenOver as fault:
            self._lost = str(fault)
            self.on_lost(self._lost)
            raise OSError(errno.EIO, self._lost) from fault

    def _held(self) -> Claim:
        if self._claim is None:
            raise OSError(
                errno.EIO, f"{self.label} was not reached yet, so it is not ours to write"
            )
        return self._claim

    async def release(self) -> None:
        """Let the image go, and take the marker away. The origins that were handed out are closed already.

        Raises OSError and ForebayError; the marker then stays: a write that hangs could still arrive.
        """
        if self._origin is not None:
            await self._origin.settle()
        if self._prepared is None and self._claim is None and self.marker is not None:
            try:
                self._prepared = await self._open(first=False)  # ours from before a restart
            except TakenOver:
                return
        if self._claim is not None:
            try:
                # what the image lacked was brought home, or dropped on purpose
                await self._claim.clean()
            except TakenOver:  # the marker is another's, and stays
                await self.leave()
        await self.abandon()

    async def abandon(self) -> None:
        """After an attach that failed: give back what it took, and no more. Raises OSError."""
        await self.close_prepared()
        claim, self._claim = self._claim, None
        if claim is not None:
            await claim.release()

    async def leave(self) -> None:
        """Let the image go and leave the marker, which says whose it is: what a restart does. Raises OSError."""
        claim, self._claim = self._claim, None
        if claim is not None:
            await claim.close()


class Journal:
    """A redo journal (see `redo.py`), off the event loop. Everything raises OSError."""

    def __init__(
        self, source: Source, journal: Redo, as_of: str, threads: StoreThreads, timeout: float
    ) -> None:
        self._source = source
        self._length = 0
        self._journal = journal
        self._as_of = as_of
        self._threads = threads
        self._timeout = timeout

    async def add(self, ranges: list[Range]) -> None:
        """Some of the checkpoint. The data must not change any more."""
        self._length += sum(r.length for r in ranges)
        with bounded(self._timeout, "writing a checkpoint"):
            await self._threads.run(lambda: self._journal.add_all(ranges), background=True)

    async def commit(self) -> None:
        """From now on the checkpoint will be in the image, whatever happens."""
        await self._source.commit_redo(self._journal)

    async def drop(self) -> None:
        """It is not to be."""
        await self._source.drop_redo(self._journal)

    async def end(self) -> None:
        """The image has all of it, durably."""
        left = max(0, self._source.dirty_bytes() - self._length)
        await self._source.end_redo(self._as_of, left)


def _path(image: Address) -> str:
    if isinstance(image, FileAddress):
        return str(image.root / image.path)
    return image.path if isinstance(image, DeviceAddress) else ""


async def _closed(origin: Origin) -> None:
    with trio.CancelScope(shield=True), contextlib.suppress(OSError):
        await origin.close()
