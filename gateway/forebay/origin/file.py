# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image in a regular file, off the event loop: threads, time-outs, and the order of what was given up.

When a call is given up (it took longer than `origin_timeout`, or its task was cancelled) its thread may still change
the image later. So a range with such a change under way is neither read nor written by anyone else before that thread
has ended: an old write can never land on top of a newer one, nor a read see first the one and then the other.
"""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial

import trio

from forebay.origin.addresses import FileAddress
from forebay.origin.blocking import BlockingFile
from forebay.origin.calls import PUNCH_HOLE, UNSUPPORTED, ZERO_RANGE, Buffer, SystemCalls
from forebay.origin.opening import OpenImage, open_fresh
from forebay.origin.order import ChangeOrder, SyncOrder
from forebay.origin.pieces import ZERO_PIECE, check_range, pieces
from forebay.origin.protocol import Identity
from forebay.origin.threads import Background, Descriptor, StoreThreads, bounded
from forebay.origin.worker import syscalls

_LAST = (1 << 63) - 1
"""No byte of a file lies behind that one."""

_zeros = bytes(ZERO_PIECE)

ALIGNED = 4096
"""What offset, length and memory of a read with O_DIRECT are multiples of."""

PIECE = 1 << 20
"""Bytes of one call."""


def _pass_over(_outcome: object) -> None:
    """For a thread whose outcome nobody waits for."""


class FileOrigin:
    """A raw image in a regular file. Implements forebay.origin.protocol.Origin.

    An error of `flush` means that what was written since the last good one is unknown: the kernel reports a failed
    write-out once and then forgets the data, so that a later flush succeeds and says nothing about it. Whoever holds
    the data writes it again, then flushes again. `sync_failures` counts these errors; see `SyncOrder` in order.py.
    """

    _blocking: type[BlockingFile] = BlockingFile
    """The class of the part that runs in threads."""

    def __init__(
        self,
        image: OpenImage,
        label: str,
        *,
        threads: StoreThreads,
        timeout: float,
        calls: SystemCalls | None = None,
    ) -> None:
        """Take over `image` and its descriptor. `timeout`: seconds that any call may take."""
        self.size = image.size
        self.read_only = image.read_only
        self.label = label
        self.timeout = timeout
        self._file = self._blocking(image, label, calls or SystemCalls())
        self._threads = threads
        self._changes = ChangeOrder(threads)
        self._syncs = SyncOrder(threads, self._sync, label)
        self._with_times = False
        """True if somebody asked that the next sync make the file's times durable as well."""
        self._refused: set[int] = set()
        """The modes of fallocate that this file turned out not to have."""
        self._asked = False
        """True once it is known whether holes can be punched."""

    @property
    def descriptor(self) -> Descriptor:
        """The one that does all I/O, for a thread that does something else with the image (locks it, say)."""
        return self._file.descriptor

    # ------------------------------------------------------------------------------------------------------- reading

    async def read(self, offset: int, length: int, background: Background = False) -> Buffer:
        """Exactly `length` bytes in a fresh buffer. What lies beyond the end of the image is zeros.

        Raises OSError: EIO when the file ends before `size`, ETIMEDOUT, or what the file system says.
        """
        check_range(self.label, self.size, offset, min(length, max(0, self.size - offset)))
        with bounded(self.timeout, f"reading {self.label}"):
            await self._changes.wait_for_range(offset, offset + length)
            return await self._threads.run(
                partial(self._file.read, offset, length), background=background
            )

    async def extents(
        self, offset: int, length: int, background: Background = False
    ) -> list[tuple[int, int]]:
        """(length, HOLE | ZERO or 0) of the extents one after the other, covering the range. Raises OSError."""
        check_range(self.label, self.size, offset, length)
        with bounded(self.timeout, f"asking for the holes of {self.label}"):
            await self._changes.wait_for_range(offset, offset + length)
            return await self._threads.run(
                partial(self._file.extents, offset, length), background=background
            )

    async def identity(self) -> Identity:
        """Size, times and inode as the server has them now.

        Raises OSError: ESTALE when the file was deleted or replaced, ETIMEDOUT.
        """
        with bounded(self.timeout, f"looking at {self.label}"):
            return await self._threads.run(self._file.identity)

    async def is_dead(self) -> bool:
        """True if the descriptor fails for ever where a fresh one works. Raises OSError: nobody knows."""
        with bounded(self.timeout, f"looking whether {self.label} can be read"):
            return await self._threads.run(self._file.is_dead)

    async def forget(self) -> None:
        """Read anew from now on what this host's kernel kept of the image in memory. Raises OSError."""
        with bounded(self.timeout, f"reading {self.label} anew"):
            await self._threads.run(self._file.forget)

    # ------------------------------------------------------------------------------------------------------- writing

    async def write(self, offset: int, data: Sequence[Buffer], background: bool = False) -> None:
        """Write the buffers one after the other from `offset`; never past the end. Not durable before `flush`.

        Buffers that can change are copied first: a thread that was given up must not see what comes later.
        Raises OSError; the range then holds what was there before, the new data, or a mix.
        """
        self._check_change(offset, sum(len(memoryview(buffer)) for buffer in data))
        at = offset
        for piece, length in pieces(data):
            write = partial(self._file.write, at, piece)
            await self._change(f"writing {self.label}", write, at, length, background)
            at += length

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        """Write several (offset, data) in one call of a thread. The buffers must not change later. Raises OSError."""
        for offset, data in ranges:
            self._check_change(offset, len(data))

        def write() -> None:
            for offset, data in ranges:
                self._file.write(offset, [data])

        changed = [(offset, offset + len(data)) for offset, data in ranges]
        with bounded(self.timeout, f"writing {self.label}"):
            await self._changes.make(write, changed, background)

    @property
    def punches(self) -> bool | None:
        """Whether holes can be punched in the file; None until that is known."""
        if PUNCH_HOLE in self._refused:
            return False
        return True if self._asked else None

    async def ask_punches(self) -> bool:
        """The same, once it was asked. That may change the file's times, and nothing else. Raises OSError."""

        def ask() -> None:
            if not self._file.can_punch():
                self._refused.add(PUNCH_HOLE)
            self._asked = True

        await self._change(f"asking {self.label} for a hole", ask, self.size, _LAST - self.size)
        return bool(self.punches)

    async def trim(self, offset: int, length: int) -> None:
        """Give space back where the file system can; zeros either way. Raises OSError."""
        await self.zero(offset, length, may_trim=True)

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make the range read as zeros. All of it has space then, or, with `may_trim`, none that can do without.

        Where no hole can be punched, `may_trim` leaves alone what reads as zeros, as holes do, and zeroes the rest in
        its place. Raises OSError.
        """
        self._check_change(offset, length)
        if length == 0:
            return
        if not may_trim:
            await self._zero_in_place(offset, length)
        elif PUNCH_HOLE in self._refused or not await self._allocate(PUNCH_HOLE, offset, length):
            await self._zero_written(offset, offset + length)

    async def _zero_written(self, offset: int, end: int) -> None:
        """Zero what does not read as zeros."""
        while offset < end:
            with bounded(self.timeout, f"looking for zeros of {self.label}"):
                await self._changes.wait_for_range(offset, end)
                runs, offset = await self._threads.run(partial(self._file.written, offset, end))
            for first, behind in runs:
                await self._zero_in_place(first, behind - first)

    async def _zero_in_place(self, offset: int, length: int) -> None:
        """Zero the range, by fallocate or by writing; all of it has space then."""
        if ZERO_RANGE in self._refused or not await self._allocate(ZERO_RANGE, offset, length):
            await self._write_zeros(offset, length)

    async def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """Zero the range by fallocate. False, with nothing done, if the file system does not have that mode."""
        allocate = partial(self._file.allocate, mode, offset, length)
        try:
            await self._change(f"zeroing {self.label}", allocate, offset, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._refused.add(mode)
            return False
        return True

    async def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            count = min(ZERO_PIECE, end - offset)
            await self.write(offset, [memoryview(_zeros)[:count]])
            offset += count

    async def _change(
        self,
        what: str,
        do: Callable[[], None],
        offset: int,
        length: int,
        background: bool = False,
    ) -> None:
        """Call `do`, which changes the range, in a thread, in its turn. `what` names it in the error of a time-out."""
        with bounded(self.timeout, what):
            await self._changes.make(do, [(offset, offset + length)], background)

    # ---------------------------------------------------------------------------------------------- durability, end

    @property
    def sync_failures(self) -> int:
        """How many flushes so far ended without anybody knowing what they made durable."""
        return self._syncs.failures

    async def flush(self, *, times: bool = False) -> None:
        """Make durable every write that returned before. Raises OSError: write all of it again, then flush again.

        Without `times` the file's times may be older ones after a power cut.
        """
        self._with_times = self._with_times or times
        await self._syncs.flush(self.timeout)

    def _sync(self) -> None:
        """One sync, in a thread."""
        times, self._with_times = self._with_times, False
        self._file.sync(times=times)

    async def extend(self, size: int) -> None:
        """Make the file `size` bytes long, where it is shorter; what is new reads as zeros. Raises OSError."""

        def extend() -> None:
            with self._file.descriptor as fd:
                if syscalls.fstat(fd).st_size < size:
                    syscalls.ftruncate(fd, size)
                syscalls.fsync(fd)

        with bounded(self.timeout, f"extending {self.label}"):
            await self._threads.run(extend)
        self.size = max(self.size, size)

    async def quiesce(self) -> None:
        """Wait until no call that was given up can change the image any more. ETIMEDOUT: one still can."""
        with bounded(self.timeout, f"waiting for a hung write to {self.label}"):
            await self._changes.wait_for_range(0, _LAST)

    async def close(self) -> None:
        """Close the descriptor, in the thread that uses it last if one hangs. Implies no flush.

        Where its store has no thread to spare it gets one of its own: the image's locks are on the descriptor.
        """
        close = self._file.descriptor.close
        try:
            with bounded(self.timeout, f"closing {self.label}"):
                await self._threads.run(close)
        except BaseException:
            trio.lowlevel.start_thread_soon(close, _pass_over)
            raise

    # -------------------------------------------------------------------------------------------------------- checks

    def _check_change(self, offset: int, length: int) -> None:
        """Raise OSError unless the image is open for writing and the range lies in it."""
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.label} is open for reading only")
        check_range(self.label, self.size, offset, length)


class FreshFile:
    """A file that another host writes, read as it is at its server now: while a VM is on its way here. It has no locks.

    Each read opens the file anew, which has an NFS client ask whether the file has changed, and goes past the kernel's
    pages (O_DIRECT) where the file system lets it. Elsewhere what the kernel has of the file is dropped first, nothing
    is read ahead, and one read waits for the other. That is slow, and is asked for little: a VM that comes reads a
    sector or two before it runs.
    """

    def __init__(self, address: FileAddress, threads: StoreThreads, timeout: float) -> None:
        """`timeout` in seconds, for each read."""
        self._address = address
        self._threads = threads
        self.timeout = timeout
        self._turn = trio.Lock()

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes; zeros beyond the end of the file. Raises OSError."""
        found = bytearray()
        while len(found) < length:
            at, count = offset + len(found), min(PIECE, length - len(found))
            async with self._turn:
                with bounded(self.timeout, f"reading {self._address.key}"):
                    found += await self._threads.run(partial(self._read, at, count))
        return found

    def _read(self, offset: int, length: int) -> bytes:
        """The same in a thread."""
        try:
            return self._read_by(os.O_DIRECT, offset, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return self._read_by(0, offset, length)

    def _read_by(self, direct: int, offset: int, length: int) -> bytes:
        """The same with O_DIRECT or without. Raises OSError: EINVAL where that cannot be done here."""
        fd = open_fresh(self._address, direct)
        try:
            if not direct:
                syscalls.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                SystemCalls().forget(fd)
            return _read_aligned(fd, offset, length)
        finally:
            syscalls.close(fd)


def _read_aligned(fd: int, offset: int, length: int) -> bytes:
    start = offset // ALIGNED * ALIGNED
    end = -(-(offset + length) // ALIGNED) * ALIGNED
    with mmap.mmap(-1, end - start) as memory, memoryview(memory) as view:
        done = 0
        while done < end - start:
            with view[done:] as rest:
                count = syscalls.preadv(fd, [rest], start + done)
            done += count
            if count == 0 or done % ALIGNED:  # the end of the file
                break
        return bytes(view[offset - start : offset - start + length])
