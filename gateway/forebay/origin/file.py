"""Origins: where images live. A file in a store, or a block device; NBD origins are in nbd_origin.

All offsets and lengths are bytes. One open descriptor does all the I/O of an image, so that a lock held on it fences
every write (an unlocked second descriptor would write past a lost NFS lease). It is buffered; O_DIRECT takes aligned
buffers in `FileOrigin._read` and aligned pieces in `pieces`, and nothing else here.

When a call is given up (`origin_timeout`, or its task was cancelled) its thread may still change the image later. So a
range with such a change under way is neither read nor written by anyone else before that thread has ended: an old
write can never land on top of a newer one, nor a read see first the one and then the other.
"""

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from forebay.origin.addresses import ImageFile
from forebay.origin.calls import IOV_MAX, PUNCH_HOLE, ZERO_RANGE, Buffer, Calls, Status
from forebay.origin.order import Changes, Syncs
from forebay.origin.threads import Descriptor, StoreThreads, bounded

HOLE, ZERO = 1, 2
"""Flags of an extent, as NBD's base:allocation has them (NBD_STATE_HOLE, NBD_STATE_ZERO)."""

WRITE_PIECE = 4 << 20
"""Bytes of one write call: a copy of it is made on the event loop, which takes under a millisecond."""

ZERO_PIECE = 1 << 20
"""Bytes of one call where zeros have to be written: each piece has the whole time-out for itself."""

MOST_EXTENTS = 4096
"""Extents that one call reports. The rest of a badly fragmented image counts as data, which is always true enough."""

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, 524}
"""What fallocate says where it cannot do a mode. 524 is the kernel's own ENOTSUPP, which some NFS versions leak."""

_zeros = bytes(ZERO_PIECE)


@dataclass(frozen=True)
class Identity:
    """What an image looked like; another value means that somebody else changed it. Times in nanoseconds.

    An NBD image and a block device have nothing but a size: all else is 0.
    """

    size: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0


class Origin(Protocol):
    """An image where it lives. Every method raises OSError; ETIMEDOUT when the origin did not answer in time.

    `label` is the image as the operator wrote it. `background` calls yield to the others of the same store.
    """

    size: int
    read_only: bool
    label: str

    @property
    def sync_failures(self) -> int:
        """How often the outcome of a flush became unknown so far: each time, write again what was not flushed."""
        ...

    async def read(self, offset: int, length: int, background: bool = False) -> Buffer:
        """Exactly `length` bytes."""
        ...

    async def write(self, offset: int, data: Sequence[Buffer], background: bool = False) -> None:
        """Write the buffers one after the other. After an error the range holds old, new or a mix."""
        ...

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        """Write several (offset, data), a few megabytes together. The data must not change any more.

        After an error each range holds old, new or a mix.
        """
        ...

    async def flush(self, *, times: bool = False) -> None:
        """Make durable every write that returned before, with the `times` of `identity` if asked.

        After an error, write all since the last good one again.
        """
        ...

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make a range read as zeros; it keeps its space unless `may_trim`."""
        ...

    async def trim(self, offset: int, length: int) -> None:
        """Give space back. The range reads as zeros afterwards, always."""
        ...

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) one after the other, covering the range."""
        ...

    async def identity(self) -> Identity:
        """What the image looks like now. ESTALE: it was deleted, or its name is another file now."""
        ...

    async def forget(self) -> None:
        """Somebody else changed the image: from now on read what is there now, and nothing that was kept here."""
        ...

    async def settle(self) -> None:
        """Wait until no call that was given up can change the image any more. ETIMEDOUT: one still can."""
        ...

    async def close(self) -> None:
        """Let go of the image. Implies no flush."""
        ...


class FileOrigin:
    """A raw image in a regular file.

    An error of `flush` means that what was written since the last good one is unknown: the kernel reports a failed
    write-out once and then forgets the data, so that a later flush succeeds and says nothing about it. Whoever holds
    the data writes it again, then flushes again. `sync_failures` counts these errors; see origin_order.Syncs.
    """

    def __init__(
        self,
        image: ImageFile,
        label: str,
        *,
        threads: StoreThreads,
        timeout: float,
        calls: Calls | None = None,
    ) -> None:
        """Take over `image` and its descriptor. `timeout`: seconds that any call may take."""
        self.size = image.size
        self.read_only = image.read_only
        self.label = label
        self.timeout = timeout
        self._image = image
        self._descriptor = Descriptor(image.fd)
        self._threads = threads
        self._calls = calls or Calls()
        self._changes = Changes(threads)
        self._syncs = Syncs(threads, self._sync, label)
        self._with_times = False  # what the next sync makes durable
        self._refused: set[int] = set()  # modes of fallocate that this file cannot do

    @property
    def descriptor(self) -> Descriptor:
        """The one that does all I/O, for a thread that does something else with the image (locks it, say)."""
        return self._descriptor

    # ------------------------------------------------------------------------------------------------------- reading

    async def read(self, offset: int, length: int, background: bool = False) -> Buffer:
        """Exactly `length` bytes in a fresh buffer. What lies beyond the end of the image is zeros.

        Raises OSError: EIO when the file ends before `size`, ETIMEDOUT, or what the file system says.
        """
        self._check(offset, min(length, max(0, self.size - offset)))
        with bounded(self.timeout, f"reading {self.label}"):
            await self._changes.settled(offset, offset + length)
            return await self._threads.run(
                lambda: self._read(offset, length), background=background
            )

    def _read(self, offset: int, length: int) -> bytearray:
        found = bytearray(length)
        view = memoryview(found)
        wanted = min(length, self.size - offset)
        done = 0
        with self._descriptor as fd:
            while done < wanted:
                count = self._calls.preadv(fd, [view[done:wanted]], offset + done)
                if count == 0:
                    raise self._truncated(offset + done)
                done += count
        return found

    def _truncated(self, at: int) -> OSError:
        text = f"{self.label} ends at byte {at} but had {self.size}: it was truncated"
        return OSError(errno.EIO, text)

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, HOLE | ZERO or 0) one after the other, covering the range. Raises OSError."""
        self._check(offset, length)
        with bounded(self.timeout, f"asking for the holes of {self.label}"):
            await self._changes.settled(offset, offset + length)
            return await self._threads.run(lambda: self._extents(offset, length))

    def _extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        with self._descriptor as fd:
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

    def _next_data(self, fd: int, at: int) -> int:
        try:
            return self._calls.seek_data(fd, at)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size
            raise

    async def identity(self) -> Identity:
        """Size, times and inode as the server has them now.

        Raises OSError: ESTALE when the file was deleted or replaced, ETIMEDOUT.
        """
        with bounded(self.timeout, f"looking at {self.label}"):
            return await self._threads.run(self._identity)

    def _identity(self) -> Identity:
        with self._descriptor as fd:
            ours = self._calls.status(fd)
        if ours.links == 0:
            raise OSError(errno.ESTALE, f"{self.label} was deleted or replaced while in use")
        self._check_name(ours)
        return Identity(ours.size, ours.mtime_ns, ours.ctime_ns, ours.inode)

    async def forget(self) -> None:
        """Somebody else changed the image: what this host's kernel kept of it in memory is not to be read any more."""

        def forget() -> None:
            with self._descriptor as fd:
                self._calls.forget(fd)

        with bounded(self.timeout, f"reading {self.label} anew"):
            await self._threads.run(forget)

    def _check_name(self, ours: Status) -> None:
        try:
            named = self._image.look()
        except FileNotFoundError:
            raise OSError(errno.ESTALE, f"{self.label} was renamed while in use") from None
        if (named.device, named.inode) != (ours.device, ours.inode):
            raise OSError(errno.ESTALE, f"{self.label} was replaced by another file while in use")

    # ------------------------------------------------------------------------------------------------------- writing

    async def write(self, offset: int, data: Sequence[Buffer], background: bool = False) -> None:
        """Write the buffers one after the other from `offset`; never past the end. Not durable before `flush`.

        Buffers that can change are copied first: a thread that was given up must not see what comes later.
        Raises OSError; the range then holds old, new or a mix.
        """
        self._check_change(offset, sum(len(memoryview(buffer)) for buffer in data))
        at = offset
        for piece, length in pieces(data):
            write = partial(self._write, at, piece)
            await self._change(f"writing {self.label}", write, at, length, background)
            at += length

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        """Write several (offset, data) in one call of a thread. The data must not change any more. Raises OSError."""
        for offset, data in ranges:
            self._check_change(offset, len(data))

        def write() -> None:
            for offset, data in ranges:
                self._write(offset, [data])

        start, end = min(o for o, _ in ranges), max(o + len(data) for o, data in ranges)
        await self._change(f"writing {self.label}", write, start, end, background)

    def _write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        views = [memoryview(buffer) for buffer in buffers]
        with self._descriptor as fd:
            while views:
                count = self._calls.pwritev(fd, views, offset)
                if count == 0:
                    raise OSError(errno.EIO, f"{self.label}: nothing could be written at {offset}")
                offset += count
                views = _after(views, count)

    async def trim(self, offset: int, length: int) -> None:
        """Give space back where the file system can; zeros either way. Raises OSError."""
        await self.zero(offset, length, may_trim=True)

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make the range read as zeros, by punching a hole, zeroing it in place, or writing. Raises OSError."""
        self._check_change(offset, length)
        if length == 0:
            return
        for mode in (PUNCH_HOLE, ZERO_RANGE) if may_trim else (ZERO_RANGE,):
            if mode not in self._refused and await self._allocate(mode, offset, length):
                return
        await self._write_zeros(offset, length)

    async def _allocate(self, mode: int, offset: int, length: int) -> bool:
        def allocate() -> None:
            with self._descriptor as fd:
                self._calls.fallocate(fd, mode, offset, length)

        try:
            await self._change(f"zeroing {self.label}", allocate, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
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
        with bounded(self.timeout, what):
            await self._changes.make(do, offset, offset + length, background)

    # ---------------------------------------------------------------------------------------------- durability, end

    @property
    def sync_failures(self) -> int:
        """How often the outcome of a flush became unknown so far."""
        return self._syncs.failures

    async def flush(self, *, times: bool = False) -> None:
        """Make durable every write that returned before. Raises OSError: write all of it again, then flush again.

        Without `times` the file's times may be older ones after a power cut.
        """
        self._with_times = self._with_times or times
        await self._syncs.flush(self.timeout)

    def _sync(self) -> None:
        times, self._with_times = self._with_times, False
        with self._descriptor as fd:
            try:
                (self._calls.fsync if times else self._calls.fdatasync)(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    self._calls.forget(fd)  # what reads back from now on is what the medium has
                raise

    async def settle(self) -> None:
        """Wait until no call that was given up can change the image any more. ETIMEDOUT: one still can."""
        with bounded(self.timeout, f"waiting for a hung write to {self.label}"):
            await self._changes.settled(0, self.size)

    async def close(self) -> None:
        """Close the descriptor, in the thread that uses it last if one hangs. Implies no flush."""
        with bounded(self.timeout, f"closing {self.label}"):
            await self._threads.run(self._descriptor.close)

    # -------------------------------------------------------------------------------------------------------- checks

    def _check(self, offset: int, length: int) -> None:
        check_range(self.label, self.size, offset, length)

    def _check_change(self, offset: int, length: int) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.label} is open for reading only")
        self._check(offset, length)


class BlockOrigin(FileOrigin):
    """A raw image on a block device, with 512 or 4096 byte sectors.

    Reads and writes may begin anywhere: the page cache does the sectors. Its identity is its size alone, for nothing
    else about a device says that somebody wrote to it.
    """

    def _identity(self) -> Identity:
        with self._descriptor as fd:
            return Identity(self._calls.device_size(fd))

    def _extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(length, 0)] if length and offset >= 0 else []

    async def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """Whole sectors only: fallocate refuses others. The ends are written."""
        sector = self._image.sector
        first = -(-offset // sector) * sector
        last = (offset + length) // sector * sector
        if first >= last or not await super()._allocate(mode, first, last - first):
            return False
        await self._write_zeros(offset, first - offset)
        await self._write_zeros(last, offset + length - last)
        return True


def check_range(label: str, size: int, offset: int, length: int) -> None:
    """Raise OSError(EINVAL) unless the range lies in an image of `size` bytes."""
    if offset < 0 or length < 0 or offset + length > size:
        raise OSError(errno.EINVAL, f"{label} has {size} bytes: none at {offset} + {length}")


def pieces(data: Sequence[Buffer]) -> Iterator[tuple[list[Buffer], int]]:
    """The data again, in lists of at most WRITE_PIECE bytes and IOV_MAX buffers, each with its length.

    What could change later is copied, just before its list is asked for.
    """
    piece: list[Buffer] = []
    room = WRITE_PIECE
    for buffer in data:
        view = memoryview(buffer).cast("B")
        fixed = isinstance(view.obj, bytes)
        while len(view):
            part, view = view[:room], view[room:]
            piece.append(part if fixed else bytes(part))
            room -= len(part)
            if room == 0 or len(piece) == IOV_MAX:
                yield piece, WRITE_PIECE - room
                piece, room = [], WRITE_PIECE
    if piece:
        yield piece, WRITE_PIECE - room


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` without their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []
