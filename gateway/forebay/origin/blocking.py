# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The blocking part of an image in a file or on a block device: what its threads do with the one open descriptor.

One descriptor does all the I/O of an image, so that a lock held on it fences every write (an unlocked second
descriptor would write past a lost NFS lease). It is buffered; O_DIRECT would take aligned buffers in `read` and aligned
pieces in `pieces`, and nothing else.
"""

import contextlib
import errno
import os
from collections.abc import Sequence
from itertools import islice

from forebay.origin.calls import (
    PUNCH_HOLE,
    UNSUPPORTED,
    Buffer,
    Status,
    SystemCalls,
    data_runs,
    written_runs,
)
from forebay.origin.opening import OpenImage
from forebay.origin.pieces import views_after
from forebay.origin.protocol import HOLE, MOST_EXTENTS, ZERO, Identity
from forebay.origin.threads import Descriptor
from forebay.origin.worker import syscalls

PAGE = 4096

MOST_READ = 8 << 20
"""Bytes that are read in one call, at most, to see which of them are zeros: each call has the whole time-out."""
"""Bytes of the kernel's page cache that are forgotten where one byte is to be read from the server."""


class BlockingFile:
    """The calls on one open image file. Every method blocks, raises OSError, and runs in a thread.

    The ranges that it is given lie in the image: `FileOrigin` has checked them.
    """

    def __init__(self, image: OpenImage, label: str, calls: SystemCalls) -> None:
        """Take over the descriptor of `image`. `label` names it in messages."""
        self.descriptor = Descriptor(image.fd)
        self._image = image
        self._label = label
        self._calls = calls

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly `length` bytes in a fresh buffer; zeros beyond the end of the image. EIO: the file became shorter."""
        found = bytearray(length)
        view = memoryview(found)
        wanted = min(length, self._image.size - offset)
        done = 0
        with self.descriptor as fd:
            while done < wanted:
                count = self._calls.preadv(fd, [view[done:wanted]], offset + done)
                if count == 0:
                    raise self._truncated(offset + done)
                done += count
        return found

    def _truncated(self, at: int) -> OSError:
        text = f"{self._label} ends at byte {at} but had {self._image.size}: it was truncated"
        return OSError(errno.EIO, text)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, HOLE | ZERO or 0) of the extents one after the other, covering the range."""
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        with self.descriptor as fd:
            if self._calls.status(fd).size < end:
                raise self._truncated(self._calls.status(fd).size)
            while at < end and len(found) < MOST_EXTENTS:
                data = min(end, self._next_data(fd, at))
                if data > at:
                    found.append((data - at, HOLE | ZERO))
                hole = min(end, self._calls.seek_hole(fd, data)) if data < end else end
                if data == hole < end:
                    break  # it moved while we looked: what is left counts as data
                if hole > data:
                    found.append((hole - data, 0))
                at = hole
        return [*found, (end - at, 0)] if at < end else found

    def written(self, offset: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """(first byte, byte behind the last) of what does not read as zeros, and up to which byte that is all of it."""
        with self.descriptor as fd:
            first = next(data_runs(self._calls, fd, offset, end), (end, end))[0]
            end = min(end, first - first % MOST_READ + MOST_READ)
            runs = list(islice(written_runs(self._calls, fd, first, end), MOST_EXTENTS))
        return runs, runs[-1][1] if len(runs) == MOST_EXTENTS else end

    def _next_data(self, fd: int, at: int) -> int:
        """Where the next data at or after `at` begins; the size of the image where there is none."""
        try:
            return self._calls.seek_data(fd, at)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._image.size
            raise

    def identity(self) -> Identity:
        """Size, times and inode as the server has them now.

        ESTALE: the file was deleted, renamed or replaced; EIO: its server does not know the descriptor any more, but
        the file, or nothing at all.
        """
        try:
            with self.descriptor as fd:
                ours = self._calls.status(fd)
        except OSError as error:
            if error.errno != errno.ESTALE or self._image.status is None:
                raise
            self._check_name(self._image.status)
            raise OSError(errno.EIO, f"{self._label}: the descriptor is stale") from error
        if ours.links == 0:
            raise OSError(errno.ESTALE, f"{self._label} was deleted or replaced while in use")
        self._check_name(ours)
        return Identity(ours.size, ours.mtime_ns, ours.ctime_ns, ours.inode)

    def _check_name(self, ours: Status) -> None:
        """Raise OSError(ESTALE) unless the name of the image still leads to the open file."""
        try:
            named = self._image.look()
        except FileNotFoundError:
            raise OSError(errno.ESTALE, f"{self._label} was renamed while in use") from None
        except OSError as error:
            if error.errno == errno.ESTALE:  # so is the store: who knows what becomes of it
                raise OSError(errno.EIO, f"{self._label}: its store is stale") from error
            raise
        if (named.device, named.inode) != (ours.device, ours.inode):
            raise OSError(errno.ESTALE, f"{self._label} was replaced by another file while in use")

    def forget(self) -> None:
        """Have the kernel read anew what it kept of the file in memory."""
        with self.descriptor as fd:
            self._calls.forget(fd)

    def is_dead(self) -> bool:
        """True if reads by this descriptor fail where those by a fresh one do not.

        So it is on NFS after the locks of the descriptor were lost with its lease, and where the store's process, which
        has it, has ended.
        """
        if self._image.fresh is None:
            return False
        at = self._first_unreadable()
        if at is None:
            return False
        fd = self._image.fresh()
        try:
            return self._calls.preadv(fd, [bytearray(1)], at) == 1
        finally:
            syscalls.close(fd)

    def _first_unreadable(self) -> int | None:
        """One of three bytes that cannot be read from the server by this descriptor; None if all can."""
        with self.descriptor as fd:
            for at in (0, self._image.size // 2, self._image.size - 1):
                with contextlib.suppress(
                    OSError
                ):  # of these pages alone: others may be reading the image
                    self._calls.forget(fd, at // PAGE * PAGE, PAGE)
                try:
                    self._calls.preadv(fd, [bytearray(1)], at)
                except OSError:
                    return at
        return None

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the buffers one after the other, all of them."""
        views = [memoryview(buffer) for buffer in buffers]
        with self.descriptor as fd:
            while views:
                count = self._calls.pwritev(fd, views, offset)
                if count == 0:
                    raise OSError(errno.EIO, f"{self._label}: nothing could be written at {offset}")
                offset += count
                views = views_after(views, count)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """Make the range read as zeros; `mode` is PUNCH_HOLE or ZERO_RANGE, which many file systems cannot do."""
        with self.descriptor as fd:
            self._calls.fallocate(fd, mode, offset, length)

    def can_punch(self) -> bool:
        """True if holes can be punched in the file. That is tried behind its end, where nothing can be lost."""
        behind = -(-self._image.size // PAGE) * PAGE
        try:
            self.allocate(PUNCH_HOLE, behind, PAGE)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return False
            raise
        return True

    def sync(self, *, times: bool) -> None:
        """Make durable what this descriptor wrote; with `times`, the file's times as well."""
        with self.descriptor as fd:
            try:
                (self._calls.fsync if times else self._calls.fdatasync)(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    self._calls.forget(fd)  # what reads back from now on is what the medium has
                raise


class BlockingDevice(BlockingFile):
    """The same on a block device, which has no holes, and no identity but its size."""

    def identity(self) -> Identity:
        """The size in bytes: nothing else about a device says that somebody wrote to it."""
        with self.descriptor as fd:
            return Identity(self._calls.device_size(fd))

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """One extent of data: nobody can say which part of a device was never written."""
        return [(length, 0)] if length and offset >= 0 else []

    def written(self, offset: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """All of the range."""
        return [(offset, end)], end

    def can_punch(self) -> bool:
        """True if the device can zero without being sent the zeros: the kernel punches no holes in any other."""
        with self.descriptor as fd:
            device = syscalls.fstat(fd).st_rdev
        place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
        if os.path.exists(f"{place}/partition"):
            place += "/.."
        with open(f"{place}/queue/write_zeroes_max_bytes", encoding="ascii") as limit:
            return int(limit.read()) > 0
