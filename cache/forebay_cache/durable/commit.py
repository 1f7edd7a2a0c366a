# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Commits: what memory knows becomes durable in the index, all of one instant together.

The order is what a crash can be survived by: the snapshot is taken, then the device is synced, then the index stores
the snapshot in one transaction, and only then are the parts of the cache told, so that the journal is trimmed and
freed slots may be used again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import trio

from forebay_cache.device.failure import Failure
from forebay_cache.durable.group_commit import GroupCommit
from forebay_cache.durable.journal import JournalFull
from forebay_cache.durable.sync import DeviceSync
from forebay_cache.durable.wakeup import Wakeup
from forebay_cache.errors import IndexFault
from forebay_cache.index.changes import Changes, Participant, Share
from forebay_cache.index.index import Index

log = logging.getLogger(__name__)

COMMIT_SECONDS = 2.0
"""A commit is made so long after the first change that it takes in: what a killed daemon loses of a warm cache."""
COMMIT_RETRY_SECONDS = 1.0
"""How long to wait after a failed commit: the file system of the index may be full."""


class Snapshot:
    """What a commit stores, and who is to be told how it ended: exactly one of the two methods is called then."""

    def __init__(self, changes: Changes, participants: Sequence[Participant]) -> None:
        self.changes = changes
        self._shares: list[Share] = [part.contribute(changes) for part in participants]

    def succeeded(self) -> None:
        """The index has it, durably. Tells the participants, in their order. Must not await."""
        for share in self._shares:
            share.succeeded()

    def failed(self) -> None:
        """The index may not have it: the participants keep it for the next commit. Must not await."""
        for share in self._shares:
            share.failed()


class Committer(GroupCommit):
    """``await commit()`` returns after a commit that began after the call. Raises OSError; nothing is lost by that.

    The order of ``participants`` counts: first the journal's, whose publishing may change the other parts; and each is
    told the outcome after those before it, so that the journal is trimmed before slots are released, and checksums are
    shed after that.
    """

    def __init__(
        self,
        index: Index,
        sync: DeviceSync,
        failure: Failure,
        wanted: Wakeup,
        participants: Sequence[Participant],
    ) -> None:
        super().__init__(self._run)
        self.error: str | None = None
        """Why the index could not store the last commit; None if it could."""
        self._index = index
        self._sync = sync
        self._failure = failure
        self._wanted = wanted
        self._participants = participants
        self._without_device: list[Participant] = []
        self._past_device = GroupCommit(self._store_past_device)
        self._is_last = False

    def has_changes(self) -> bool:
        """True if a commit would have anything to store, or to free."""
        return self._is_last or any(part.has_changes() for part in self._participants)

    def snapshot(self) -> Snapshot:
        """What a commit has to store as of now. A critical section: must not be split by an await."""
        return Snapshot(Changes(replace(self._index.meta)), self._participants)

    async def _run(self) -> None:
        if not self.has_changes():
            return
        self._failure.check()  # the sync would fail, and a snapshot holds up everybody
        snapshot = self.snapshot()
        try:
            with contextlib.suppress(JournalFull):  # what has no room there is in the snapshot
                await self._sync()
            self._failure.check()
            # no await until self._index.commit: else _store_past_device() may be overtaken by it
            await self._index.commit(snapshot.changes)
        except BaseException as error:
            snapshot.failed()
            if isinstance(error, IndexFault):
                self.error = error.strerror
                if self._index.place.is_lost:
                    self._failure.fail(error, taken=True)
            raise
        self.error = None
        snapshot.succeeded()

    async def close(self) -> None:
        """The last commit; made even if nothing has changed, because the index is to say that the end was a clean one.

        Raises OSError.
        """
        self._is_last = True
        await self.records()

    # -- with a device that has failed ------------------------------------------------------------------------

    def join_past_device(self, part: Participant) -> None:
        """Have a part of the cache take part in the commits that are made while the device has failed."""
        self._without_device.append(part)

    async def records(self) -> None:
        """Make records, and the end of layers, durable: by a commit, or without the device if that has failed.

        Raises OSError.
        """
        while self._failure.error is None:
            with self._failure.passed_over():
                await self()
                return
        await self.past_device()

    async def past_device(self) -> None:
        """Make durable what names nothing on the device, which has failed. Raises OSError."""
        await self._past_device()

    async def _store_past_device(self) -> None:
        """The part of a commit that names nothing on the device. The index takes commits in the order of the calls."""
        snapshot = Snapshot(Changes(None), self._without_device)
        try:
            if not self._index.place.is_lost:  # else no start will find what it says
                await self._index.commit(snapshot.changes)
        except BaseException:
            snapshot.failed()
            raise
        snapshot.succeeded()

    async def revive(self, rewrite: Callable[[], Awaitable[None]]) -> None:
        """Take a device that has failed into use again, if it works. Raises OSError, and it stays failed.

        ``rewrite`` writes once more what may not have arrived since the last commit. Then all of it is synced, and
        committed: whatever the journal has lost is superfluous from there on. No other sync or commit comes in between.
        """
        async with self.suspended(), self._sync.suspended():
            await self._sync.quiet()
            await rewrite()
            snapshot = self.snapshot()
            try:
                with trio.CancelScope(shield=True):
                    await self._sync.again()
                    await self._index.commit(snapshot.changes)
            except BaseException:
                snapshot.failed()
                raise
            self._sync.note_durable()
            snapshot.succeeded()
            self._failure.end()

    # -- in the background ------------------------------------------------------------------------------------

    def want(self) -> None:
        """Have :meth:`run` make a commit soon."""
        self._wanted.call()

    async def run(self) -> None:
        """Commit every now and then, and when somebody wants it, until cancelled. Not while the device has failed."""
        told = False
        while True:
            with trio.move_on_after(COMMIT_SECONDS):
                await self._wanted.wait()
            try:
                if self._failure.error is None:
                    await self()
            except OSError as error:
                if self._failure.error is None and not told:
                    log.error("index commit failed, trying again: %s", error.strerror or error)
                    told = True
                await trio.sleep(COMMIT_RETRY_SECONDS)
            else:
                if told and self._failure.error is None:
                    log.info("the index can be written again")
                    told = False
