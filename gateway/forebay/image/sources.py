# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The sources of all disks on one image: what they have in common, asked of all of them."""

import contextlib

from forebay.image.source import Source
from forebay_cache import Cache
from forebay_cache.format.geometry import SECTOR


class Sources:
    """The sources of the disks that are on one image now, the one that came last at the end."""

    def __init__(self, cache: Cache) -> None:
        """`cache` has the private layers of the disks."""
        self._cache = cache
        self._sources: list[Source] = []

    def add(self, source: Source) -> None:
        """Count one disk more."""
        self._sources.append(source)

    def remove(self, source: Source) -> None:
        """Count one disk less. Raises ValueError if it was not there."""
        self._sources.remove(source)

    def is_empty(self) -> bool:
        """True if no disk is on the image."""
        return not self._sources

    @property
    def latest(self) -> Source:
        """That of the disk which writes the image, or else of the one that came last: it opens it for all of them."""
        return next((s for s in self._sources if s.use.writes), self._sources[-1])

    @property
    def timeout(self) -> float:
        """How long a call to the image that they share may take, seconds: the disk that waits longest has its way."""
        return max(source.timeout for source in self._sources)

    def name_of_one(self) -> str | None:
        """The name of the disk, if there is but one."""
        return self._sources[0].use.disk if len(self._sources) == 1 else None

    def are_bases(self) -> bool:
        """True if no disk is on it that an operator could resolve: it is read by the socket of its store only."""
        return all(source.use.is_base for source in self._sources)

    def are_withheld(self) -> bool:
        """True if another host has had the image just now: that it has changed is nothing to be warned of."""
        return any(source.withheld for source in self._sources)

    def lacks(self, source: Source) -> int:
        """Bytes that only the cache has of the disk with that source."""
        layers = self._cache.layers.private_of(source.use.disk)
        return sum(layer.sectors for layer in layers) * SECTOR

    def has_private(self) -> bool:
        """True if the cache has data that belongs on the image as it is: that it lacks, or of an overlay."""
        return any(self.lacks(source) for source in self._sources)

    def may_refresh(self, *, is_reached: bool) -> bool:
        """True if all disks may go on with an image that somebody else changed.

        One that is just being attached, to an image that is not reached yet, begins anew in any case.
        """
        return all(s.use.refresh or not (is_reached or s.resumed) for s in self._sources)

    async def check(self) -> None:
        """See that the image is still ours to write, where it was. Raises OSError."""
        for source in list(self._sources):
            await source.check()

    async def let_go(self) -> None:
        """Let go the claims on the image; the markers stay, and say whose it is. Raises nothing."""
        for source in list(self._sources):
            with contextlib.suppress(OSError):
                await source.leave()

    def stop_disks(self, fault: Exception) -> None:
        """Stop all disks, with a fault of Forebay itself as their reason."""
        for source in list(self._sources):
            source.stop_disk(fault)
