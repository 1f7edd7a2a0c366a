# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A file that is written from its start to its end, in which zeros become holes."""

import errno
import os
from collections.abc import Iterator

from forebay.origin.pieces import data_in
from forebay.origin.worker import syscalls

STEP = 1 << 20
"""Bytes that are read, looked at and written at a time."""


class SparseFile:
    """An open file of a store. Each method blocks, and raises OSError."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.data = 0
        """Bytes that were written to it since it was opened, without zeros."""

    def cut(self, size: int) -> None:
        """Have it end there; what is written beyond comes to holes."""
        syscalls.ftruncate(self.fd, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write, but for blocks of zeros. Nothing may have been written there since it was cut."""
        for at, part in data_in(offset, data):
            syscalls.pwrite_all(self.fd, part, at)
            self.data += len(part)

    def sync(self) -> None:
        """Have all that was written durable. The kernel need not keep it in memory then."""
        syscalls.fdatasync(self.fd)
        syscalls.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, length: int) -> bytes:
        """What is there, less than `length` only at its end."""
        return syscalls.pread(self.fd, length, offset)

    def steps(self, end: int) -> Iterator[bytes]:
        """All of it from its start to `end`, with zeros where it is shorter."""
        for at in range(0, end, STEP):
            length = min(STEP, end - at)
            yield self.read(at, length).ljust(length, b"\0")

    @property
    def allocated(self) -> int:
        """Bytes that it takes in its store."""
        return syscalls.fstat(self.fd).st_blocks * 512


def data_of(fd: int, size: int, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of all that is no hole of an open file from `start` to `size`, a STEP at most each."""
    while start < size:
        try:
            start = syscalls.lseek(fd, start, os.SEEK_DATA)
        except OSError as fault:
            if fault.errno == errno.ENXIO:  # no more data
                return
            raise
        end = min(syscalls.lseek(fd, start, os.SEEK_HOLE), size)
        while start < end:
            length = min(STEP - start % STEP, end - start)
            yield start, syscalls.pread(fd, length, start)
            start += length


def in_steps(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of STEP; the last one may be shorter."""
    waiting: list[bytes] = []
    length = 0
    for chunk in chunks:
        waiting.append(chunk)
        length += len(chunk)
        if length >= STEP:
            joined = b"".join(waiting)
            whole = length // STEP * STEP
            for at in range(0, whole, STEP):
                yield joined[at : at + STEP]
            waiting, length = [joined[whole:]], length - whole
    if length:
        yield b"".join(waiting)
