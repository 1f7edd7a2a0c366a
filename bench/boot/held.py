# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A plugin of nbdkit: a file behind a link that all clients share, and that counts what goes through it.

    nbdkit python held.py file=IMAGE rate=BITS_PER_SECOND latency=SECONDS counts=FILE

An answer leaves when the link has sent it after all that were asked for before, and arrives `latency` later. nbdkit's
own filters know no delay below a millisecond, and let seconds' worth through at once. `counts` is a file of two
numbers of 8 bytes, requests and bytes, as they are at any time.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import nbdkit

API_VERSION = 2
COUNTS = struct.Struct("<QQ")

settings: dict[str, str] = {}


class Link:
    """When what passes through has arrived."""

    def __init__(self, rate: float, latency: float, counts: mmap.mmap) -> None:
        self._seconds_per_byte = 8 / rate
        self._latency = latency
        self._counts = counts
        self._free = 0.0
        self._lock = threading.Lock()

    def carry(self, length: int) -> None:
        """Return when so many bytes have passed."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + length * self._seconds_per_byte
            arrives = self._free + self._latency
            requests, total = COUNTS.unpack_from(self._counts)
            COUNTS.pack_into(self._counts, 0, requests + 1, total + length)
        time.sleep(max(0.0, arrives - time.monotonic()))


class Opened:
    """What is open: made once, before the first client."""

    fd: int
    link: Link


def config(key: str, value: str) -> None:
    settings[key] = value


def get_ready() -> None:
    Opened.fd = os.open(settings["file"], os.O_RDWR)
    counted = os.open(settings["counts"], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(counted, COUNTS.size)
    counts = mmap.mmap(counted, COUNTS.size)
    os.close(counted)
    Opened.link = Link(float(settings["rate"]), float(settings["latency"]), counts)


def thread_model() -> int:
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


def open(readonly: bool) -> int:  # noqa: A001 - nbdkit calls it
    return Opened.fd


def get_size(fd: int) -> int:
    return os.fstat(fd).st_size


def can_multi_conn(fd: int) -> bool:
    return True


def pread(fd: int, buffer: Any, offset: int, flags: int) -> None:
    os.preadv(fd, [buffer], offset)
    Opened.link.carry(len(buffer))


def pwrite(fd: int, buffer: Any, offset: int, flags: int) -> None:
    os.pwritev(fd, [buffer], offset)
    Opened.link.carry(len(buffer))


def flush(fd: int, flags: int) -> None:
    os.fdatasync(fd)


def can_extents(fd: int) -> bool:
    return True


def extents(fd: int, count: int, offset: int, flags: int) -> Iterator[tuple[int, int, int]]:
    end = offset + count
    while offset < end:
        try:
            data = min(end, os.lseek(fd, offset, os.SEEK_DATA))
        except OSError:  # none any more
            data = end
        if data > offset:
            yield offset, data - offset, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        if data < end:
            hole = min(end, os.lseek(fd, data, os.SEEK_HOLE))
            yield data, hole - data, 0
            data = hole
        offset = data
