# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Slots that a block has left and that no other block may have yet.

A slot may be given out again when two things are true. A commit that does not name it any more is durable, or a crash
would find the old block in it with the new block's content. And nobody still reads it through the map of the device:
a reader pins all slots while it does. A slot waits here first for a commit (*freed*), then for the pins that are older
than that commit's snapshot (*waiting*).
"""

from __future__ import annotations

import trio

from forebay_cache.index.changes import Changes, Share
from forebay_cache.slots.placement import Placement


class Quarantine:
    """The slots of one cache that are between two blocks. A participant of each commit."""

    AT_ONCE = 1024
    """So many slots are released in one go."""

    def __init__(self, placement: Placement) -> None:
        self.leaving = 0
        """How many slots are in here: freed, in a commit that is under way, or waiting for a pin."""
        self.released = trio.Event()
        """Set when slots may have become free; another event each time."""
        self._placement = placement
        self._freed: list[int] = []
        self._waiting: list[
            tuple[int, list[int]]
        ] = []  # (clock of the snapshot, slots), oldest first
        self._clock = 0  # how many snapshots were taken
        self._pins: dict[int, int] = {}  # token -> clock when it was given
        self._next_pin = 0
        self._more = trio.Event()  # there is more to be released

    def add(self, slot: int) -> None:
        """Put in a slot that no page in memory names any more, and that the placement has quarantined."""
        self.leaving += 1
        self._freed.append(slot)

    def pin(self) -> int:
        """Keep every slot from being given out again until :meth:`unpin` gets the token that this returns."""
        self._next_pin += 1
        self._pins[self._next_pin] = self._clock
        return self._next_pin

    def unpin(self, token: int) -> None:
        """Whoever got the token from :meth:`pin` does not read from the map any more."""
        del self._pins[token]
        if self._waiting:
            self.release()

    def release(self) -> None:
        """Give free what waits for no pin any more, and wake everybody who waits for a free slot.

        Of very many slots only some at once; :meth:`run` goes on with the others.
        """
        left = self.AT_ONCE
        while left and self._may_release():
            slots = self._waiting[0][1]
            some = slots[-left:]
            del slots[-left:]
            if not slots:
                del self._waiting[0]
            for slot in some:
                self._placement.release(slot)
            self.leaving -= len(some)
            left -= len(some)
        if self._may_release():
            self._more.set()
        event, self.released = self.released, trio.Event()
        event.set()

    def _may_release(self) -> bool:
        """True if there are slots that wait for no pin any more."""
        if not self._waiting:
            return False
        return self._waiting[0][0] < min(self._pins.values(), default=self._clock + 1)

    async def run(self) -> None:
        """Release what could not be released at once, some at a time, until cancelled."""
        while True:
            await self._more.wait()
            self._more = trio.Event()
            self.release()

    def has_changes(self) -> bool:
        """True if there is a slot that waits for a commit."""
        return bool(self._freed)

    def contribute(self, changes: Changes) -> Share:
        """Take part in a commit. It stores nothing of this; its end is what the freed slots wait for."""
        del changes
        freed, self._freed = self._freed, []
        clock = self._clock
        self._clock += 1

        def succeeded() -> None:
            if freed:
                self._waiting.append((clock, freed))
                self.release()

        def failed() -> None:
            self._freed = freed + self._freed

        return Share(succeeded, failed)
