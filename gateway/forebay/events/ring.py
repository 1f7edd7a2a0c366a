# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The newest events, in memory: as many as there is room for. For one thread at a time."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

MOST_EVENTS = 4096
MOST_BYTES = 1 << 20


class Entry(NamedTuple):
    """One event. `id` grows from one to the next; `line` is the event as JSON, without a line feed."""

    id: int
    time: float
    disk: str
    line: bytes


class Ring:
    """Events in the order of their ids. The oldest go for those that come."""

    def __init__(self, most_events: int = MOST_EVENTS, most_bytes: int = MOST_BYTES) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        self._entries: list[Entry] = []
        self._bytes = 0
        self.dropped = 0
        """The id of the newest one that has gone; 0 if none has."""

    def add(self, entry: Entry) -> None:
        """Add one that is newer than all others."""
        self._entries.append(entry)
        self._bytes += len(entry.line)
        while len(self._entries) > self._most_events or self._bytes > self._most_bytes:
            gone = self._entries.pop(0)  # one microsecond
            self._bytes -= len(gone.line)
            self.dropped = gone.id

    def take_in(self, found: Iterable[Entry]) -> None:
        """Add what was kept by the process before, in whatever order, but for what is there already."""
        there = {entry.id for entry in self._entries}
        new = {entry.id: entry for entry in found if entry.id not in there}
        entries = sorted([*new.values(), *self._entries])
        self._entries.clear()
        self._bytes = 0
        for entry in entries:
            self.add(entry)

    def after(self, number: int, most: int | None = None) -> list[Entry]:
        """Those with a larger id, oldest first, and of these the first so many."""
        first = bisect_right(self._entries, number, key=lambda entry: entry.id)
        return self._entries[first : None if most is None else first + most]
