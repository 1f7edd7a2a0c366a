# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How long the event loop was held up: all disks wait while one task runs, so no task may run for long (promise 4).

The loop runs every task that can go on, then looks for I/O. The meter takes the time between two such looks, at the
cost of two calls a turn. Who was at work is found out by a thread, which looks at the stack of a loop that has not
looked for I/O for too long.
"""

import logging
import sys
import threading
import time
from types import FrameType

import trio

log = logging.getLogger("forebay.daemon")

TOLD_SECONDS = 0.1
"""A turn that takes longer is logged, with the function and the task that are at work by then."""

COUNTED_SECONDS = 0.02
"""A turn that takes longer is counted."""

_LOOK_SECONDS = 0.05
"""How often the thread looks."""


class LoopMeter(trio.abc.Instrument):
    """Measures the event loop that :meth:`run` runs in."""

    def __init__(self) -> None:
        self.longest = 0.0
        """The longest turn so far, in seconds."""
        self.stalls = 0
        """How many turns took longer than COUNTED_SECONDS."""
        self.long_stalls = 0
        """How many of them took longer than TOLD_SECONDS."""
        self._began = 0.0
        """When the turn that is going on began; 0 between two turns."""
        self._clock = time.monotonic

    async def run(self) -> None:
        """Measure the loop until cancelled."""
        ended = threading.Event()
        thread = threading.get_ident()
        threading.Thread(
            target=self._watch, args=(thread, ended), name="loop-meter", daemon=True
        ).start()
        trio.lowlevel.add_instrument(self)
        try:
            await trio.sleep_forever()
        finally:
            trio.lowlevel.remove_instrument(self)
            ended.set()

    def figures(self) -> dict[str, float]:
        """What the metrics tell, by key."""
        return {
            "loop_stall_seconds_max": self.longest,
            "loop_stalls": self.stalls,
            "loop_long_stalls": self.long_stalls,
        }

    def after_io_wait(self, timeout: float) -> None:
        """Implements Instrument: a turn begins."""
        del timeout
        self._began = self._clock()

    def before_io_wait(self, timeout: float) -> None:
        """Implements Instrument: a turn has ended."""
        del timeout
        if self._began:
            took = self._clock() - self._began
            self._began = 0.0
            self.longest = max(self.longest, took)
            if took > COUNTED_SECONDS:
                self.stalls += 1
                self.long_stalls += took > TOLD_SECONDS

    def _watch(self, thread: int, ended: threading.Event) -> None:
        """In a thread of its own: tell, once for each, who is at work in a turn of that thread that takes long."""
        told = 0.0
        while not ended.wait(_LOOK_SECONDS):
            began = self._began
            if not began or began == told or self._clock() - began < TOLD_SECONDS:
                continue
            frame = sys._current_frames().get(thread)  # noqa: SLF001  (documented, and there is no other way)
            found = None if frame is None else at_work(frame)
            if found is not None and self._began == began:
                told = began
                log.info("all disks have waited for %.2f s: %s", self._clock() - began, found)


def at_work(frame: FrameType) -> str | None:
    """Which function runs, and in which task, from the innermost frame of the event loop's thread; None for no task."""
    inner, task = frame.f_code, ""
    outer: FrameType | None = frame
    while outer is not None and not outer.f_globals.get("__name__", "").startswith("trio._core"):
        task = outer.f_code.co_qualname
        outer = outer.f_back
    place = f"{inner.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
    return f"{inner.co_qualname} ({place}) is at work, in the task {task}" if task else None


METER = LoopMeter()
"""That of the daemon's loop."""
