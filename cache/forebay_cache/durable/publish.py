# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Publishing for whoever can wait: by the event loop while the device is quick, by a thread while it is slow."""

from __future__ import annotations

from forebay_cache.device.failure import Failure
from forebay_cache.device.lanes import DeviceThreads
from forebay_cache.device.pace import Watch
from forebay_cache.durable.group_commit import GroupCommit
from forebay_cache.durable.intent import Intent
from forebay_cache.durable.journal import Frame, JournalFull


class Publisher(GroupCommit):
    """``await publish()`` returns when the kernel has all records that were noted before the call. Raises OSError.

    JournalFull and other errors mean what they do for :meth:`Intent.publish`. One frame is written at a time, so that
    they are on the device in their order, and none is while the loop itself may publish: see :attr:`Pace.is_slow`.
    """

    def __init__(self, intent: Intent, failure: Failure, threads: DeviceThreads) -> None:
        super().__init__(self._run)
        self._intent = intent
        self._failure = failure
        self._threads = threads

    async def __call__(self) -> None:
        """Return after all that was noted is with the kernel; without an await where the loop may write that."""
        if not self.needs_thread:
            self._intent.publish()
        elif self._intent.has_unpublished or self.is_running:
            await super().__call__()

    @property
    def needs_thread(self) -> bool:
        """True if the loop may not publish now, because the device is slow."""
        pace = self._threads.pace
        if pace.is_slow and not self.is_running:
            pace.speed_up()
        return pace.is_slow

    async def begin_sync(self) -> None:
        """Publish, for a sync: what it is going to make durable has its records with the kernel when this returns.

        Raises OSError, and nothing was begun; JournalFull: it was begun all the same.
        """
        if not self.needs_thread:
            full = False
            try:
                self._intent.publish()
            except JournalFull:
                full = True
            self._intent.begin_sync()
            if full:
                raise JournalFull
            return
        async with self.suspended():
            # What is noted while the frame is written belongs to the next sync. no await until take_frame
            self._intent.begin_sync()
            await self._write_frame()

    async def _run(self) -> None:
        if not self._threads.pace.is_slow:  # it was, when this round was asked for
            self._intent.publish()
            return
        await self._write_frame()
        self._threads.pace.speed_up()

    async def _write_frame(self) -> None:
        """Have a thread write what was noted. Raises OSError: JournalFull, or the device has failed."""
        frame = self._intent.take_frame()
        if frame is None:
            self._failure.check()  # another took it, a sync perhaps, and could not write it
            return
        try:
            took = await self._threads.writes.run(self._write, frame)
            self._threads.pace.note_write(took)
        except OSError as error:
            self._failure.fail(error, taken=True)
        self._failure.check()

    def _write(self, frame: Frame) -> float:
        """In a thread. Returns how many seconds it took. Raises OSError."""
        watch = Watch()
        self._intent.journal.write(frame)
        return watch.seconds()
