# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Our own writes to an image: what comes before the first, what makes them durable, and what a failed flush costs."""

import contextlib
import errno
import logging
import math
from collections.abc import AsyncIterator, Callable

import trio

from forebay.image.clean import CleanBlocks
from forebay.image.identity import KnownIdentity
from forebay.image.kept import Change, KeptInAll, KeptWrites
from forebay.image.reach import Reach
from forebay.origin.calls import MAYBE_DEAD
from forebay.origin.protocol import Origin
from forebay_cache import Cache
from forebay_cache.errors import IndexFault

log = logging.getLogger("forebay.image")

ASK_SECONDS, ASK_STEP = 2.0, 0.01
"""How long a TRIM waits for what the origin says to the question whether it can give space back, and for the moment to
ask it."""

ASK_AGAIN_SECONDS = 15.0
"""How soon it is asked again where it did not say."""


class OwnWrites:
    """Counts the writes of all disks to one image, and flushes them."""

    def __init__(
        self,
        cache: Cache,
        key: str,
        identity: KnownIdentity,
        reach: Reach,
        clean: CleanBlocks,
        has_private: Callable[[], bool],
        in_all: KeptInAll,
    ) -> None:
        """`key` names the image in messages. `has_private` returns True if the cache has data that belongs on the image
        as it is.
        """
        self._cache = cache
        self._identity = identity
        self._reach = reach
        self._clean = clean
        self._has_private = has_private
        self._withdrawing = trio.Lock()
        self.kept = KeptWrites(in_all)
        """What was written past write-back, until it is durable."""
        self.trouble: str | None = None
        """Why the last flush failed, where that may have lost something; None once one went well."""
        self.times = trio.Lock()
        """Held by a pass around the flush before its commit, from which on times are compared, and by whoever changes
        them without writing.
        """
        self._asking = trio.Lock()
        self._ask_after = -math.inf
        """When the origin may be asked whether it can give space back, if nobody knows."""
        self._key = key
        self._sound: tuple[Origin | None, int] = (None, 0)
        """The origin, and its `sync_failures`, of which nothing that is kept can have been lost."""
        self._handled: tuple[Origin, int] | None = None
        """The origin, and after how many of its `sync_failures` the blocks were dropped that may be lost."""

    @property
    def sync_failures(self) -> int:
        """How many flushes of the origin failed, whoever asked for them: each time something may be lost."""
        origin = self._reach.origin
        return origin.sync_failures if origin is not None else 0

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Around each write to the origin and its announcement to the cache.

        Before the first one the identity on record is withdrawn, durably: our own writes change it. Raises OSError
        where the origin must not, or cannot, be written.
        """
        self._reach.require_origin()
        self._identity.begin_write()
        try:
            if not self._identity.may_write():
                await self._withdraw_identity()
            yield
        finally:
            self._identity.end_write()

    async def _withdraw_identity(self) -> None:
        async with self._withdrawing:
            if self._identity.may_write():
                return
            self._identity.withdraw()
            try:
                await self._cache.commit.records()
            except IndexFault:
                if self._has_private():
                    raise
                # Killed now, the next start takes our writes for somebody else's, and forgets clean blocks.
            self._identity.note_withdrawn()

    # ---------------------------------------------------------------------------------- writes that are kept meanwhile

    async def make_room(self) -> None:
        """Flush, where no more can be kept of what is not durable. Raises OSError: then no write may come."""
        if self.kept.is_full:
            await self.flush()

    async def write(self, offset: int, data: memoryview) -> None:
        """Write to the origin, and keep what was written until it is durable. In `writing`. Raises OSError."""
        copy = bytes(data)
        async with self._changing(Change(offset, len(copy), copy)):
            await self._reach.made_again(lambda: self._reach.require_origin().write(offset, [copy]))

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Zero in the origin what `write` would write. Raises OSError."""
        async with self._changing(Change(offset, length, None, may_trim)):
            await self._reach.made_again(
                lambda: self._reach.require_origin().zero(offset, length, may_trim)
            )

    async def may_trim(self) -> bool:
        """True if the origin can give space back: then a TRIM may make zeros of what it names. It is a hint, and passed
        over otherwise, and where nobody knows now.

        The first to ask has the origin asked. That counts as a write: it may change the image's times.
        """
        async with self._asking:
            origin = self._reach.origin
            if origin is None or self._reach.conflict is not None:
                return False
            if origin.punches is None and trio.current_time() >= self._ask_after:
                self._ask_after = trio.current_time() + ASK_AGAIN_SECONDS
                with trio.move_on_after(ASK_SECONDS), contextlib.suppress(OSError):
                    while not await self._asked(origin):  # noqa: ASYNC110  (a pass is just beginning)
                        await trio.sleep(ASK_STEP)
            return bool(origin.punches)

    async def _asked(self, origin: Origin) -> bool:
        """Ask the origin whether it can give space back, and return True, unless its times must not change now.

        Raises OSError.
        """
        async with self.times:
            if self._identity.is_committing:
                return False
            async with self.writing():
                await origin.ask_punches()
            return True

    @contextlib.asynccontextmanager
    async def _changing(self, change: Change) -> AsyncIterator[None]:
        """Around the change itself, which is kept if that went well."""
        if self.kept.is_empty and (origin := self._reach.origin) is not None:
            self._sound = (origin, origin.sync_failures)  # nothing was there that could be lost
        async with self.kept.passing():
            try:
                yield
            except BaseException:
                self.kept.leave_out(change.offset, change.length)
                raise
            self.kept.add(change)

    # ------------------------------------------------------------------------------------------------------ durability

    async def flush(self, *, times: bool = False) -> None:
        """Make durable what was written, with the image's times if asked. Does nothing if all is durable.

        That is what the writes that have ended wrote, and those under way so far: a pass, which counts as one, consists
        of many. After a flush that failed, whoever asked for it, what is kept is written again first. Raises OSError,
        each time until that went well.
        """
        ended = self._identity.writes_ended
        if self._identity.needs_flush() or times:
            try:
                await self._sync(times)
            except OSError as error:
                self._failed(error)
                raise
            finally:
                await self.drop_lost()
            self.trouble = None
            self._identity.note_durable(ended)

    def _failed(self, error: OSError) -> None:
        if self.kept.is_empty:
            return
        if self.trouble is None:
            log.warning("%s: a flush failed: %s", self._key, error.strerror or error)
        self.trouble = error.strerror or str(error)

    async def _sync(self, times: bool) -> None:
        """One flush of the origin that counts. Raises OSError."""
        origin, position = self._reach.require_origin(), self.kept.position
        try:
            await origin.flush(times=times)
        except TimeoutError:
            raise
        except OSError as error:
            if error.errno in MAYBE_DEAD:
                await self._reach.renew(origin)
            if self.kept.is_empty:
                raise
        else:
            if self.kept.is_empty:
                self._sound = (origin, origin.sync_failures)
            if self._sound == (origin, origin.sync_failures):
                self.kept.forget(position)
                return
        await self._sync_again(times)

    async def _sync_again(self, times: bool) -> None:
        """Write again what may be lost, and flush. Raises OSError."""
        async with self.kept.alone():
            origin, position = self._reach.require_origin(), self.kept.position
            failures = origin.sync_failures
            self._overtake()
            try:
                await self.kept.write_again(origin)
            finally:
                self._overtake()
            await origin.flush(times=times)
            if origin.sync_failures != failures:
                raise OSError(errno.EIO, "a flush of the image failed meanwhile")
            self._sound = (origin, failures)
            self.kept.forget(position)
            await self._clean.drop_hot()  # what was read meanwhile may be what was there before

    def _overtake(self) -> None:
        """What fetches have read by now is neither kept nor given to whoever asks later."""
        for offset, length in self.kept.ranges():
            self._clean.filler.overtaken(offset, length)

    async def drop_lost(self) -> None:
        """Drop the clean blocks that were written since a flush went well, if one failed: the image may have lost them.

        It can read as written for a while, from its host's memory, and no later flush says that it is gone.
        """
        while (now := self._told()) != self._handled:
            if self._handled is not None or (now is not None and now[1]):
                await self._clean.drop_hot()
            self._handled = now

    def _told(self) -> tuple[Origin, int] | None:
        """The origin, and how many of its flushes have failed; None while there is none."""
        origin = self._reach.origin
        return self._handled if origin is None else (origin, origin.sync_failures)
