# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The formats of an image that is saved: raw, and qcow2 as its specification in QEMU's docs/interop/qcow2.rst has it.

What a disk shows is told in order, without its zeros; a format says where in the file that goes, and what is written
around it. No format needs more memory for a larger disk than a table of its tables.
"""

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from forebay.origin.calls import Buffer

Parts = Sequence[tuple[int, Buffer]]
"""(offset, data): in the disk, or in the file."""

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
ENTRIES = CLUSTER // 8
"""Entries of a table that fills a cluster, of 8 bytes each."""
COUNTS = CLUSTER // 2
"""Reference counts in a block of them, of 16 bits each."""
COPIED = 1 << 63
"""In an entry: the reference count of what it names is one."""
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""Up to the length of the header: version 3."""
UNIT = 512
"""Bytes of which the size of a disk is a multiple."""


class Form(Protocol):
    """Where in a file the data of one disk goes."""

    begins_with: int
    """Bytes of the file before anything is written."""

    def placed(self, parts: Parts) -> Parts:
        """What is written to the file for some data of the disk, which follows all that was told before."""

    def end(self) -> Iterator[Parts]:
        """What is written when all was told, a megabyte at a time at most."""


class Raw:
    """Each byte where it is on the disk."""

    def __init__(self, size: int) -> None:
        self.begins_with = size

    def placed(self, parts: Parts) -> Parts:
        """See Form."""
        return parts

    def end(self) -> Iterator[Parts]:
        """See Form: nothing."""
        return iter(())


class Qcow2:
    """Clusters in the order in which they come; behind those of each 512 MiB the table of them.

    In front are the header and the table of tables, at the end the reference counts, all of them one. The header is
    written last.
    """

    begins_with = 0

    def __init__(self, size: int) -> None:
        self._size = -(-size // UNIT) * UNIT
        tables = -(-self._size // (ENTRIES * CLUSTER))
        self._tables = _entries(max(1, tables))
        self._first = _clusters(8 * len(self._tables))
        self._used = 1 + self._first
        """Clusters of the file that are given away."""
        self._at = -1
        """Which table the clusters now belong to; -1: none."""
        self._table = _entries(ENTRIES)

    def placed(self, parts: Parts) -> Parts:
        """See Form."""
        found: list[tuple[int, Buffer]] = []
        for offset, data in parts:
            done = 0
            while done < len(data):
                at = offset + done
                part = data[done : done + CLUSTER - at % CLUSTER]
                table, i = divmod(at >> CLUSTER_BITS, ENTRIES)
                if table != self._at:
                    found += self._end_table()
                    self._at = table
                if not self._table[i]:
                    self._table[i] = self._take(1) | COPIED
                found.append(((self._table[i] & ~COPIED) + at % CLUSTER, part))
                done += len(part)
        return found

    def _take(self, count: int) -> int:
        """Where in the file so many clusters are that nobody has yet."""
        self._used += count
        return (self._used - count) << CLUSTER_BITS

    def _end_table(self) -> list[tuple[int, bytes]]:
        """The table of the clusters so far, and an empty one from now on."""
        if self._at < 0:
            return []
        where = self._take(1)
        self._tables[self._at] = where | COPIED
        table, self._table = self._table, _entries(ENTRIES)
        return [(where, _big_endian(table))]

    def end(self) -> Iterator[Parts]:
        """See Form."""
        yield self._end_table()
        yield [(CLUSTER, _big_endian(self._tables))]
        blocks = _blocks_for(self._used)
        index = _entries(blocks)
        table = self._take(_clusters(8 * blocks))
        first = self._take(blocks)
        for n in range(blocks):
            index[n] = first + (n << CLUSTER_BITS)
        yield [(table, _big_endian(index))]
        for n in range(blocks):
            ones = min(COUNTS, self._used - n * COUNTS)
            yield [(index[n], (b"\0\1" * ones).ljust(CLUSTER, b"\0"))]
        yield [(0, self._header(table, _clusters(8 * blocks)))]

    def _header(self, counts: int, clusters: int) -> bytes:
        """The header; `counts` is where the table of the reference counts lies, which has so many clusters."""
        fixed = (b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, self._size, 0, len(self._tables), CLUSTER)
        return HEADER.pack(*fixed, counts, clusters, 0, 0, 0, 0, 0, 4, HEADER.size)


def _entries(count: int) -> "array[int]":
    return array("Q", bytes(8 * count))


def _big_endian(entries: "array[int]") -> bytes:
    swapped = entries[:]
    swapped.byteswap()
    return swapped.tobytes()


def _clusters(length: int) -> int:
    """Clusters that so many bytes fill."""
    return -(-length // CLUSTER)


def _blocks_for(used: int) -> int:
    """Blocks of reference counts, for a file of so many clusters and these blocks and their table."""
    blocks = 0
    while True:
        wanted = -(-(used + blocks + _clusters(8 * blocks)) // COUNTS)
        if wanted == blocks:
            return blocks
        blocks = wanted


FORMS: dict[str, Callable[[int], Form]] = {"raw": Raw, "qcow2": Qcow2}
"""By name: for a disk of so many bytes."""
