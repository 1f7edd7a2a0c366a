# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Hot regions: parts of images whose origin is written past the cache, so that a power cut may leave either version.

A region is 4 MiB of a clean layer. It is made hot, durably, before its origin is written for the first time, and cools
when everything that was written to the origin is durable. After a crash of the host the clean blocks of hot regions
are dropped, because nobody knows which of the writes to their origin have arrived.
"""

from __future__ import annotations

from collections.abc import Iterable

from forebay_cache.device.failure import Failure
from forebay_cache.durable.intent import Intent
from forebay_cache.format import ops
from forebay_cache.format.records import PAGE_KEY
from forebay_cache.index.changes import Changes, Share, nothing

Region = tuple[int, int]
"""(number of the layer, number of the region in it)."""


class HotRegions:
    """The hot regions of all layers. A participant of each commit."""

    def __init__(self, intent: Intent, failure: Failure) -> None:
        self.regions: set[Region] = set()
        """Those that are hot durably: their origin may be written."""
        self._intent = intent
        self._failure = failure
        self._new: set[Region] = set()  # to be put into the index
        self._gone: set[Region] = set()  # to be taken out of it

    def heat(self, regions: Iterable[Region]) -> None:
        """Put regions on record as hot: that is durable after the next sync, and in the index with the next commit."""
        regions = list(regions)
        if self._failure.error is None:
            for layer, region in regions:
                self._intent.note(ops.hot(layer, region))
        self._new.update(regions)
        self._gone.difference_update(regions)

    def cool(self, layer: int) -> None:
        """The regions of that layer are hot no longer: no write to its origin is under way, or not durable."""
        cold = {r for r in self.regions | self._new if r[0] == layer}
        self.regions -= cold
        self._new -= cold
        self._gone |= cold

    def recover(self, regions: set[Region], *, keep: bool) -> None:
        """At the start: these are on record. Keep them there, or take them out with the next commit."""
        (self._new if keep else self._gone).update(regions)

    def has_changes(self) -> bool:
        """True if a region has cooled since the last commit. One that was made hot is in the journal until then."""
        return bool(self._gone)

    def contribute(self, changes: Changes) -> Share:
        """Have a commit store which regions have become hot, and which have cooled."""
        new, self._new = self._new, set()
        gone, self._gone = self._gone, set()
        changes.hot = [(PAGE_KEY.pack(*r), True) for r in new if r not in gone]
        changes.hot += [(PAGE_KEY.pack(*r), False) for r in gone]

        def failed() -> None:
            self._gone |= gone - self._new  # unless made hot again meanwhile
            self._new |= new - self._gone

        return Share(nothing, failed)
