# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Syncs of the cache device: they make everything durable that was written and published before they began."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from forebay_cache.device.failure import Failure
from forebay_cache.device.syncer import Run, Syncer
from forebay_cache.durable.group_commit import GroupCommit
from forebay_cache.durable.intent import Intent
from forebay_cache.durable.journal import JournalFull
from forebay_cache.durable.publish import Publisher


class Begun:
    """A sync that :meth:`DeviceSync.begin` has begun, for whoever looks on himself."""

    __slots__ = ("_run", "_sync")

    def __init__(self, sync: DeviceSync, run: Run) -> None:
        self._sync = sync
        self._run = run

    def fileno(self) -> int:
        """A descriptor that becomes readable when it may have ended, unless another has seen it before."""
        return self._sync.fileno()

    @property
    def has_ended(self) -> bool:
        """True once somebody has seen its end."""
        return self._run.has_ended

    def look(self) -> bool | None:
        """None as long as it has not ended; True if it was a good one. If it was not, the device has failed."""
        if not self._run.has_ended:
            self._sync.look()
        return self._run.error is None if self._run.has_ended else None

    async def wait(self) -> bool:
        """Wait for its end, and return what :meth:`look` does then. False as well if it took too long."""
        with contextlib.suppress(OSError):
            await self._sync.ended()
        return self.look() is True


class DeviceSync(GroupCommit):
    """``await sync()`` returns after a sync that began after the call. One for all disks. Raises OSError.

    The records that were noted are published first. Where these have no room the data is synced all the same, and
    JournalFull raised then. A sync that fails is a failure of the device.
    """

    def __init__(
        self, syncer: Syncer, intent: Intent, publish: Publisher, failure: Failure
    ) -> None:
        super().__init__(self._run)
        self._syncer = syncer
        self._intent = intent
        self._publish = publish
        self._failure = failure

    async def _run(self) -> None:
        unpublished: JournalFull | None = None
        await self._end_of_pending()
        with self._watched():
            try:
                await self._publish.begin_sync()
            except JournalFull as error:
                unpublished = error
            self._failure.check()
            await self._syncer()
        if unpublished is not None:
            raise unpublished

    async def _end_of_pending(self) -> None:
        """Wait for the end of a sync that was begun and not waited for, if there is one. Raises OSError."""
        if self._syncer.pending:
            self._failure.check()
            with self._watched():
                await self._syncer.finish()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Around a sync that was begun: notes that it has ended, and fails the device if it fails."""
        try:
            yield
        except OSError as error:
            self._failure.fail(error, taken=True)  # a later sync would succeed, and lie
            raise
        finally:
            if not self._syncer.pending:
                self._intent.end_sync()

    def now(self) -> bool:
        """Sync, if the device is done in a moment. Returns False if it is not: then await a sync. Raises OSError."""
        syncer = self._syncer
        if not syncer.quick or not self._announce():
            return False
        with self._watched():
            if syncer.now():
                return True
            if not syncer.pending:
                self._intent.take_back_sync()
        return False

    def begin(self) -> Begun | None:
        """Begin a sync, if none is under way and nothing has to be waited for before. Raises OSError."""
        if not self._announce():
            return None
        with self._watched():
            if self._syncer.start():
                return Begun(self, self._syncer.run)
            self._intent.take_back_sync()
        return None

    def _announce(self) -> bool:
        """Publish, for a sync that is begun at once, and say that it begins. Returns False if it cannot be: nothing has
        changed then. Raises OSError.
        """
        if self.is_running or self._syncer.pending or self._publish.needs_thread:
            return False
        try:
            self._intent.publish()
        except JournalFull:
            return False
        self._failure.check()
        self._intent.begin_sync()
        return True

    def look(self) -> None:
        """See whether the sync under way, if any, has ended, and how."""
        if self._syncer.pending and self._failure.error is None:
            with contextlib.suppress(OSError), self._watched():
                self._syncer.collect()

    @property
    def seconds(self) -> float:
        """How long syncs take, the newest ones counting most."""
        return self._syncer.seconds

    def fileno(self) -> int:
        """A descriptor that becomes readable when a sync has ended."""
        return self._syncer.fileno()

    async def again(self) -> None:
        """Sync once more after a failure, while this is suspended. Raises OSError; the device stays failed then."""
        await self._syncer()

    @property
    def hangs(self) -> bool:
        """True if a sync is under way although nobody waits for it. For while the device has failed."""
        self._syncer.look()
        return self._syncer.hangs and not self.is_running

    async def quiet(self) -> None:
        """While this is suspended: wait until nothing is under way that :meth:`now` began, however that ends."""
        if self._syncer.pending:
            with contextlib.suppress(OSError):
                await self._syncer.finish()

    def note_durable(self) -> None:
        """All that was written is durable where it is."""
        self._intent.note_durable()

    async def ended(self) -> None:
        """Wait until no sync is under way. Raises OSError."""
        async with self.suspended():
            await self._end_of_pending()

    def close(self) -> None:
        """Let go of what syncs take. None may be under way."""
        self._syncer.close()
