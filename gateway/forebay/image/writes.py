# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Our own writes to an image: what comes before the first, what makes them durable, and what a failed flush costs."""

import contextlib
from collections.abc import AsyncIterator, Callable

import trio

from forebay.image.clean import CleanBlocks
from forebay.image.identity import KnownIdentity
from forebay.image.reach import Reach
from forebay_cache import Cache
from forebay_cache.errors import IndexFault


class OwnWrites:
    """Counts the writes of all disks to one image, and flushes them."""

    def __init__(
        self,
        cache: Cache,
        identity: KnownIdentity,
        reach: Reach,
        clean: CleanBlocks,
        has_private: Callable[[], bool],
    ) -> None:
        """`has_private` returns True if the cache has data that belongs on the image as it is."""
        self._cache = cache
        self._identity = identity
        self._reach = reach
        self._clean = clean
        self._has_private = has_private
        self._withdrawing = trio.Lock()
        self._failures_handled = 0
        """After how many of `sync_failures` the blocks were dropped that may be lost."""

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

    async def flush(self, *, times: bool = False) -> None:
        """Make durable what was written, with the image's times if asked. Does nothing if all is durable.

        That is what the writes that have ended wrote, and those under way so far: a pass, which counts as one, consists
        of many. Raises OSError.
        """
        ended = self._identity.writes_ended
        if self._identity.needs_flush() or times:
            try:
                await self._reach.require_origin().flush(times=times)
            finally:
                await self.drop_lost()
            self._identity.note_durable(ended)

    async def drop_lost(self) -> None:
        """Drop the clean blocks that were written since a flush went well, if one failed: the image may have lost them.

        It can read as written for a while, from its host's memory, and no later flush says that it is gone.
        """
        while self._failures_handled != self.sync_failures:
            failures = self.sync_failures
            await self._clean.drop_hot()
            self._failures_handled = failures
