# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Reading slots from the device itself, past the kernel's cache, in one thread that comes last at the disk.

For whoever checks what lies on the device: the kernel's cache would answer for it, and be filled with what nobody asked
for. Where the file system knows no O_DIRECT, as tmpfs, reads are ordinary ones.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import platform
import threading
from collections.abc import Callable
from typing import TypeVar

from forebay_cache.device.worker import Worker
from forebay_cache.format.checksum import UNREADABLE, checksums
from forebay_cache.format.geometry import BLOCK, SECTOR, SECTORS

T = TypeVar("T")

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_WHO_PROCESS, _LOWEST = 1, 2 << 13 | 7  # linux/ioprio.h: best effort, the last of eight levels


class Medium:
    """An open device, read past the kernel's cache. ``at`` gives the offset of a slot. It has to be closed."""

    def __init__(self, fd: int, at: Callable[[int], int]) -> None:
        self._at = at
        self._buffer = mmap.mmap(-1, BLOCK)  # aligned as O_DIRECT wants it
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(f"/proc/self/fd/{fd}", flags | os.O_DIRECT)
        except OSError:
            self._fd = os.dup(fd)

    def sums(self, slot: int) -> list[int]:
        """The checksums of the sectors of a slot as they lie there; UNREADABLE for those that cannot be read."""
        with memoryview(self._buffer) as whole:
            try:
                self._read(whole, self._at(slot))
                return checksums(whole)
            except OSError:
                return [self._sector(whole[s * SECTOR :][:SECTOR], slot, s) for s in range(SECTORS)]

    def _sector(self, part: memoryview, slot: int, sector: int) -> int:
        with part:
            try:
                self._read(part, self._at(slot) + sector * SECTOR)
            except OSError:
                return UNREADABLE
            return checksums(part)[0]

    def _read(self, buffer: memoryview, offset: int) -> None:
        if os.preadv(self._fd, [buffer], offset) != len(buffer):
            raise OSError(errno.EIO, "short read from the cache device")

    def close(self) -> None:
        """Close it. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._buffer.close()


class IdlePriorityReader:
    """A thread whose reads the disk does after everybody else's, where its scheduler knows of priorities.

    It has the last priority of those that are served at all ("best effort", level 7), not the class "idle", and no less
    of the processor: guests may be waiting for what it holds while it reads, the interpreter's lock and a pin.
    """

    def __init__(self, name: str, limit: float = math.inf) -> None:
        """``limit``: after how many seconds a job is given up."""
        self._limit = limit
        self._worker = Worker(name)
        self._worker.run_now(_stand_back)

    async def ask(self, job: Callable[[], T]) -> T:
        """Run ``job`` in the thread; return what it returns, raise what it raises, or OSError(ETIMEDOUT).

        Not cancellable.
        """
        found: list[T] = []
        await self._worker.run(lambda: found.append(job()), self._limit)
        return found[0]

    @property
    def hangs(self) -> bool:
        """True while a job is under way that was given up."""
        return self._worker.is_hanging

    def close(self) -> None:
        """End the thread."""
        self._worker.close()


def _stand_back() -> None:
    """Give the calling thread, and it alone, the lowest priority at the disk."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None and threading.current_thread() is not threading.main_thread():
        ctypes.CDLL(None).syscall(number, _WHO_PROCESS, 0, _LOWEST)  # a sandbox may forbid it
