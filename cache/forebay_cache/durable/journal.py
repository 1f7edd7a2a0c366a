# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The intent journal: a ring on the cache device that holds every change of the index since its last commit.

Frames lie one after another::

    magic u32 | payload length u32 | sequence u64 | crc32 u32 | 0 u32 | payload, padded to 8 bytes

all little endian. The checksum is seeded with the device's uuid and covers sequence, length and payload, so that a
frame of an earlier life of the device is never taken for one of this. Replay stops at the first frame that is not
the next one. A frame that would cross the end of the ring starts over at its beginning; a frame with magic ``WRAP``
says so where there is room for a header.

A frame is written (not synced) before the request is answered: the kernel then has it, and a killed daemon loses
nothing. One ``fdatasync`` of the device makes data and frames durable together.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from forebay_cache.device.device import Device
from forebay_cache.format.superblock import JOURNAL_OFFSET

_HEADER = struct.Struct("<IIQII")
_HEADER_SIZE = _HEADER.size
_COVERED = struct.Struct("<QI")
_MAGIC = 0x4C4A4246  # "FBJL"
_WRAP = 0x57524246  # "FBRW"


@dataclass(frozen=True)
class Position:
    """A place in the journal: byte offset in the ring, and the sequence number of the frame that goes there."""

    offset: int
    sequence: int


Frame = list[tuple[int, bytes]]
"""One frame that has its place: what is to be written where on the device, in this order."""


class JournalFull(OSError):
    """The ring has no room for a frame until a commit has trimmed it. An ENOSPC for whoever does not tell it apart."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the intent journal is full")


class Journal:
    """The ring of one device. ``head`` is where the next frame goes, ``size`` its size in bytes."""

    def __init__(self, device: Device, start: Position) -> None:
        self._device = device
        self.size = device.layout.journal_size
        self._seed = zlib.crc32(device.layout.uuid.bytes)
        self.head = start
        self.last_frame = (JOURNAL_OFFSET, 0)
        """Where on the device the newest frame lies, and how long it is."""
        self._total = 0
        self._trimmed = 0

    @property
    def used(self) -> int:
        """How many bytes a replay would read."""
        return self._total - self._trimmed

    def fits(self, payload: int) -> bool:
        """True if a frame with ``payload`` bytes can be appended now, wherever it falls in the ring."""
        return self._total - self._trimmed + 2 * (_HEADER_SIZE + payload + 8) < self.size

    def append(self, payload: bytes) -> None:
        """Write one frame. Raises JournalFull, or OSError when the device refuses it."""
        self.write(self.place(payload))

    def place(self, payload: bytes) -> Frame:
        """The next frame, to be written at once, and before the one after it. Raises JournalFull.

        It counts from now on: where writing it fails the device has failed, and nothing is appended any more.
        """
        if not self.fits(len(payload)):
            raise JournalFull
        offset, sequence = self.head.offset, self.head.sequence
        body = payload + bytes(-len(payload) % 8)
        length = _HEADER.size + len(body)
        skipped = 0
        frame: Frame = []
        if offset + length > self.size:
            skipped = self.size - offset
            if skipped >= _HEADER.size:
                frame = [(JOURNAL_OFFSET + offset, _HEADER.pack(_WRAP, 0, sequence, 0, 0))]
            offset = 0
        crc = zlib.crc32(body, zlib.crc32(_COVERED.pack(sequence, len(payload)), self._seed))
        header = _HEADER.pack(_MAGIC, len(payload), sequence, crc, 0)
        frame.append((JOURNAL_OFFSET + offset, header + body))
        self.last_frame = JOURNAL_OFFSET + offset, length
        self._total += skipped + length
        self.head = Position(offset + length, sequence + 1)
        return frame

    def write(self, frame: Frame) -> None:
        """Hand a frame to the kernel. Raises OSError. Threads call it as well."""
        for offset, data in frame:
            self._device.write(offset, data)

    def mark(self) -> tuple[Position, int]:
        """The end of the journal now, to be given to :meth:`trim` once the index holds all before it."""
        return self.head, self._total

    def trim(self, mark: tuple[Position, int]) -> None:
        """Everything before the mark is in the index, durably: its bytes may be written over."""
        self._trimmed = mark[1]

    def replay(self) -> Iterator[bytes]:
        """The payloads of the frames from the start position on; afterwards the head is behind the last good one."""
        while True:
            start, skipped = self.head.offset, 0
            found = self._frame(start)
            if found is None and start and self._may_wrap():
                start, skipped = 0, self.size - start
                found = self._frame(start)
            if found is None:
                return
            length = _HEADER.size + len(found) + -len(found) % 8
            self._total += skipped + length
            self.head = Position(start + length, self.head.sequence + 1)
            yield found

    def _may_wrap(self) -> bool:
        offset = self.head.offset
        if self.size - offset < _HEADER.size:
            return True
        raw = bytearray(_HEADER.size)
        self._device.read_into(JOURNAL_OFFSET + offset, [raw])
        magic, _, sequence, _, _ = _HEADER.unpack(raw)
        return bool(magic == _WRAP and sequence == self.head.sequence)

    def _frame(self, offset: int) -> bytes | None:
        if offset + _HEADER.size > self.size:
            return None
        raw = bytearray(_HEADER.size)
        self._device.read_into(JOURNAL_OFFSET + offset, [raw])
        magic, length, sequence, crc, _ = _HEADER.unpack(raw)
        padded = length + -length % 8
        if (
            magic != _MAGIC
            or sequence != self.head.sequence
            or offset + _HEADER.size + padded > self.size
        ):
            return None
        body = bytearray(padded)
        if padded:
            self._device.read_into(JOURNAL_OFFSET + offset + _HEADER.size, [body])
        if zlib.crc32(body, zlib.crc32(_COVERED.pack(sequence, length), self._seed)) != crc:
            return None
        return bytes(body[:length])
