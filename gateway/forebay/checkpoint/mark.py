# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The word beside an image that it lacks data: written before the cache takes the first write that the image lacks.

Whoever finds the image without this host, `forebay recover` above all, learns by it that data is missing.
"""

from collections.abc import Callable

import trio

from forebay.image.image import Image
from forebay.image.source import Source
from forebay.latency.waits import ORIGIN, Waiting


class DirtyMark:
    """Whether the owner marker of one disk's image says "dirty". Disks without a marker have only the flag.

    `is_set` False means that the next private write has to wait for :meth:`set`. An overlay never sets it.
    """

    def __init__(self, source: Source, image: Image, dirty_bytes: Callable[[], int]) -> None:
        """`dirty_bytes` says how many bytes the image lacks at this instant."""
        self._source = source
        self._image = image
        self._dirty_bytes = dirty_bytes
        self._overlay = source.use.overlay
        self._changing = trio.Lock()
        self.is_set = False

    def is_kept(self) -> bool:
        """True if what :meth:`set` promises holds at this instant."""
        return self.is_set or self._overlay

    async def set(self) -> None:
        """Return when it is durably on record that the image lacks data. Raises OSError where that cannot be written.

        What this promises holds until the caller's next await: then a pass may end, and :meth:`clear`.
        """
        while not (self.is_set or self._overlay):
            with Waiting(ORIGIN):
                await self._set()

    async def _set(self) -> None:
        async with self._changing:
            if self._source.claim is not None and not self.is_set:
                await self._image.reach.made_again(self._source.claim.mark_dirty)
            self.is_set = True

    async def clear(self) -> None:
        """Put on record that the image has everything, unless it lacks something by now. Raises OSError.

        While that is being written, writers wait for the lock in :meth:`set`.
        """
        async with self._changing:
            if self._dirty_bytes() == 0:
                self.is_set = False
                if self._source.claim is not None and self._image.origin is not None:
                    await self._source.claim.mark_clean()

    def is_stale(self) -> bool:
        """True if the marker on the store may still say "dirty" although no write is to follow: it could not be
        cleared when the last pass ended, or the daemon was killed before it was.
        """
        claim, wanted = self._source.claim, self.is_set or self._changing.locked()
        reached = self._image.origin is not None and self._image.conflict is None
        return reached and not wanted and claim is not None and claim.is_dirty
