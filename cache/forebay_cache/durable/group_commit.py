# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Group commit: one run of a slow piece of work serves everybody who asked for it before it began."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import trio


class _Round:
    """One run of the work, and how it ended. Those who wait for it hold on to it."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: BaseException | None = None


class GroupCommit:
    """Runs ``work`` for all who ask: at most one run is going on and one is queued, which later askers join."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._lock = trio.Lock()
        self._queued: _Round | None = None

    async def __call__(self) -> None:
        """Return after a run of the work that began after this call. Raises what that run raised.

        Cancelled while it waits, it leaves the run to the others. A run that was begun is finished in any case.
        """
        mine = self._queued
        if mine is None:
            mine = self._queued = _Round()
        try:
            self._lock.acquire_nowait()  # without the pass through the scheduler that acquire() always makes
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            if not mine.done:
                self._queued = None
                with trio.CancelScope(shield=True):
                    try:
                        await self._work()
                    except Exception as error:  # noqa: BLE001  (all who wait for the run get it)
                        mine.error = error
                mine.done = True
        finally:
            self._lock.release()
        if mine.error is not None:
            raise mine.error

    @property
    def is_running(self) -> bool:
        """True while a run is going on, or within :meth:`suspended`."""
        return self._lock.locked()

    async def idle(self) -> None:
        """Wait until the run that is going on, if any, has ended."""
        async with self._lock:
            pass

    @contextlib.asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Within it no run begins; whoever asks for one waits."""
        async with self._lock:
            yield
