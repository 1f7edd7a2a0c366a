"""An image on this host, which all disks on it share: whether it can be touched, its clean blocks, our writes to it."""

import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import trio

from forebay.image.boundary import Boundary
from forebay.image.clean import CleanBlocks
from forebay.image.identity import KnownIdentity
from forebay.image.names import layer_prefix
from forebay.image.reach import Reach
from forebay.image.source import Source
from forebay.image.writes import OwnWrites
from forebay.origin.protocol import Identity, Origin
from forebay.sidecar.record import TakenOver
from forebay_cache import Cache, Layer, View
from forebay_cache.device.device import Buffer
from forebay_cache.format.geometry import SECTOR

log = logging.getLogger("forebay.image")


class Image:
    """One image. `Images` (registry.py) makes it for the first disk on it, and closes it after the last.

    It is put together from `reach` (its origin, and whether it may be touched), `clean` (its clean blocks), `identity`
    (what it is known to look like) and our writes to it.
    """

    def __init__(
        self,
        cache: Cache,
        nursery: trio.Nursery,
        source: Source,
        on_unused: Callable[["Image"], Awaitable[None]],
    ) -> None:
        """`source` is that of the first disk. `nursery` runs fetches; `on_unused` is called when the last disk left."""
        self.key = source.key
        self.size = source.size
        self.cache = cache
        self.sources: list[Source] = []
        """Those of the disks on it, the one that came last at the end."""
        self.identity = KnownIdentity(cache, self.key)
        self.reach = Reach(self.key, self._open, self._compare_now)
        fetches = Boundary(nursery, f"image {self.key}", self._stop_disks)
        self.clean = CleanBlocks(cache, self.key, self, fetches)
        self.filler = self.clean.filler
        """What fetches missing blocks from the origin."""
        self._writes = OwnWrites(cache, self.identity, self.reach, self.clean, self.has_private)
        self._on_unused = on_unused

    # ----------------------------------------------------------------------------------------------------- its origin

    @property
    def origin(self) -> Origin | None:
        """The open origin; None while it cannot be reached, and after the image is closed."""
        return self.reach.origin

    @property
    def conflict(self) -> str | None:
        """Why the image must not be touched, and what to do; None if it may be. It stays until the image is closed."""
        return self.reach.conflict

    @property
    def layer(self) -> Layer:
        """The layer of its clean blocks; another one after a change by somebody else."""
        return self.clean.layer

    def require_origin(self) -> Origin:
        """The open origin of an image that may be touched. Raises OSError(EIO), which says why there is none."""
        return self.reach.require_origin()

    async def read(self, offset: int, length: int, background: bool = False) -> Buffer:
        """Exactly `length` bytes of the image. Raises OSError."""
        return await self.reach.require_origin().read(offset, length, background)

    async def _open(self) -> Origin | None:
        """A new origin; None where the image was taken over while the cache has data that it lacks. Raises OSError."""
        source = self.sources[-1]
        try:
            return await source.open()
        except TakenOver as fault:
            self._note_change(str(fault))
            if self.conflict is not None:
                return None
        source.begin_anew()
        return await source.open()

    # --------------------------------------------------------------------------------------------------------- writes

    def writing(self) -> AbstractAsyncContextManager[None]:
        """Around each write to the origin and its announcement to the cache: as `OwnWrites.writing`. Raises OSError."""
        return self._writes.writing()

    async def flush(self, *, times: bool = False) -> None:
        """Make durable what was written, with the image's times if asked: see `OwnWrites.flush`. Raises OSError."""
        await self._writes.flush(times=times)

    @property
    def sync_failures(self) -> int:
        """How many flushes of the origin failed, whoever asked for them: each time something may be lost."""
        return self._writes.sync_failures

    def is_all_durable(self) -> bool:
        """True if no write is under way, and the image has all that were made, durably."""
        return self.identity.is_all_durable()

    # ----------------------------------------------------------------------------------------- changes by somebody else

    async def look(self) -> None:
        """Notice a change by somebody else, or take down what the image looks like after our own writes.

        Raises nothing: a store that fails now is looked at again later.
        """
        origin = self.origin
        if origin is None or self.conflict is not None:
            return
        try:
            for source in list(self.sources):
                await source.check()
            if self.conflict is None:
                await self._take_note(origin)
        except OSError as error:
            if error.errno == errno.ESTALE:
                self.stop(error.strerror or f"{self.key} is another file now")

    async def _take_note(self, origin: Origin) -> None:
        """Compare what the image looks like with what is on record, or put it there after our own writes.

        Raises OSError.
        """
        ended = self.identity.writes_ended
        await origin.settle()  # a write that was given up can still change it
        if not self.identity.is_being_written():
            await self.flush(times=not self.identity.is_noted(ended))
        await self._writes.drop_lost()
        found = await origin.identity()
        if found.size != self.size:
            self.stop(f"{self.key} has {found.size} bytes and had {self.size}")
        elif self.identity.writes_ended != ended or not self.identity.is_at_rest():
            return
        elif not self.identity.is_noted(ended):
            self.identity.note(found, ended)
            if not self.sync_failures:
                self.clean.cool()
        elif self.identity.is_on_record():
            await self._compare(origin, found)

    async def _compare_now(self, origin: Origin) -> None:
        """`_compare` with what the image looks like now."""
        await self._compare(origin, await origin.identity())

    async def _compare(self, origin: Origin, found: Identity) -> None:
        """Forget what the cache has of an image that somebody else has changed since. Raises OSError."""
        if self.identity.is_given_up():
            # We were writing it when we ended unexpectedly; the owner marker kept others out since. What it looks like
            # is noted when it is durable.
            return
        if self.identity.differs_from(found):
            await origin.forget()
            self._note_change(f"{self.key} was changed by somebody else")
        # With a conflict the one we know stays on record: it is a conflict after a restart too.
        if self.conflict is None:
            self.identity.remember(found)

    def _note_change(self, what: str) -> None:
        """Stop, or go on with an image that somebody else has changed, and nothing of what the cache had of it."""
        if self.has_private():
            self.stop(f"{what} while the cache holds data of a disk on it")
        elif not self._may_refresh():
            self.stop(f"{what}, and on_change is refuse")
        else:
            if self.layer.sectors:
                log.warning("%s: its cached blocks are dropped", what)
            self.clean.refresh()

    def _may_refresh(self) -> bool:
        """True if all disks may go on with a changed image; one that is just being attached begins anew in any case."""
        return all(s.use.refresh or (self.origin is None and not s.resumed) for s in self.sources)

    def stop(self, why: str) -> None:
        """From now on nothing of the image is read or written, not even from the cache. What is dirty is kept."""
        if self.conflict is None:
            gives = " to give that data up" if self.has_private() else ", and attach it again"
            self.reach.stop(f"{why}: detach with --discard{gives}")
        self.clean.stop_reading_ahead()

    def _stop_disks(self, fault: Exception) -> None:
        """A fetch has ended with a fault of Forebay itself: all disks on the image stop, with that as their reason."""
        for source in list(self.sources):
            source.stop_disk(fault)

    def has_private(self) -> bool:
        """True if the cache has data that belongs on the image as it is: that it lacks, or of an overlay."""
        return any(self.lacks(source) for source in self.sources)

    def lacks(self, source: Source) -> int:
        """Bytes that only the cache has of the disk with that source."""
        layers = self.cache.layers.find_all(layer_prefix(source.use.disk))
        return sum(layer.sectors for layer in layers) * SECTOR

    def give_up(self) -> None:
        """Drop the clean blocks of an image that changed, as the operator dropped what the cache had for it."""
        self.clean.refresh()
        self.identity.forget()

    # ---------------------------------------------------------------------------------------------------------- disks

    def watch(self, view: View) -> None:
        """Have the view of a disk follow when the clean blocks are dropped."""
        self.clean.watch(view)
        if self.conflict is not None:
            view.lookahead = 0

    async def leave(self, source: Source, view: View) -> None:
        """End the use of the image by one disk. The last one closes it."""
        self.sources.remove(source)
        self.clean.unwatch(view)
        if not self.sources:
            await self._on_unused(self)

    async def close(self) -> None:
        """Take note of what the image looks like, if that can be done, and let the origin go. Raises OSError."""
        origin = self.origin
        if origin is not None and self.conflict is None:
            try:
                await self._take_note(origin)
            except OSError as error:
                log.warning("%s: %s", self.key, error.strerror)
        await self.reach.close()
