# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Threads that read and write the device, apart from all others, and a limit of time for each call.

A call that takes longer than the limit is *lost*: whoever waits for it hears ETIMEDOUT, the device counts as failed,
and the thread is left alone with what it hangs in. It may go on at any time and write what it was given. So until it
has ended no other call of its kind is begun, what it may write to is kept from everybody (:meth:`Lane.when_ended`),
and the device stays failed (``upkeep.revive``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple, Unpack

import trio

from forebay_cache.device.failure import Failure
from forebay_cache.device.pace import Pace
from forebay_cache.device.worker import TIMEOUT, timed_out

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

READERS: Final = 16
WRITERS: Final = 8
"""So many threads read and write the device at a time."""

_UNLIMITED = trio.CapacityLimiter(math.inf)


class Lane:
    """The threads for one kind of call. ``pace`` is told of each; ``lost`` is called with the error of a lost one."""

    def __init__(
        self, most: int, timeout: float, pace: Pace | None, lost: Callable[[OSError], None]
    ) -> None:
        self.timeout = timeout
        self.lost = 0
        """How many calls were given up whose threads have not ended."""
        self._free = most
        self._pace = pace
        self._tell_lost = lost
        self._waiting: deque[trio.Event] = deque()
        self._ended: list[Callable[[], None]] = []

    async def run(self, job: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run ``job`` in a thread; return what it returns, raise what it raises.

        Raises OSError(ETIMEDOUT) if that takes too long, and at once while a call is lost. Can be cancelled only
        before the job begins.
        """
        await self._place()
        call = _Call(self, self._pace)
        token = trio.lowlevel.current_trio_token()

        def in_thread() -> T:
            try:
                return job(*args)
            finally:
                token.run_sync_soon(call.end)

        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.timeout):
            try:
                found = await trio.to_thread.run_sync(
                    in_thread, abandon_on_cancel=True, limiter=_UNLIMITED
                )
            except Exception:
                call.end()
                raise
            call.end()
            return found
        error = timed_out(self.timeout)
        call.lose()
        self._tell_lost(error)
        raise error

    def when_ended(self, do: Callable[[], None]) -> None:
        """Call ``do`` when no lost call is under way, at once if there is none: what it may write to is free then."""
        if self.lost:
            self._ended.append(do)
        else:
            do()

    async def _place(self) -> None:
        """Wait for a thread. Raises OSError(ETIMEDOUT) if a call is lost."""
        while not self._free and not self.lost:
            event = trio.Event()
            self._waiting.append(event)
            try:
                await event.wait()
            except trio.Cancelled:
                if event.is_set():
                    self._wake()
                else:
                    self._waiting.remove(event)
                raise
        if self.lost:
            raise timed_out(self.timeout)
        self._free -= 1

    def _wake(self) -> None:
        """Wake one who waits for a thread; all of them, if a call is lost."""
        while self._waiting:
            self._waiting.popleft().set()
            if not self.lost:
                break

    def note_end(self, *, was_lost: bool) -> None:
        """The thread of a call has ended. Called by the call."""
        self._free += 1
        if was_lost:
            self.lost -= 1
            if not self.lost:
                ended, self._ended = self._ended, []
                for do in ended:
                    do()
        self._wake()

    def note_lost(self) -> None:
        """A call is given up. Called by the call."""
        self.lost += 1
        self._wake()


class _Call:
    """One call of a lane, which begins now."""

    def __init__(self, lane: Lane, pace: Pace | None) -> None:
        self._lane = lane
        self._pace = pace
        self._number = pace.begin() if pace is not None else 0
        self._is_lost = self._has_ended = False

    def lose(self) -> None:
        """Nobody waits for it any more."""
        if not self._has_ended:
            self._is_lost = True
            self._lane.note_lost()

    def end(self) -> None:
        """Its thread has ended. May be called again."""
        if self._has_ended:
            return
        self._has_ended = True
        if self._pace is not None:
            self._pace.end(self._number)
        self._lane.note_end(was_lost=self._is_lost)


class DeviceThreads:
    """The lanes of one device. A lost call is a failure of it."""

    def __init__(self, pace: Pace, failure: Failure, timeout: float = TIMEOUT) -> None:
        self.pace = pace
        self.timeout = timeout

        def fail(error: OSError) -> None:
            failure.fail(error, taken=True)

        self.reads = Lane(READERS, timeout, pace, fail)
        self.writes = Lane(WRITERS, timeout, pace, fail)

    @property
    def lost(self) -> int:
        """How many calls were given up whose threads have not ended."""
        return self.reads.lost + self.writes.lost
