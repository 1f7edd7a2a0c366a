# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whether the cache device can be used: what makes it count as failed, and who is told.

A device counts as failed from the first error on after which nobody knows what lies on it: of a write of a journal
frame, of a sync, of a write of a block (unless there was no room for it), or of so many slots on end that nothing of
them could be read. While it has failed nothing is written to it, and what is read from it is checked each time.
``upkeep.revive`` takes it back into use.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

log = logging.getLogger(__name__)

UNREADABLE_MOST = 16
"""So many slots one after the other of which nothing can be read: then it is the device, and not the slots."""


class Failure:
    """The failure of one device. ``path`` names the device in messages."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        """Why the device is not used at present; None while it is used."""
        self.broke = trio.Event()
        """Set while the device has failed; another event for each failure."""
        self.changes = 0
        """How often it has failed, or was taken back into use."""
        self._path = path
        self._unreadable = 0
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` each time the device fails and each time it is taken back into use, at once, in order."""
        self._listeners.append(listener)

    def check(self) -> None:
        """Raise OSError(EIO) if the device has failed: what is durable there must not be written over."""
        if self.error is not None:
            raise OSError(errno.EIO, f"cache device: {self.error.strerror}")

    def note_reading(self, *, good: bool) -> None:
        """Count a slot that was read: ``good`` if any sector of it could be. Too many bad ones on end are a failure."""
        self._unreadable = 0 if good else self._unreadable + 1
        if self._unreadable >= UNREADABLE_MOST:
            self.fail(OSError(errno.EIO, "it cannot be read"))

    def fail(self, error: OSError, *, taken: bool = False) -> None:
        """Count the device as failed because of ``error``, unless it has failed already.

        ENOSPC, from a sparse file for instance, is no failure as long as the caller can do without what it wanted to
        write. ``taken`` says that it cannot: somebody was told already that the cache has it.
        """
        if self.error is None and (taken or error.errno != errno.ENOSPC):
            log.error("cache device %s failed: %s", self._path, error.strerror or error)
            self.error = error
            self.changes += 1
            self._tell()
            self.broke.set()

    def end(self) -> None:
        """Count the device as usable again. Called by a revival, when all that may have been lost is durable."""
        self.error, self.broke = None, trio.Event()
        self.changes += 1
        self._tell()

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """Let an OSError of the body pass if the device has failed, or did at any time since the body began.

        Who waits for what others wait for, too, may hear of a failure when it is over: that the device works again
        says nothing of what was asked for.
        """
        was, before = self.error, self.changes
        try:
            yield
        except OSError:
            if was is None and self.changes == before:
                raise

    async def in_one_state(self, do: Callable[[], Awaitable[None]]) -> None:
        """Call ``do``, again and again until the device has worked, or was failed, all the while.

        For what has a way of its own for each: what was done before a failure, or during one, may be on record
        nowhere. Raises what ``do`` raises.
        """
        before = -1
        while before != self.changes:
            before = self.changes
            await do()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
