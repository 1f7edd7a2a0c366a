# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a guest sees of a qcow2 image that stands for itself: read by its tables, in the guest's order.

Read here and not by QEMU's tools, which would follow a name in the file to any other; and here everything that the
tables say is held against the file. Source: docs/interop/qcow2.txt of QEMU.
"""

import sys
from array import array
from collections.abc import Callable, Iterator

from forebay.formats.qcow2 import Header
from forebay.importing.sparse import STEP
from forebay.importing.unpack import unpack_once
from forebay.units import printable

Read = Callable[[int, int], bytes]
"""Called with (offset, length); returns less at the end of the file."""

_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ZEROS = 1
_PARTS = 32
"""Of a cluster, in an image with extended tables."""


def check(header: Header) -> None:
    """Raises ValueError for an image that does not stand for itself, or cannot be read."""
    if header.backing:
        name = printable(header.backing.decode("utf-8", "replace")[:80])
        raise ValueError(f"needs a backing file ('{name}'): flatten it with 'qemu-img convert'")
    if header.external_data:
        raise ValueError("has its data in another file: flatten it with 'qemu-img convert'")
    if header.encryption:
        raise ValueError(f"is encrypted ({header.encryption}): decrypt it with 'qemu-img convert'")
    if header.corrupt:
        raise ValueError("is marked as corrupt: look at it with 'qemu-img check'")


def allocated(read: Read, header: Header, start: int) -> int:
    """Bytes of the clusters that have data, from about `start` on, at most. Raises ValueError."""
    entries = 0
    for _, words in _tables(read, header, start):
        if words is not None:
            of_clusters = words[::2] if header.extended else words
            entries += sum(1 for word in of_clusters if word and not _is_zeros(word, header))
    return min(entries * header.cluster, header.size)


def _is_zeros(word: int, header: Header) -> bool:
    """True if a cluster with data or without reads as zeros."""
    plain = not header.extended and header.version > 2
    return plain and word & (_ZEROS | _COMPRESSED) == _ZEROS


def data(read: Read, header: Header, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of what has data from `start` on, a STEP at most each; empty data tells how far it is.

    Raises ValueError.
    """
    clusters = _Clusters(read, header)
    for first, words in _tables(read, header, start):
        yield first, b""
        if words is not None:
            yield from clusters.of_table(first, words, start)


def _tables(read: Read, header: Header, start: int) -> Iterator[tuple[int, "array[int] | None"]]:
    """The second tables from the one with the byte `start`: where in the disk each begins, and its words.

    None for one that has none. Raises ValueError.
    """
    span = header.l2_entries * header.cluster
    first = _words(read(header.l1_offset, header.l1_entries * 8), header.l1_entries)
    for n in range(start // span, header.l1_entries):
        at = first[n] & _OFFSET
        if at == 0:
            yield n * span, None
            continue
        if at % header.cluster:
            raise ValueError(f"is damaged: a table begins at byte {at}")
        yield n * span, _words(read(at, header.cluster), header.cluster // 8)


def _words(content: bytes, count: int) -> "array[int]":
    if len(content) != count * 8:
        raise ValueError("is damaged, or cut off: a table of it is behind its end")
    words = array("Q", content)
    if sys.byteorder == "little":
        words.byteswap()
    return words


class _Clusters:
    """Reads the clusters that tables lead to; what lies side by side in the file as well is read at once."""

    def __init__(self, read: Read, header: Header) -> None:
        self._read = read
        self._header = header
        bits = 62 - (header.cluster_bits - 8)
        self._place = (1 << bits) - 1
        self._sectors = bits

    def of_table(self, first: int, words: "array[int]", start: int) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of the clusters of one table. Raises ValueError."""
        size, run = self._header.cluster, _Run(self._read)
        for at, word, parts in self._entries(first, words):
            if at + size <= start or at >= self._header.size:
                continue
            if word & _COMPRESSED:
                yield from run.end()
                yield at, self._clipped(at, self._unpacked(word))
            else:
                for offset, host, length in self._plain(at, word, parts):
                    yield from run.add(offset, host, self._length(offset, length))
        yield from run.end()

    def _entries(self, first: int, words: "array[int]") -> Iterator[tuple[int, int, int]]:
        """(place in the disk, word, which parts) of the entries that are not empty."""
        size = self._header.cluster
        if self._header.extended:
            for n in range(0, len(words), 2):
                if words[n]:
                    yield first + n // 2 * size, words[n], words[n + 1]
            return
        for n, word in enumerate(words):
            if word:
                yield first + n * size, word, 0

    def _plain(self, at: int, word: int, parts: int) -> Iterator[tuple[int, int, int]]:
        """(place in the disk, place in the file, length) of the data of a cluster as it is. Raises ValueError."""
        host, size = word & _OFFSET, self._header.cluster
        if host == 0:
            return
        if not self._header.extended:
            if _is_zeros(word, self._header):
                return
            parts = (1 << _PARTS) - 1
        if host % size:
            raise ValueError(f"is damaged: a cluster begins at byte {host}")
        there = parts & ~(parts >> _PARTS) & ((1 << _PARTS) - 1)
        if there == (1 << _PARTS) - 1:
            yield at, host, size
            return
        part = size // _PARTS
        for n in range(_PARTS):
            if there >> n & 1:
                yield at + n * part, host + n * part, part

    def _unpacked(self, word: int) -> bytes:
        host = word & self._place
        sectors = (word & (_COMPRESSED - 1)) >> self._sectors
        packed = self._read(host, (sectors + 1) * 512 - host % 512)
        return unpack_once(self._header.compression, packed, self._header.cluster)

    def _length(self, at: int, length: int) -> int:
        return max(0, min(length, self._header.size - at))

    def _clipped(self, at: int, found: bytes) -> bytes:
        return found[: self._length(at, len(found))]


class _Run:
    """Clusters that lie side by side, in the disk and in the file."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._at = self._host = self._length = 0

    def add(self, at: int, host: int, length: int) -> Iterator[tuple[int, bytes]]:
        """One more; what is read because it does not go on where the last one ended. Raises ValueError."""
        follows = self._length and (self._at, self._host) == (
            at - self._length,
            host - self._length,
        )
        if not follows or self._length + length > STEP:
            yield from self.end()
            self._at, self._host = at, host
        self._length += length

    def end(self) -> Iterator[tuple[int, bytes]]:
        """What is left to be read. Raises ValueError."""
        for done in range(0, self._length, STEP):
            length = min(STEP, self._length - done)
            found = self._read(self._host + done, length)
            if not found:
                raise ValueError("is damaged, or cut off: a cluster of it is behind its end")
            yield self._at + done, found.ljust(length, b"\0")
        self._length = 0
