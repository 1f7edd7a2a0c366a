"""An image on this host: its origin, and the clean blocks that all disks on it share."""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator
from dataclasses import astuple
from functools import partial
from typing import Any

import trio

from forebay.errors import ForebayError
from forebay.image.source import Source
from forebay.origin.protocol import Identity, Origin, close_quietly
from forebay.sidecar.record import TakenOver
from forebay_cache import Cache, Filler, Layer, View, invalidate
from forebay_cache.blocks.clean import REGION_SHIFT
from forebay_cache.device.device import Buffer
from forebay_cache.errors import IndexFault
from forebay_cache.format.geometry import SECTOR

log = logging.getLogger("forebay.image")

RETRY_SECONDS = 1.0
"""How soon an origin that could not be reached is tried again; doubled each time, up to RETRY_MOST."""
RETRY_MOST = 15.0
LEAST_PAUSE = 0.05
"""Of a disk's watch, where another one was just trying."""

WATCH_SECONDS = 5.0
"""How often an image is looked at for changes that somebody else made."""


def layer_prefix(disk: str) -> str:
    """How the names of a disk's private layers begin. After it: a number, a colon, the key of the image."""
    return f"disk:{disk}:"


def image_of(layer: Layer) -> str | None:
    """The key of the image whose disk the private layer belongs to; None where an older version made it."""
    parts = layer.name.split(":", 3)
    return parts[3] if len(parts) > 3 else None


class Images:
    """The images in use, each once however many disks lie on it."""

    def __init__(self, cache: Cache, nursery: trio.Nursery) -> None:
        self.cache = cache
        self.nursery = nursery
        self._open: dict[str, Image] = {}

    async def acquire(self, source: Source) -> "Image":
        """The image of a source, which is one user more; reached now if it can be. :meth:`Image.leave` ends it.

        Raises ForebayError where the image has stopped for the disks on it, and this one would be new.
        """
        image = self._open.get(source.key)
        if image is not None and image.conflict is not None and not source.resumed:
            raise ForebayError(f"{image.conflict}, on every disk of it")
        if image is None:
            image = self._open[source.key] = Image(self, source)
        image.sources.append(source)
        source.bind(on_lost=image.stop, dirty_bytes=partial(image.lacks, source))
        # At a start no disk waits for what another one of the image is waiting for already.
        if not (source.resumed and image.being_reached):
            await image.try_reach()
        return image

    def drop_disk(self, disk: str, key: str) -> None:
        """Drop what only the cache has of a disk that is not served; gone with the next commit."""
        layers = self.cache.layers.find_all(layer_prefix(disk))
        for layer in layers:
            self.cache.layers.drop(layer)
        self.cache.records.put("dirty", disk, None)
        if len(layers) > 1:  # a pass may have written to the image under its clean blocks
            image = self._open.get(key)
            clean = self.cache.layers.find(f"image:{key}")
            if image is not None:
                image.refresh()
            elif clean is not None:
                self.cache.layers.drop(clean)

    async def forget(self, image: "Image") -> None:
        """Nobody uses it any more."""
        if self._open.get(image.key) is image:
            del self._open[image.key]
        await image.close()


class Image:
    """One image: `filler` fetches from it, `layer` holds its clean blocks, `origin` is None while it cannot be reached.

    `conflict` says why the image must not be touched: it changed while the cache had data of a disk on it, or somebody
    else has it now. It is set by :meth:`stop` and stays until the last disk on the image is detached.
    """

    def __init__(self, images: Images, source: Source) -> None:
        self.key = source.key
        self.size = source.size
        self.cache = images.cache
        self.sources: list[Source] = []
        self.origin: Origin | None = None
        self.conflict: str | None = None
        self.unreachable: str | None = None
        self.written_bytes = 0
        self.unfinished = False  # a checkpoint may be committed beside the image, and not all in it
        self.caps: dict[str, int] = {}
        """Slots that its disks may have of the cache, by name; 0: no limit."""
        self.copied_by: set[str] = set()
        """Names of the disks that keep all of it."""
        self._images = images
        self._reaching = trio.Lock()
        self._waiting = trio.lowlevel.ParkingLot()  # for an origin, or a conflict
        self._views: list[View] = []
        known = images.cache.records.get("image", self.key)
        self._writing = 0  # writes to the origin under way
        # What an earlier life wrote and did not live to take note of may not be durable yet: that counts as one.
        self._written = int(
            known is not None and known["identity"] is None
        )  # writes ended so far, in whatever way
        self._flushed = 0  # how many of them are durable
        self._noted = 0  # how many the identity on record has seen
        self._failures = 0  # of sync_failures, after how many the cached blocks were dropped
        self._distrusting = trio.Lock()
        self._distrusted = False  # durably on record: the identity is changing
        self._next_try = 0.0
        self._pause = RETRY_SECONDS
        self.layer = self._layer()
        self.filler = Filler(self.cache, self.layer, self, images.nursery)

    @property
    def name(self) -> str:
        """Of the clean layer."""
        return f"image:{self.key}"

    def _layer(self) -> Layer:
        return self.cache.layers.find(self.name) or self.cache.layers.make(self.name, private=False)

    # -- the origin -------------------------------------------------------------------------------------------

    @property
    def being_reached(self) -> bool:
        """Whether an attempt is under way."""
        return self._reaching.locked()

    async def try_reach(self) -> None:
        """Open the origin if it is not; a failure is noted, and tried again when its time has come."""
        async with self._reaching:
            if self.origin is not None or trio.current_time() < self._next_try:
                return
            try:
                origin = await self._open()
                if origin is None:
                    return
                try:
                    await self._compare(origin, await origin.identity())
                except BaseException:
                    await close_quietly(origin)  # with its locks, which the next try has to take
                    raise
            except OSError as error:
                if self.unreachable is None:
                    log.warning("%s cannot be reached: %s", self.key, error.strerror or error)
                self.unreachable = error.strerror or str(error)
                self._next_try = trio.current_time() + self._pause
                self._pause = min(2 * self._pause, RETRY_MOST)
                return
            if self.unreachable is not None:
                log.warning("%s can be reached again", self.key)
            self.unreachable = None
            self._pause = RETRY_SECONDS
            self.origin = origin
            self._waiting.unpark_all()

    async def arrive(self, timeout: float) -> None:
        """Wait until there is an origin; the watch of the disks tries. Raises OSError(EIO) after `timeout` seconds."""
        with trio.move_on_after(timeout):
            while self._is_away():
                await self._waiting.park()
        self.reached()

    def _is_away(self) -> bool:
        return self.origin is None and self.conflict is None

    def look_in(self) -> float:
        """Seconds until it should be looked at."""
        if not self._is_away():
            return WATCH_SECONDS
        return max(LEAST_PAUSE, self._next_try - trio.current_time())

    async def _open(self) -> Origin | None:
        """The origin; None where the image was taken over while the cache has data that it lacks. Raises OSError."""
        source = self.sources[-1]
        try:
            return await source.open()
        except TakenOver as fault:
            self._changed(str(fault))
            if self.conflict is not None:
                return None
        source.begin_anew()
        return await source.open()

    async def _compare(self, origin: Origin, identity: Identity) -> None:
        """Forget what the cache has of an image that somebody else has changed since. Raises OSError."""
        known = self.cache.records.get("image", self.key)
        if known is None or known["identity"] is None:
            if known is not None:
                # We were writing it when we ended unexpectedly; the owner marker kept others out since. What it looks
                # like is noted when it is durable.
                return
        elif tuple(known["identity"]) != astuple(identity):
            await origin.forget()
            self._changed(f"{self.key} was changed by somebody else")
        # With a conflict the one we know stays on record: it is a conflict after a restart too.
        if self.conflict is None:
            self._remember(identity)

    def _changed(self, what: str) -> None:
        if self.has_private():
            self.stop(f"{what} while the cache holds data of a disk on it")
        elif not self._may_refresh():
            self.stop(f"{what}, and on_change is refuse")
        else:
            if self.layer.sectors:
                log.warning("%s: its cached blocks are dropped", what)
            self.refresh()

    def _may_refresh(self) -> bool:
        """Whether to go on with a changed image; one that is just being attached begins anew in any case."""
        return all(s.use.refresh or (self.origin is None and not s.resumed) for s in self.sources)

    def stop(self, why: str) -> None:
        """From now on nothing of the image is read or written, not even from the cache. What is dirty is kept."""
        if self.conflict is None:
            gives = " to give that data up" if self.has_private() else ", and attach it again"
            self.conflict = f"{why}: detach with --discard{gives}"
            log.error("%s", self.conflict)
            self._waiting.unpark_all()
        for view in self._views:
            view.lookahead = 0  # every read asks for leave first

    def has_private(self) -> bool:
        """Whether the cache has data that belongs on the image as it is: that it lacks, or of an overlay."""
        return any(self.lacks(source) for source in self.sources)

    def lacks(self, source: Source) -> int:
        """Bytes that only the cache has of that disk."""
        layers = self.cache.layers.find_all(layer_prefix(source.use.disk))
        return sum(layer.sectors for layer in layers) * SECTOR

    def give_up(self) -> None:
        """The operator dropped what the cache had for an image that changed: its clean blocks go too."""
        self.refresh()
        self.cache.records.put("image", self.key, None)

    def refresh(self) -> None:
        """Drop every clean block; all disks on the image go on without."""
        old = self.layer
        pinned = old.pinned
        self.cache.layers.drop(old)
        self.layer = self._layer()
        self.layer.pinned = pinned
        self.layer.cap = old.cap
        self.filler.overtaken(0, self.size)
        self.filler.layer = self.layer
        for view in self._views:
            if view.clean is old:
                view.clean = self.layer

    def _remember(self, identity: Identity | None) -> None:
        self._distrusted = False
        value: dict[str, Any] = {"identity": None if identity is None else list(astuple(identity))}
        if self.cache.records.get("image", self.key) != value:
            self.cache.records.put("image", self.key, value)

    def share_cap(self) -> None:
        """The clean blocks are shared, so the disk that may have most of them has its way."""
        caps = self.caps.values()
        self.layer.cap = 0 if 0 in caps else max(caps, default=0)

    def watch(self, view: View) -> None:
        """The view follows when the clean blocks are dropped."""
        self._views.append(view)
        if self.conflict is not None:
            view.lookahead = 0

    def reached(self) -> Origin:
        """The origin. Raises OSError(EIO) while there is none."""
        if self.conflict is not None:
            raise OSError(errno.EIO, self.conflict)
        if self.origin is None:
            why = self.unreachable or "no answer"
            raise OSError(errno.EIO, f"{self.key} cannot be reached: {why}")
        return self.origin

    async def read(self, offset: int, length: int, background: bool = False) -> Buffer:
        """Bytes of the origin. Raises OSError."""
        return await self.reached().read(offset, length, background)

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Around each write to the origin and its announcement.

        Before the first one the identity on record is given up, durably: our own writes change it. Raises OSError
        where the origin must not, or cannot, be written.
        """
        self.reached()
        self._writing += 1
        try:
            if not self._distrusted:
                async with self._distrusting:
                    if not self._distrusted:
                        self._remember(None)
                        try:
                            await self.cache.commit.records()
                        except IndexFault:
                            if self.has_private():
                                raise
                            # Killed now, the next start takes our writes for somebody else's, and forgets clean blocks.
                        self._distrusted = True
            yield
        finally:
            self._writing -= 1
            self._written += 1

    async def flush(self, *, times: bool = False) -> None:
        """Make the writes that have ended durable, with the image's `times` if asked. Raises OSError.

        What has ended so far of those under way, too: a pass, which counts as one, consists of many.
        """
        written = self._written
        if self._flushed != written or self._writing or times:
            try:
                await self.reached().flush(times=times)
            finally:
                await self._drop_lost()
            self._flushed = max(self._flushed, written)

    async def _drop_lost(self) -> None:
        """Forget what was written since a flush went well, if one failed: the image may have lost it.

        It can read as written for a while, from its host's memory, and no later flush says that it is gone. So its
        regions stay hot, too: after a power cut what was cached of them since is dropped.
        """
        while self._failures != self.sync_failures:
            failures = self.sync_failures
            try:
                for region in [r for ident, r in self.cache.hot.regions if ident == self.layer.id]:
                    await invalidate(
                        self.cache, self.layer, region << REGION_SHIFT, 1 << REGION_SHIFT
                    )
                    await trio.lowlevel.checkpoint()
            except OSError as error:  # it cannot be recorded block by block
                log.warning("%s: all cached blocks are dropped: %s", self.key, error.strerror)
                self.refresh()
            self._failures = failures

    def _cool(self) -> None:
        if not self.sync_failures:
            self.cache.hot.cool(self.layer.id)

    @property
    def sync_failures(self) -> int:
        """How often a flush of the origin failed, whoever asked for it: each time something may be lost."""
        return self.origin.sync_failures if self.origin is not None else 0

    def _at_rest(self) -> bool:
        """Whether nothing is being written, or will be at the next start, and all that was is durable."""
        return not (self._writing or self.unfinished) and self._flushed == self._written

    def all_durable(self) -> bool:
        """Whether no write is under way, and the origin has all that were made, durably."""
        return not self._writing and self._flushed == self._written

    # -- the watch --------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Notice a change by somebody else, or take down what the image looks like after our own writes."""
        if self.origin is None or self.conflict is not None:
            return
        try:
            for source in list(self.sources):
                await source.check()
            if self.conflict is None:
                await self._take_note(self.origin)
        except OSError as error:
            if error.errno == errno.ESTALE:
                self.stop(error.strerror or f"{self.key} is another file now")

    async def _take_note(self, origin: Origin) -> None:
        """Compare what the image looks like with what is on record, or put it there after our own writes."""
        written = self._written
        await origin.settle()  # a write that was given up can still change it
        if not self._writing:
            await self.flush(times=self._noted != written)
        await self._drop_lost()
        identity = await origin.identity()
        if identity.size != self.size:
            self.stop(f"{self.key} has {identity.size} bytes and had {self.size}")
            return
        if self._written != written or not self._at_rest():
            return
        if self._noted != written:
            self._noted = written
            self._remember(identity)
            self._cool()
            return
        known = self.cache.records.get("image", self.key)
        if known is not None and known["identity"] is not None:
            await self._compare(origin, identity)

    # -- the end ----------------------------------------------------------------------------------------------

    async def leave(self, source: Source, view: View) -> None:
        """One user less; the last one closes the origin."""
        self.sources.remove(source)
        if view in self._views:
            self._views.remove(view)
        if not self.sources:
            await self._images.forget(self)

    async def close(self) -> None:
        """Take note of what the image looks like, if that can be done, and let the origin go."""
        origin = self.origin
        if origin is None:
            return
        try:
            if self.conflict is None:
                await self._take_note(origin)
        except OSError as error:
            log.warning("%s: %s", self.key, error.strerror)
        self.origin = None
        await origin.close()
