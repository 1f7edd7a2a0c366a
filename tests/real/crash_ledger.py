# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk may hold: each 512 bytes of it, at every record of a log, from the marks that the guests left there.

A guest says what it is about to do, does it, and says that it was answered. So at any record of the log a cell (512
bytes, the least that a medium writes whole) may hold what it held when it was last flushed, or what came later, be it
answered or on its way.

The operator may give data up (`detach --discard`, `resolve`), and somebody may put a backup over the image. Until it is
known what that has come to the ledger is in another :class:`Phase`; then the disk has a new beginning.
"""

import bisect
import marshal
import struct
import zlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

CELL = 512
SECTOR = 4096
ZERO = bytes(CELL)
NEVER = 1 << 60
LONGEST = 120_000
"""Bytes of a mark: FUSE cuts longer writes."""

Spans = list[tuple[int, int]]
"""From a record on, and before another one."""

ALWAYS: Spans = [(-1, NEVER)]


def content(cell: int, operation: int) -> bytes:
    """What a write puts into a cell: all of it says so. Operation 0: what the image held before."""
    if operation == 0 and cell // 8 % 7 == 0:
        return ZERO
    return struct.pack("<QQ", cell, operation) * (CELL // 16)


def image_content(size: int) -> bytes:
    """Of an image that nobody has written to yet."""
    return b"".join(content(cell, 0) for cell in range(size // CELL))


def backup_content(size: int, number: int) -> bytes:
    """Of a backup that is put over the image: like no other."""
    return b"".join(struct.pack("<QQ", cell, number) * (CELL // 16) for cell in range(size // CELL))


def packed(content: bytes) -> bytes:
    """A whole image for a mark, which has to fit into one write."""
    found = zlib.compress(content, 1)
    assert len(found) < LONGEST, f"{len(found)} bytes"
    return found


class Phase(Enum):
    """What is being done to the image and the disk on it."""

    NORMAL = "normal"
    DISCARDING = "the disk is detached, and what is dirty given up"
    RESTORING = "somebody writes a backup over the image"
    RESTORED = "the image is a backup, and the cache may have data of the disk"
    RESOLVING = "the operator has said whose data is kept"


def told(data: bytes, cell: int) -> str:
    """What a cell holds, in words."""
    if not any(data):
        return "zeros"
    where, operation = struct.unpack_from("<QQ", data)
    whole = data == content(where, operation)
    return f"{'' if whole else 'part of '}operation {operation}{'' if where == cell else f' of cell {where}'}"


@dataclass(eq=False)
class Operation:
    """One write, or zeroing, of some cells. `begun` and `ended` are numbers of records."""

    number: int
    first: int
    count: int
    zero: bool
    fua: bool
    begun: int
    ended: int = NEVER

    def value(self, cell: int) -> bytes:
        """What it puts there."""
        return ZERO if self.zero else content(cell, self.number)


@dataclass
class Ledger:
    """As of the record up to which :meth:`advance` went."""

    size: int
    operations: dict[int, Operation] = field(default_factory=dict)
    cells: dict[int, list[Operation]] = field(default_factory=dict)
    floor: dict[int, int] = field(default_factory=dict)  # how many of a cell's are below
    home: dict[int, int] = field(default_factory=dict)  # the same for what the image has to have
    said: set[str] = field(default_factory=set)
    mode: str = ""
    phase: Phase = Phase.NORMAL
    is_past_cache: bool = False
    """The device hung: writes may have gone past it, straight to the image."""
    backup: bytes = b""
    """While RESTORED and RESOLVING: what the image holds, or held before the disk's own data came over it."""
    keeps: str = ""
    becomes: bytes | None = None
    """While RESOLVING: what will have come of it, where the life went on so far."""
    saved: dict[str, bytes] = field(default_factory=dict)
    """Images that were made of the disk, by name."""

    def __post_init__(self) -> None:
        self.base = image_content(self.size)
        """What the disk held at its beginning."""
        self._before = b""  # what the image held when the backup came over it
        self._asked: dict[int, dict[int, int]] = {}
        self._answered: dict[int, int] = {}  # by cell: how many are below its last answered one
        self._known: dict[int, tuple[bytes, Spans]] = {}
        self._at: dict[int, float] = {}
        self._right: dict[int, dict[int, bytes]] = {}  # by floor and sector: what was found right
        self._last: tuple[bytes, Spans] | None = None
        self.shown = bytearray(self.base)

    def take(self, number: int, mark: bytes) -> None:
        """One mark, which is record `number`."""
        kind, *rest = marshal.loads(mark)
        getattr(self, f"_{kind}")(number, *rest)

    def _begin(
        self, record: int, number: int, first: int, count: int, zero: bool, fua: bool, at: float
    ) -> None:
        operation = Operation(number, first, count, zero, fua, record)
        self.operations[number] = operation
        self._at[record] = at
        self._forget(operation)
        for cell in range(first, first + count):
            self.cells.setdefault(cell, []).append(operation)
            self.shown[cell * CELL : (cell + 1) * CELL] = operation.value(cell)

    def _end(self, record: int, number: int, at: float) -> None:
        operation = self.operations[number]
        operation.ended = record
        self._at[record] = at
        self._forget(operation)
        for cell in range(operation.first, operation.first + operation.count):
            self._answered[cell] = self.cells[cell].index(operation) + 1
            self._rises(self._answered, cell)
        if operation.fua:
            mine = range(operation.first, operation.first + operation.count)
            self._raise(self.floor, {cell: self._answered[cell] for cell in mine})

    def _forget(self, operation: Operation) -> None:
        for sector in range(operation.first // 8, (operation.first + operation.count + 7) // 8):
            self._known.pop(sector, None)
        self._last = None

    def _flush(self, _: int, number: int) -> None:
        self._asked[number] = dict(self._answered)

    def _flushed(self, _: int, number: int) -> None:
        self._raise(self.floor, self._asked.pop(number))

    def _drain(self, record: int, number: int) -> None:
        self._flush(record, number)

    def _drained(self, _: int, number: int) -> None:
        answered = self._asked.pop(number)
        if self.phase is Phase.DISCARDING:
            return  # nothing is dirty any more, because it was given up
        self._raise(self.floor, answered)
        self._raise(self.home, answered)

    def _raise(self, floor: dict[int, int], to: dict[int, int]) -> None:
        for cell, below in to.items():
            if floor.get(cell, 0) < below:
                floor[cell] = below
                self._rises(floor, cell)

    def _rises(self, floor: dict[int, int], cell: int) -> None:
        right = self._right.get(id(floor))
        if right is not None:
            right.pop(cell // 8, None)

    def _say(self, _: int, what: str) -> None:
        if what == "attaching":
            self.said.clear()
        self.said.add(what)

    def _change(self, _: int, mode: str) -> None:
        self.mode = mode

    def _order(self, _: int, name: str, value: float) -> None:
        self.is_past_cache |= name == "device" and value == float("inf")

    def _wrong(self, _: int, what: str) -> None:
        """For who reads the log: the life has failed already."""

    # -- what the operator gives up ---------------------------------------------------------------------------

    def _discarding(self, _: int) -> None:
        self.phase = Phase.DISCARDING
        self.said.add("detaching")

    def _restoring(self, _: int) -> None:
        self.phase = Phase.RESTORING

    def _restored(self, _: int, backup: bytes, before: bytes) -> None:
        self.phase = Phase.RESTORED
        self.backup, self._before = zlib.decompress(backup), zlib.decompress(before)

    def _resolving(self, _: int, keeps: str) -> None:
        self.phase, self.keeps = Phase.RESOLVING, keeps

    def _saved(self, _: int, name: str, content: bytes) -> None:
        self.saved[name] = zlib.decompress(content)

    def _became(self, _: int, content: bytes) -> None:
        """A new beginning: the image and the disk are this, durably."""
        self.phase, self.becomes = Phase.NORMAL, None
        self.base = zlib.decompress(content)
        self.shown[:] = self.base
        self._last = None
        for known in (self.cells, self.floor, self.home, self._asked, self._answered, self._known):
            known.clear()
        self._right.clear()

    def base_of(self, cell: int) -> bytes:
        """What the cell held at the beginning."""
        return self.base[cell * CELL : (cell + 1) * CELL]

    # -- looking ----------------------------------------------------------------------------------------------

    def answered(self) -> dict[int, int]:
        """The floor of those who were killed: everything that was answered."""
        return self._answered

    def legal(self, cell: int, below: int) -> list[bytes]:
        """Newest first: what a cell may hold where the first `below` operations on it have to have happened."""
        operations = self.cells.get(cell, [])
        values = [op.value(cell) for op in reversed(operations[max(0, below - 1) :])]
        return values if below else [*values, self.base_of(cell)]

    def wrong(self, found: bytes, floor: dict[int, int]) -> str | None:
        """Why a disk must not hold that; None: it may. What was found right stays so until the floor rises."""
        if found == self.shown:
            return None
        right = self._right.setdefault(id(floor), {})
        for sector in range(self.size // SECTOR):
            data = found[sector * SECTOR : (sector + 1) * SECTOR]
            if right.get(sector) == data:
                continue
            for cell in range(sector * 8, sector * 8 + 8):
                part = data[cell % 8 * CELL : (cell % 8 + 1) * CELL]
                below = floor.get(cell, 0)
                if part not in self.legal(cell, below):
                    known = [op.number for op in self.cells.get(cell, [])]
                    return f"cell {cell} holds {told(part, cell)}; of its operations {known} {below} are durable"
            right[sector] = data
        return None

    def lacks(self, shown: bytes, floor: dict[int, int]) -> str | None:
        """While a backup lies over the image, why the disk's own data over that is too little; None: it is not.

        What the image had before the backup came may be gone with it, but nothing that only the cache had.
        """
        for cell in range(self.size // CELL):
            at = slice(cell * CELL, (cell + 1) * CELL)
            legal = self.legal(cell, floor.get(cell, 0))
            if shown[at] in legal or (shown[at] == self.backup[at] and self._before[at] in legal):
                continue
            had = told(self._before[at], cell)
            return f"cell {cell} shows {told(shown[at], cell)}, and the image had {had} before the backup"
        return None

    def is_torn_over_backup(self, image: bytes) -> str | None:
        """Why an image that gets the disk's own data over a backup is of no instant; None: it is, or nobody knows.

        A disk that ended in the middle of a pass has two layers, which come one after the other.
        """
        if self.becomes is None:
            return None
        found = ALWAYS
        for cell in range(self.size // CELL):
            at = slice(cell * CELL, (cell + 1) * CELL)
            if self.becomes[at] == self.backup[at]:
                mine = ALWAYS if image[at] == self.backup[at] else []
            else:
                mine = self._times_over_backup(cell, image[at], self.becomes[at])
            found = _in_both(found, mine)
            if not found:
                return (
                    f"cell {cell} holds {told(image[at], cell)}, which it did not when others did"
                )
        return None

    def _times_over_backup(self, cell: int, holds: bytes, last: bytes) -> Spans:
        operations, found = self.cells.get(cell, []), []
        is_backup = holds == self.backup[cell * CELL : (cell + 1) * CELL]
        if last == self.base_of(cell) and (is_backup or holds == last):
            return ALWAYS  # it came with others of its sector
        for n, operation in enumerate(operations):
            later = min((op.ended for op in operations[n + 1 :]), default=NEVER)
            if holds == operation.value(cell):
                found.append((operation.begun, later))
            elif is_backup and last == operation.value(cell):
                found.append((-1, operation.ended))
        if holds == self.base_of(cell):
            found.append((-1, min((op.ended for op in operations), default=NEVER)))
        return found

    def instants(self, found: bytes) -> Spans:
        """When the disk held exactly that: spans of record numbers, and of seconds since the epoch.

        Raises ValueError where there was no such instant.
        """
        if self._last is not None and self._last[0] == found:
            return self._last[1]
        records = ALWAYS
        for sector in range(self.size // SECTOR):
            data = found[sector * SECTOR : (sector + 1) * SECTOR]
            mine = self._spans_of(sector, data)
            if mine == ALWAYS:
                continue
            both = _in_both(records, mine)
            if not both:
                what = told(data[:CELL], sector * SECTOR // CELL)
                raise ValueError(
                    f"sector {sector} holds {what} of {mine}, and the others are of {records}"
                )
            records = both
        self._last = found, records
        return records

    def _spans_of(self, sector: int, data: bytes) -> Spans:
        """The same for one sector."""
        known = self._known.get(sector)
        if known is not None and known[0] == data:
            return known[1]
        spans = ALWAYS
        for cell in range(sector * 8, sector * 8 + 8):
            operations = self.cells.get(cell, [])
            part = data[cell % 8 * CELL : (cell % 8 + 1) * CELL]
            mine = []
            for n in range(-1, len(operations)):
                if part == (operations[n].value(cell) if n >= 0 else self.base_of(cell)):
                    until = min((op.ended for op in operations[n + 1 :]), default=NEVER)
                    mine.append((operations[n].begun if n >= 0 else -1, until))
            if not mine:
                raise ValueError(f"cell {cell} holds {told(part, cell)}")
            spans = _in_both(spans, mine)
        if not spans:
            raise ValueError(
                f"sector {sector} holds {told(data[:CELL], sector * 8)} and others at no time"
            )
        self._known[sector] = bytes(data), spans
        return spans

    def seconds(self, spans: Spans) -> list[tuple[float, float]]:
        """Spans of records as seconds since the epoch: not later than, not earlier than."""
        return [(self._at.get(a, 0.0), self._at.get(b, float("inf"))) for a, b in spans]


def _in_both(one: Spans, other: Spans) -> Spans:
    """What lies in a span of each, as spans apart from each other: overlapping ones would double with every cell."""
    found: Spans = []
    for a, b in sorted((max(a, c), min(b, d)) for a, b in one for c, d in other):
        if a >= b:
            continue
        if found and a <= found[-1][1]:
            found[-1] = found[-1][0], max(b, found[-1][1])
        else:
            found.append((a, b))
    return found


class Marks:
    """The marks of a log; a ledger that follows."""

    def __init__(self, records: list[tuple[Any, ...]], size: int) -> None:
        self._found = [(n, record[1]) for n, record in enumerate(records) if record[0] == "mark"]
        self._numbers = [n for n, _ in self._found]
        self._taken = 0
        self.ledger = Ledger(size)

    def _next_beginning(self, taken: int) -> bytes | None:
        for _, mark in self._found[taken:]:
            kind, *rest = marshal.loads(mark)
            if kind == "became":
                return zlib.decompress(rest[0])
        return None

    def advance(self, to: int) -> Ledger:
        """The ledger as of record `to`."""
        until = bisect.bisect_left(self._numbers, to)
        for number, mark in self._found[self._taken : until]:
            self.ledger.take(number, mark)
            if self.ledger.phase is Phase.RESOLVING and self.ledger.becomes is None:
                self.ledger.becomes = self._next_beginning(until)
        self._taken = max(self._taken, until)
        return self.ledger
