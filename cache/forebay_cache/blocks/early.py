# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a flush is going to wait for, begun early.

A guest that writes a little and flushes, again and again, waits for the device each time. Where that is seen, the
kernel is asked to begin writing data and record as soon as the write was answered (sync_file_range, with
SYNC_FILE_RANGE_WRITE), so that the device works while the guest sends its flush. Nothing is durable by it: the flush
is the sync that it is anyhow, which finds less to do, and reports what fails.
"""

from __future__ import annotations

from forebay_cache.cache import Cache
from forebay_cache.device import pace as timing
from forebay_cache.format.entry import entry_at
from forebay_cache.format.geometry import PAGE_BLOCKS, block_runs, covered
from forebay_cache.layers.layer import Layer

FEW_WRITES = 2
"""So many writes before a flush are few."""
IN_A_ROW = 2
"""After so many flushes in a row, each behind few writes, the next one is expected to come soon."""
PAYS_SECONDS = 100e-6
"""It pays where syncs take longer: to begin costs the loop some 20 us, just when the guest is about to go on."""
LONG_SECONDS = 1e-3
"""To begin takes some microseconds, but longer where the device's queue is full, or the processor is taken away."""
LONG_IN_A_ROW = 3
"""After so many in a row that took long nothing is begun early ..."""
FLUSHES_WITHOUT = 1000
"""... for so many flushes: all others would wait as well."""


class EarlyStart:
    """The habit of one disk, whose writes go to private layers of `cache`."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._writes = 0  # since the last flush
        self._in_a_row = 0  # flushes behind few writes; below 0 after starts that took long
        self._long = 0  # starts in a row that did
        self._last: list[tuple[int, int]] = []

    def note_writes(self, writes: list[tuple[int, memoryview]], taken: int) -> None:
        """The first ``taken`` of some writes (offset, data) were stored; they are not answered yet."""
        self._writes += taken
        if self._in_a_row >= IN_A_ROW and self._writes <= FEW_WRITES:
            self._last = [(offset, len(data)) for offset, data in writes[:taken]]

    def note_flush(self) -> None:
        """A flush has come."""
        if self._writes > FEW_WRITES:
            self._in_a_row = min(self._in_a_row, 0)
        elif self._writes:
            self._in_a_row += 1
        self._writes = 0
        self._last = []

    def begin(self, layer: Layer) -> None:
        """The writes, which went to ``layer``, were answered: have data and records begun if a flush is expected."""
        cache = self._cache
        if not self._last or cache.threads.pace.is_slow or cache.sync.seconds < PAYS_SECONDS:
            return
        last, self._last = self._last, []
        began = timing.clock()
        try:
            self._begin(layer, last)
        except OSError:  # the sync is going to say what it is
            self._stay_away()
        took = timing.clock() - began
        cache.threads.pace.note_write_of_loop(took)
        self._long = self._long + 1 if took > LONG_SECONDS else 0
        if self._long == LONG_IN_A_ROW:
            self._stay_away()

    def _begin(self, layer: Layer, writes: list[tuple[int, int]]) -> None:
        device = self._cache.device
        for offset, length in writes:
            for block, start, part in block_runs(offset, length):
                for slot in _slots(layer, block, covered(start, part)):
                    device.begin_writing(device.at(slot, start), part)
        device.begin_writing(*self._cache.intent.journal.last_frame)

    def _stay_away(self) -> None:
        self._in_a_row, self._long = -FLUSHES_WITHOUT, 0


def _slots(layer: Layer, block: int, mask: int) -> list[int]:
    """The slots in which that layer has data of these sectors of a block."""
    number, i = divmod(block, PAGE_BLOCKS)
    page = layer.pages.look(number)
    if page is None:
        return []
    return [slot for slot, there in entry_at(page, i).places() if there & mask]
