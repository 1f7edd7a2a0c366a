# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What must not overtake what in an image: changes that were given up, and flushes.

The head of file.py says why. Everything here runs on the event loop.
"""

import errno
from collections.abc import Callable, Iterable

from forebay.origin.pieces import joined, overlap
from forebay.origin.threads import Call, StoreThreads, bounded


class ChangeOrder:
    """The changes of one image, by range. It remembers those that go on in a thread with nobody waiting any more."""

    def __init__(self, threads: StoreThreads) -> None:
        self._threads = threads
        self._given_up: dict[Call[None], list[tuple[int, int]]] = {}
        """Calls that were given up and have not ended, with the ranges that they change."""

    async def make(
        self, do: Callable[[], None], ranges: Iterable[tuple[int, int]], background: bool = False
    ) -> None:
        """Call `do`, which changes the `ranges`, each (first byte, byte behind the last), in a thread. Raises OSError.

        Waits first for changes of the same bytes that were given up. Cancellation gives this one up, too.
        """
        changed = joined(ranges)
        while under_way := self._that_touch(changed):
            await under_way.ended.wait()
        call = Call(do, on_end=self._ended)
        try:
            await self._threads.wait_for(call, background=background)
        finally:
            if call.given_up:
                self._given_up[call] = changed

    def _ended(self, call: Call[None]) -> None:
        self._given_up.pop(call, None)

    async def wait_for_range(self, start: int, end: int) -> None:
        """Return when no change that was given up can touch the bytes from `start` to `end` (exclusive) any more."""
        while under_way := self._that_touch([(start, end)]):
            await under_way.ended.wait()

    def _that_touch(self, ranges: list[tuple[int, int]]) -> Call[None] | None:
        """A change that was given up, and can change a byte of these ranges; None if there is none."""
        for call, changed in self._given_up.items():
            if overlap(changed, ranges):
                return call
        return None


class SyncOrder:
    """The flushes of one descriptor: one at a time, each for everyone who asked before it began.

    The kernel tells about lost data once, to one caller, and forgets the data; so every flush during which `failures`
    went up raises, and so does the first one after a failure that nobody was told about.
    """

    def __init__(self, threads: StoreThreads, sync: Callable[[], None], label: str) -> None:
        """`sync` makes durable what the descriptor wrote; it blocks, and runs in a thread. `label` is for messages."""
        self.failures = 0
        """How often the outcome of a sync became unknown: it failed, it took too long, or it failed after that."""
        self._threads = threads
        self._sync = sync
        self._label = label
        self._told = 0
        """Of how many failures somebody was told."""
        self._begun = 0
        """How many syncs were begun so far."""
        self._current: Call[None] | None = None
        """The sync under way."""

    async def flush(self, timeout: float) -> None:
        """Make durable everything that was written before, within `timeout` seconds.

        Raises OSError: of what was written since the last flush that returned, nobody knows what is durable, and all of
        it has to be written again.
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
        """Wait for a sync that begins after this call, made by whoever asks for one first. Raises OSError."""
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
