# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How fast the device takes writes, and so: whether the event loop may make them, or a thread has to.

A write to a local device is a copy into the kernel's cache, a microsecond for 4 KiB, which is less than it takes to
wake a thread. But a device that is slow, or hangs, makes the writer wait, and with the event loop every disk would
wait. So the loop writes only while the device is *quick*, and takes the time. One write that takes long, or one sync or
call of a thread that is not over after a while, makes the device *slow*: threads write then, until it was quick for
some time. Where the kernel does not keep writes in its cache at all, as with FUSE and network file systems, the device
is slow from the start and stays so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from forebay_fast.latency import DEVICE_KINDS, DEVICE_WRITE, Latency

SLOW_SECONDS: Final = 0.02
"""A write that takes longer, waiting for a processor left out, makes the device slow."""
PENDING_SECONDS: Final = 1.0
"""So does a sync, or a call in a thread, that is not over after this: a device that hangs shows there first."""
SUSPECT_SECONDS: Final = 5.0
"""After this nothing is believed in memory any more that has not been looked at since: the loop could hang in it."""
LOOK_SECONDS: Final = 0.25
"""How often is looked for those."""
QUIET_LEAST: Final = 1.0
"""The device has to be quick for so many seconds to be written to by the loop again; twice as many each time ..."""
QUIET_MOST: Final = 64.0
"""... up to these, unless it was quick for ten times as long."""

clock = time.monotonic


def waited() -> float:
    """How many seconds the calling thread was ready to run and did not, because the processors were busy."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # a kernel that does not count it
        return 0.0


class Watch:
    """Measures how long the calling thread waits for the device, from the moment it is made."""

    def __init__(self) -> None:
        self._began, self._waited = clock(), waited()

    def seconds(self) -> float:
        """So long, without the time that it had to wait for a processor."""
        return clock() - self._began - (waited() - self._waited)


class Pace:
    """The pace of one device. Only the event loop uses it."""

    def __init__(self, *, always_slow: bool = False) -> None:
        self.is_slow = always_slow
        """True if only threads may write to the device. While it is False none has a frame of the journal."""
        self.latency = Latency(DEVICE_KINDS)
        """How long writes take, each as a whole, and syncs. The compiled core counts there."""
        self.slow_writes = 0
        """How many writes took longer than SLOW_SECONDS."""
        self.on_suspicion: Callable[[], None] | None = None
        """Called when a call is not over after SUSPECT_SECONDS; once, until all such calls have ended."""
        self._is_suspect = False
        self._always_slow = always_slow
        self._waited = 0.0  # by the loop's thread, when it was looked last
        self._pending: dict[int, float] = {}  # number of a call -> since when
        self._next = 0
        self._quiet = QUIET_LEAST
        self._quick_from = 0.0  # the clock at which it may count as quick again
        self._was_quick = -QUIET_MOST * 10

    def took(self, seconds: float) -> bool:
        """Count a write of the loop's thread that took so long. Returns True if that was too long, as below."""
        self.latency.note(DEVICE_WRITE, seconds)
        return seconds > SLOW_SECONDS and self.note_write_of_loop(seconds)

    def note_write_of_loop(self, seconds: float) -> bool:
        """The loop's thread took so long for a write. Returns True if that was too long, and the device's doing."""
        if seconds < SLOW_SECONDS:
            return False
        before, self._waited = self._waited, waited()
        return self.note_write(seconds - (self._waited - before))

    def note_write(self, seconds: float) -> bool:
        """A write took so long. Returns True if that was too long."""
        if seconds < SLOW_SECONDS:
            return False
        self.slow_writes += 1
        self._slow_down()
        return True

    def begin(self) -> int:
        """A sync, or a call in a thread, begins. Returns its number, for :meth:`end`."""
        self._next += 1
        self._pending[self._next] = clock()
        return self._next

    def end(self, number: int) -> None:
        """That call has ended, in its thread or in the kernel, whoever still waits for it. May be called again."""
        self._pending.pop(number, None)

    def _slow_down(self) -> None:
        now = clock()
        if not self.is_slow:
            relapsed = now - self._was_quick < 10 * self._quiet
            self._quiet = min(2 * self._quiet, QUIET_MOST) if relapsed else QUIET_LEAST
            self.is_slow = True
        self._quick_from = now + self._quiet

    def look(self) -> None:
        """Slow down if a call takes long, and become suspicious if it takes very long."""
        self._waited = waited()
        now = clock()
        longest = max((now - since for since in self._pending.values()), default=0.0)
        if longest >= PENDING_SECONDS:
            self._slow_down()
        was_suspect, self._is_suspect = self._is_suspect, longest >= SUSPECT_SECONDS
        if self._is_suspect and not was_suspect and self.on_suspicion is not None:
            self.on_suspicion()

    def speed_up(self) -> None:
        """Count the device as quick again if it was long enough. No thread may have a frame of the journal now."""
        if self.is_slow and not self._always_slow and clock() >= self._quick_from:
            self.is_slow, self._was_quick = False, clock()

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            self.look()
