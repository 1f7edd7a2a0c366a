# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How old a disk's private data is: since when each layer has had some, and when it was frozen.

Both are kept in the index, as the record "dirty" of the disk, so that lag outlives a restart.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from time import time as wall_clock

import trio

from forebay_cache import Cache, Layer

RECORD = "dirty"
"""Kind of the record: by layer number, seconds since the epoch, and when it was frozen (empty: it was not)."""


class Ages:
    """Of the private layers of one disk. With `kept` False nothing is put on record: nobody asks how old it is."""

    def __init__(self, cache: Cache, disk: str, *, kept: bool) -> None:
        self._cache = cache
        self._disk = disk
        self._kept = kept
        self.since: dict[int, float] = {}
        """By layer number, the trio time of the first write to it; absent where it never held anything."""
        self._frozen_at: dict[int, str] = {}

    def recall(self, layers: Iterable[Layer]) -> None:
        """Take over from the index how old is what an earlier life of the disk left in these layers.

        What was written in the last seconds before a kill may not be on record: it counts as written now.
        """
        known = self._cache.records.get(RECORD, self._disk) or {}
        for layer in layers:
            since, frozen = known.get(str(layer.id), (wall_clock(), ""))
            if layer.sectors:
                age = max(0.0, wall_clock() - since)
                self.since[layer.id] = trio.current_time() - age
            if frozen:
                self._frozen_at[layer.id] = frozen

    def note_first_write(self, layer: Layer) -> None:
        """The layer holds something from now on. Called for its first write only: `since` has it afterwards."""
        self.since[layer.id] = trio.current_time()
        self._put_on_record()

    def note_frozen(self, layer: Layer) -> None:
        """The layer is being frozen at this instant."""
        now = datetime.fromtimestamp(wall_clock(), UTC).isoformat(timespec="milliseconds")
        self._frozen_at[layer.id] = now
        self._put_on_record()

    def note_removed(self, layer: Layer) -> None:
        """The layer holds nothing any more, and will not again."""
        self.since.pop(layer.id, None)
        self._frozen_at.pop(layer.id, None)
        self._put_on_record()

    def forget(self) -> None:
        """Take the disk's record out of the index, with the next commit."""
        self._cache.records.put(RECORD, self._disk, None)

    def _put_on_record(self) -> None:
        """Keep what :meth:`recall` needs, from the next commit on."""
        if not self._kept:
            return
        now = trio.current_time()
        times = {
            str(ident): (wall_clock() - (now - since), self._frozen_at.get(ident, ""))
            for ident, since in self.since.items()
        }
        self._cache.records.put(RECORD, self._disk, times or None)

    def frozen_at(self, layer: Layer) -> str:
        """When that layer was frozen, UTC, in ISO 8601; empty where an earlier version did not record it."""
        return self._frozen_at.get(layer.id, "")

    def oldest(self, layers: Iterable[Layer]) -> float:
        """Seconds since the first write to those of the layers that hold anything; 0 where none does."""
        now = trio.current_time()
        return max((now - self.since.get(x.id, now) for x in layers if x.sectors), default=0.0)


def oldest_on_record(cache: Cache, disk: str) -> float:
    """Of a disk that is not served: seconds since the first write that is not in its image; 0 if none is on record."""
    since = [when for when, _ in (cache.records.get(RECORD, disk) or {}).values()]
    return max(0.0, wall_clock() - min(since)) if since else 0.0
