# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A trace is replayed: what most boots read is fetched, ahead of the guest.

Its fetches wait behind what guests wait for, until somebody needs what they bring, as those of read-ahead do; preload
and the full copy stand aside for guests altogether.
"""

from collections.abc import Callable

import trio

from forebay.boot.files import Found
from forebay.boot.trace import Run
from forebay.checkpoint.counters import Counters
from forebay.checkpoint.steps import Progress
from forebay.disk.copy import Spend, at_once
from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay_cache.format.geometry import BLOCK

STREAMS = 4
"""Fetches at the same time: as many as a store takes ahead of guests."""

MOST_OF_CACHE = 2
"""A trace may take one part of so many of the cache, or of what the disks on its image may have of it."""

MOST_FAILURES = 16
"""So many places that cannot be read are passed over; then the replay ends."""


def check_room(image: Image, found: Found) -> None:
    """Raise ForebayError where what the trace brings in would drive out what else the cache is to keep."""
    slots = image.cache.device.slots
    room = min(slots, image.layer.cap or slots) // MOST_OF_CACHE
    wanted = len(found.usual)
    if wanted > room:
        raise ForebayError(
            f"the boot of {image.key} reads {wanted * BLOCK >> 20} MiB, and only {room * BLOCK >> 20} MiB of the cache "
            "may be used for that: make the cache, or cache_size, larger"
        )


class Replay:
    """One replay of a trace, on an image."""

    def __init__(self, image: Image, found: Found, counters: Counters) -> None:
        """`counters` are charged with what is fetched."""
        self._image = image
        self._runs = found.runs
        self._counters = counters
        self._layer = image.layer
        self._failures: list[OSError] = []
        self._done = 0

    async def run(
        self,
        progress: Progress,
        *,
        ends: Callable[[], str] = lambda: "",
        spend: Spend = at_once,
    ) -> str:
        """Fetch what the cache lacks; why it ended before it was through, empty if it did not.

        `ends` is asked between two fetches, and says why it is to end. Raises OSError where the image, or the cache,
        cannot be used at all.
        """
        total = sum(run.length for run in self._runs)
        left = iter(self._runs)
        why: list[str] = []
        progress(0, total)

        async def stream() -> None:
            for run in left:
                reason = ends() or self._changed()
                if reason:
                    why.append(reason)
                if why:
                    return
                await spend(run.length)
                await self._fetch(run)
                self._done += run.length
                progress(self._done, total)

        async with trio.open_nursery() as nursery:
            for _ in range(STREAMS):
                nursery.start_soon(stream)
        if self._failures and self._is_hopeless():
            raise self._failures[0]
        return why[0] if why else ""

    def _changed(self) -> str:
        if self._image.layer is not self._layer:
            return "the image was changed"
        return "the image cannot be read" if self._is_hopeless() else ""

    def _is_hopeless(self) -> bool:
        image = self._image
        is_away = (
            image.origin is None or image.conflict is not None or image.cache.failed is not None
        )
        return is_away or len(self._failures) > MOST_FAILURES

    async def _fetch(self, run: Run) -> None:
        """Have one run in the cache, unless it cannot be read."""
        try:
            filler = self._image.filler
            await filler.prefetch(run.offset, run.length, self._counters, background=True)
        except OSError as fault:
            self._failures.append(fault)
        await trio.lowlevel.checkpoint()
