# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A block device, or a file, as `disk.Disk` is a disk of the gateway: the same methods, past the page cache or not."""

import mmap
import os
from pathlib import Path
from typing import Self

from lab.guest.disk import Disk


class Device:
    """What lies at one path. Every method raises OSError."""

    def __init__(self, path: str, *, buffered: bool = False) -> None:
        """With `buffered` by way of the page cache, which a write-back cache of files is."""
        self.fd = os.open(path, os.O_RDWR | (0 if buffered else os.O_DIRECT))
        self.size = os.lseek(self.fd, 0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def connect(self) -> None:
        """It is open already."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at an offset; both are multiples of 512."""
        with mmap.mmap(-1, length) as buffer:
            got = os.preadv(self.fd, [buffer], offset)
            return buffer[:got]

    def write(self, data: bytes, offset: int) -> None:
        """Write, and return once the kernel says that it is done."""
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            os.pwritev(self.fd, [buffer], offset)

    def flush(self) -> None:
        """What was written is durable when this returns."""
        os.fdatasync(self.fd)


def opened(where: str, *, buffered: bool = False) -> Disk | Device:
    """The disk at a socket, or what lies at any other path."""
    return Disk(where) if Path(where).is_socket() else Device(where, buffered=buffered)
