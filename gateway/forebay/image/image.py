# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image on this host, which all disks on it share: whether it can be touched, its clean blocks, our writes to it."""

import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import trio

from forebay.image.boundary import Boundary
from forebay.image.clean import CleanBlocks
from forebay.image.identity import KnownIdentity
from forebay.image.kept import KeptInAll
from forebay.image.reach import Reach
from forebay.image.source import ResizedError, Source
from forebay.image.sources import Sources
from forebay.image.writes import OwnWrites
from forebay.origin.calls import MAYBE_DEAD
from forebay.origin.file import FreshFile
from forebay.origin.protocol import Identity, Origin
from forebay.origin.threads import Background
from forebay.sidecar.record import TakenOver
from forebay_cache import Cache, Layer, View
from forebay_cache.format.geometry import Buffer

log = logging.getLogger("forebay.image")


class Image:
    """One image. `Images` (registry.py) makes it for the first disk on it, and closes it after the last.

    It is put together from `sources` (the disks on it), `reach` (its origin, and whether it may be touched), `clean`
    (its clean blocks), `identity` (what it is known to look like) and our writes to it.
    """

    def __init__(
        self,
        cache: Cache,
        nursery: trio.Nursery,
        source: Source,
        on_unused: Callable[["Image"], Awaitable[None]],
        in_all: KeptInAll,
    ) -> None:
        """`source` is that of the first disk. `nursery` runs fetches; `on_unused` is called when the last disk left.

        `in_all` counts what is kept of all images together.
        """
        self.key = source.key
        self.size = source.size
        self.cache = cache
        self.sources = Sources(cache)
        """Those of the disks on it."""
        self.identity = KnownIdentity(cache, self.key)
        self.reach = Reach(self.key, self._open, self._compare_now, self.sources.let_go)
        self.reach.withheld = source.withheld
        fetches = Boundary(nursery, f"image {self.key}", self.sources.stop_disks)
        self.clean = CleanBlocks(cache, self.key, self, fetches)
        self.filler = self.clean.filler
        """What fetches missing blocks from the origin."""
        self.writes = OwnWrites(
            cache,
            self.key,
            self.identity,
            self.reach,
            self.clean,
            self.sources.has_private,
            in_all,
        )
        self._on_unused = on_unused

    def follow_timeouts(self) -> None:
        """Have the open origin wait as long as the disks on it want to, now."""
        if self.origin is not None and not self.sources.is_empty():
            self.origin.timeout = self.sources.timeout

    # ----------------------------------------------------------------------------------------------------- its origin

    @property
    def origin(self) -> Origin | None:
        """The open origin; None while it cannot be reached, and after the image is closed."""
        return self.reach.origin

    @property
    def fresh(self) -> FreshFile | None:
        """What reads an image that is about to come from another host, of which nothing is cached; else None."""
        is_away = self.origin is None and self.conflict is None
        return self.sources.latest.fresh if is_away else None

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

    async def read(self, offset: int, length: int, background: Background = False) -> Buffer:
        """Exactly `length` bytes of the image, from `offset` on. Raises OSError."""
        return await self.reach.made_again(
            lambda: self.reach.require_origin().read(offset, length, background)
        )

    async def _open(self) -> Origin | None:
        """A new origin; None where the image was taken over while the cache has data that it lacks. Raises OSError."""
        source = self.sources.latest
        try:
            return await self._opened(source)
        except TakenOver as fault:
            if isinstance(fault, ResizedError) or source.withheld:
                self.stop(str(fault))
            else:
                self._note_change(str(fault))
            if self.conflict is not None:
                return None
        self.identity.note_durable(self.identity.writes_ended)  # it is not ours to flush
        await source.begin_anew()
        try:
            return await self._opened(source)
        except TakenOver as fault:
            raise OSError(errno.EIO, str(fault)) from fault

    async def _opened(self, source: Source) -> Origin:
        """A new origin, which waits as long as the disks on the image want to. As `Source.open`."""
        origin = await source.open()
        if not self.sources.is_empty():
            origin.timeout = self.sources.timeout
        return origin

    # --------------------------------------------------------------------------------------------------------- writes

    def writing(self) -> AbstractAsyncContextManager[None]:
        """Around each write to the origin and its announcement to the cache: as `OwnWrites.writing`. Raises OSError."""
        return self.writes.writing()

    async def flush(self, *, times: bool = False) -> None:
        """Make durable what was written, with the image's times if asked: see `OwnWrites.flush`. Raises OSError."""
        await self.writes.flush(times=times)

    @property
    def sync_failures(self) -> int:
        """How many flushes of the origin failed, whoever asked for them: each time something may be lost."""
        return self.writes.sync_failures

    def is_all_durable(self) -> bool:
        """True if no write is under way, and the image has all that were made, durably."""
        return not self.identity.needs_flush()

    # ----------------------------------------------------------------------------------------- changes by somebody else

    async def look(self) -> None:
        """Notice a change by somebody else, or take down what the image looks like after our own writes.

        Raises nothing: a store that fails now is looked at again later.
        """
        origin = self.origin
        if origin is None or self.conflict is not None:
            return
        try:
            await self.sources.check()
            if self.conflict is None:
                await self._take_note(origin)
        except OSError as error:
            if error.errno in MAYBE_DEAD and await self.reach.renew(origin):
                return
            if error.errno == errno.ESTALE:
                await self._stop_if_gone(origin)

    async def _stop_if_gone(self, origin: Origin) -> None:
        """Stop where the origin is another image by now, or gone. One whose server fails may come back."""
        try:
            await origin.identity()
        except OSError as error:
            if error.errno == errno.ESTALE:
                why = error.strerror or ""
                named = self.key in why or self.sources.latest.label in why
                self.stop(why if named else f"{self.key} is gone, or another file now ({why})")

    async def _take_note(self, origin: Origin) -> None:
        """Compare what the image looks like with what is on record, or put it there after our own writes.

        Raises OSError.
        """
        ended = self.identity.writes_ended
        await origin.quiesce()  # a write that was given up can still change it
        if not self.identity.is_being_written():
            await self.flush(times=not self.identity.is_noted(ended))
        await self.writes.drop_lost()
        found = await origin.identity()
        # no await until self._compare: what was found would be noted for a write that ended after it
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
        what = ""
        if self.identity.is_of_another_file(found):
            what = "was replaced by another file"
        elif self.identity.is_withdrawn() and not self.identity.is_of_before(found):
            # We were writing it when we ended unexpectedly; the owner marker kept others out since. What it looks like
            # is noted when it is durable.
            return
        elif self.identity.is_withdrawn() or self.identity.differs_from(found):
            what = "was changed by somebody else"
        if what:
            await origin.forget()
            self._note_change(f"{self.key} {what}")
        # With a conflict the one we know stays on record: it is a conflict after a restart too.
        if self.conflict is not None:
            return
        self.identity.remember(found)
        if what:
            # What is written from here on is for the image as it is now. Were the other one still on record after a
            # crash, there would be a conflict about it.
            with contextlib.suppress(OSError):
                await self.cache.commit.records()

    def _note_change(self, what: str) -> None:
        """Stop, or go on with an image that somebody else has changed, and nothing of what the cache had of it."""
        if self.sources.has_private():
            self.stop(f"{what} while the cache holds data of a disk on it")
        elif not self.writes.kept.is_empty:
            self.stop(f"{what} before all that was written to it was durable")
        elif not self.sources.may_refresh(is_reached=self.origin is not None):
            self.stop(f"{what}, and on_change is refuse")
        else:
            if self.layer.sectors:
                level = logging.INFO if self.sources.are_withheld() else logging.WARNING
                log.log(level, "%s: its cached blocks are dropped", what)
            self.clean.refresh()

    def stop(self, why: str) -> None:
        """From now on nothing of the image is read or written, not even from the cache. What is dirty is kept."""
        if self.conflict is None:
            disk = self.sources.name_of_one() or "DISK"
            if self.sources.are_bases():
                what = "it is served as it is now when nobody reads it by the socket of its store any more"
            elif self.sources.has_private():
                what = f"'forebay resolve {disk}' keeps that data, or the image, or saves the data elsewhere"
            else:
                what = f"'forebay resolve {disk} --keep-image' goes on with it as it is now"
            self.reach.stop(f"{why}: {what}")
        self.clean.stop_reading_ahead()

    def begin_anew(self) -> None:
        """Drop the clean blocks of an image that changed, and what it looked like: for a disk that was discarded."""
        self.clean.refresh()
        self.identity.remove()

    # ---------------------------------------------------------------------------------------------------------- disks

    def watch(self, view: View) -> None:
        """Have the view of a disk follow when the clean blocks are dropped."""
        self.clean.watch(view)
        if self.conflict is not None:
            view.lookahead = 0

    async def leave(self, source: Source, view: View | None = None) -> None:
        """End the use of the image by one disk, which saw it by `view`, or by a warm. The last one closes it."""
        self.sources.remove(source)
        if view is not None:
            self.clean.unwatch(view)
        self.follow_timeouts()
        if self.sources.is_empty():
            await self._on_unused(self)

    async def close(self) -> None:
        """Take note of what the image looks like, if that can be done, and let the origin go.

        A store that fails now keeps no disk from being detached: what was acknowledged was flushed before.
        """
        origin = self.origin
        if origin is not None and self.conflict is None:
            try:
                await self._take_note(origin)
            except OSError as error:
                log.warning("%s: %s", self.key, error.strerror)
        if self.identity.is_withdrawn() and self.conflict is None:
            # Perhaps no marker keeps others out any more, and nothing could tell what they write from what we wrote.
            # Which file it is stays on record: the cache may hold data of a disk that is only taken down.
            self.clean.refresh()
        self.writes.kept.forget(self.writes.kept.position)
        try:
            await self.reach.close()
        except OSError as error:
            log.warning("%s: closing it: %s", self.key, error.strerror)
