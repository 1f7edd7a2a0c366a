# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Hot regions: parts of images whose origin is written past the cache, so that a power cut may leave either version.

A region is 4 MiB of a clean layer. It is made hot, durably, before its origin is written for the first time, and cools
when everything that was written to the origin is durable. After a crash of the host the clean blocks of hot regions
are dropped, because nobody knows which of the writes to their origin have arrived.

That a region has cooled may be stored at any later time: until then more is dropped than has to be. So a commit takes
in some of them only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from forebay_cache.device.failure import Failure
from forebay_cache.durable.intent import Intent
from forebay_cache.format import ops
from forebay_cache.format.records import PAGE_KEY
from forebay_cache.index.changes import Changes, Share, nothing

Region = tuple[int, int]
"""(number of the layer, number of the region in it)."""

MOST_NEW = 2048
"""With so many that were made hot a commit has to come before the next ones are."""
_GONE_AT_ONCE = 4096
"""So many that have cooled are stored by one commit."""
_PART = 4096
"""Regions whose numbers are in one set: to make a larger one grow would hold up everybody."""


class Regions:
    """Some regions of one layer, by number."""

    def __init__(self, regions: Iterable[int] = ()) -> None:
        self._parts: dict[int, set[int]] = {}
        self.update(regions)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __contains__(self, region: int) -> bool:
        return region in self._parts.get(region // _PART, ())

    def numbers(self) -> list[int]:
        """All of them, as of now."""
        return list(chain.from_iterable(self._parts.values()))

    def update(self, regions: Iterable[int]) -> None:
        """Put in some more."""
        for region in regions:
            self._parts.setdefault(region // _PART, set()).add(region)

    def take_over(self, others: Regions) -> None:
        """Put in all of the others, part by part; these are of no use afterwards."""
        for number, part in others._parts.items():
            self._parts.setdefault(number, part).update(part)

    def discard(self, region: int) -> None:
        """Take one out, if it is there."""
        part = self._parts.get(region // _PART, set())
        part.discard(region)
        if not part:
            self._parts.pop(region // _PART, None)

    def take(self, most: int) -> list[int]:
        """Take out some, at most so many."""
        taken: list[int] = []
        while self._parts and len(taken) < most:
            number, part = self._parts.popitem()
            # pop() goes on where it was: to iterate from the beginning again and again passes over what is gone
            taken += [part.pop() for _ in range(min(len(part), most - len(taken)))]
            if part:
                self._parts[number] = part
        return taken


class HotRegions:
    """The hot regions of all layers. A participant of each commit."""

    def __init__(self, intent: Intent, failure: Failure) -> None:
        self._intent = intent
        self._failure = failure
        self._regions: dict[int, Regions] = {}  # by layer: those that are hot durably
        self._new: set[Region] = set()  # to be put into the index
        self._gone: dict[int, Regions] = {}  # by layer: to be taken out of it

    def of(self, layer: int) -> Regions:
        """The regions of a layer that are hot durably: their origin may be written.

        Whoever has made another one durable adds it.
        """
        return self._regions.setdefault(layer, Regions())

    def is_crowded(self) -> bool:
        """True if a commit should come before more is made hot."""
        return len(self._new) >= MOST_NEW

    def heat(self, layer: int, regions: Iterable[int]) -> None:
        """Put regions of a layer on record as hot: that is durable after the next sync, and in the index with the next
        commit.
        """
        gone = self._gone.get(layer, Regions())
        for region in regions:
            if self._failure.error is None:
                self._intent.note(ops.hot(layer, region))
            self._new.add((layer, region))
            gone.discard(region)
        if not gone:
            self._gone.pop(layer, None)

    def cool(self, layer: int) -> None:
        """The regions of that layer are hot no longer: no write to its origin is under way, or not durable."""
        cold = self._regions.pop(layer, Regions())
        new = {region for region in self._new if region[0] == layer}
        self._new -= new
        cold.update(region for _, region in new)
        cold.take_over(self._gone.pop(layer, Regions()))
        if cold:
            self._gone[layer] = cold

    def recover(self, regions: Iterable[Region], *, keep: bool) -> None:
        """At the start: these are on record. They stay hot, or are taken out with the next commits."""
        for layer, region in regions:
            if keep:
                self._new.add((layer, region))
                self.of(layer).update((region,))
            else:
                self._gone.setdefault(layer, Regions()).update((region,))

    def has_changes(self) -> bool:
        """True if a region has cooled since the last commit. One that was made hot is in the journal until then."""
        return bool(self._gone)

    def contribute(self, changes: Changes) -> Share:
        """Have a commit store which regions have become hot, and of some that they have cooled."""
        new, self._new = self._new, set()
        gone = self._take_gone()
        changes.hot = [(PAGE_KEY.pack(*r), True) for r in new]
        changes.hot += [(PAGE_KEY.pack(*r), False) for r in gone]

        def failed() -> None:
            for layer, region in gone:
                if (layer, region) not in self._new:  # made hot again meanwhile
                    self._gone.setdefault(layer, Regions()).update((region,))
            self._new |= {r for r in new if r[1] not in self._gone.get(r[0], ())}

        return Share(nothing, failed)

    def _take_gone(self) -> list[Region]:
        taken: list[Region] = []
        while self._gone and len(taken) < _GONE_AT_ONCE:
            layer, regions = next(iter(self._gone.items()))
            taken += [(layer, region) for region in regions.take(_GONE_AT_ONCE - len(taken))]
            if not regions:
                del self._gone[layer]
        return taken
