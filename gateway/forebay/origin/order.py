"""What must not overtake what in an image: changes that were given up, and flushes.

See the head of origin.py for why. Everything here runs on the event loop.
"""

import errno
from collections.abc import Callable

from forebay.origin.threads import Call, StoreThreads, bounded


class Changes:
    """Writes and the like to one image, by range, that go on in a thread although nobody waits for them any more."""

    def __init__(self, threads: StoreThreads) -> None:
        self._threads = threads
        self._loose: dict[Call[None], tuple[int, int]] = {}

    async def make(
        self, do: Callable[[], None], start: int, end: int, background: bool = False
    ) -> None:
        """Call `do`, which changes bytes `start` to `end`, in a thread. Raises OSError."""
        await self.settled(start, end)
        call = Call(do, on_end=self._ended)
        try:
            await self._threads.wait_for(call, background=background)
        finally:
            if call.given_up:
                self._loose[call] = (start, end)

    def _ended(self, call: Call[None]) -> None:
        self._loose.pop(call, None)

    async def settled(self, start: int, end: int) -> None:
        """Return when no loose change touches bytes `start` to `end`."""
        while loose := [
            call for call, (first, last) in self._loose.items() if first < end and start < last
        ]:
            await loose[0].ended.wait()


class Syncs:
    """The flushes of one descriptor: one at a time, each for everyone who asked before it began.

    `failures` counts how often the outcome of one became unknown: it failed, it was too late, or it failed after it
    was too late. The kernel tells about lost data once, to one caller, and forgets the data; so every flush
    during which the count went up raises, and so does the first one after a failure that nobody was told about.
    """

    def __init__(self, threads: StoreThreads, sync: Callable[[], None], label: str) -> None:
        self.failures = 0
        self._threads = threads
        self._sync = sync
        self._label = label
        self._told = 0
        self._begun = 0
        self._current: Call[None] | None = None

    async def flush(self, timeout: float) -> None:
        """Make durable everything written before. Raises OSError: what was written since the last flush that
        returned, to the last byte, is then unknown, and has to be written again.
        """
        told = self._told
        try:
            with bounded(timeout, f"flushing {self._label}"):
                await self._one_from_now_on()
        except TimeoutError:
            self.failures += 1
            self._told = self.failures
            raise
        except OSError:
            self._told = self.failures
            raise
        if self.failures != told:
            self._told = self.failures
            raise OSError(
                errno.EIO, f"{self._label}: an earlier flush failed, its data may be lost"
            )

    async def _one_from_now_on(self) -> None:
        arrived = self._begun
        while (current := self._current) is not None:
            number = self._begun
            await current.ended.wait()
            if number > arrived and current.begun:
                if current.error is not None:
                    raise OSError(errno.EIO, f"flushing {self._label}: {current.error}")
                return
        self._begun += 1
        self._current = Call(self._sync, on_end=self._ended)
        await self._threads.wait_for(self._current)

    def _ended(self, call: Call[None]) -> None:
        self._current = None
        if call.error is not None:
            self.failures += 1
