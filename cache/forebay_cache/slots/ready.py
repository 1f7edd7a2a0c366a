# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which sectors may be served straight from the map of the device.

A sector is *ready* when its content was seen to fit its checksum and is believed to be in memory. Bit n of a slot's
mask stands for its n-th sector. A ready sector is read without a system call; any other is read from the device and
checked first.
"""

from __future__ import annotations

import resource

import trio

from forebay_cache.device.failure import Failure
from forebay_cache.slots.numbers import SlotNumbers

RESIDENCY_SECONDS = 0.05
"""How often the loop asks whether memory that it took for resident was paged out."""


class ReadyMap:
    """The masks of all slots. All is forgotten each time the device fails, or works again."""

    def __init__(self, slots: int, failure: Failure) -> None:
        self._failure = failure
        self._numbers = SlotNumbers(slots, "H")
        self.masks = self._numbers.values
        """By slot. Another object after :meth:`grow`."""
        self.forgotten = 0
        """How often all of it was forgotten. Whoever writes in a thread reads this first, for :meth:`note`."""
        failure.listen(self.forget)

    def grow(self, slots: int) -> None:
        """The device has ``slots`` slots now. Raises OSError when there is no memory; then nothing has changed."""
        try:
            self._numbers.grow(slots)
        finally:
            self.masks = self._numbers.values

    def note(self, slot: int, mask: int, since: int) -> None:
        """Sectors of a slot were written by a thread that began when ``forgotten`` was ``since``.

        If all was forgotten meanwhile they do not become ready: the device may have failed, and lost them after they
        were written.
        """
        if self._failure.error is None and self.forgotten == since:
            self.masks[slot] |= mask

    def forget(self) -> None:
        """Have every sector checked and fetched again before it is served from the map.

        What is in memory may never have reached a device that has failed, and may go from memory unseen.
        """
        self._numbers.clear()
        self.forgotten += 1

    async def watch(self) -> None:
        """Forget all when reads through the map had to wait for the device. Runs until cancelled."""
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        while True:
            await trio.sleep(RESIDENCY_SECONDS)
            now = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            if now != faults:
                faults = now
                self.forget()
