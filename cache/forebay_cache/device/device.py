"""The cache device: a block device or a regular file, its superblock, and the only code that reads and writes it.

Layout, in bytes (see ``cache/README.md``)::

    0            superblock, 4096
    4096         its copy, 4096
    1 MiB        intent journal (``journal_size``)
    data_offset  slots of one block each

The superblock is written by :func:`write_format`, and again when the device has grown: the copy first, so that a power
cut in the middle of one leaves the other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forebay_cache.errors import CacheError
from forebay_cache.format.geometry import BLOCK

Buffer = bytes | bytearray | memoryview

#: Called with (bytes done, bytes in all), from whatever thread the work is in.
Progress = Callable[[int, int], None]

MAGIC = b"FOREBAY\0"
FORMAT = 1
SUPERBLOCK = 4096
COPY_OFFSET = SUPERBLOCK
JOURNAL_OFFSET = 1 << 20
_SUPER = struct.Struct("<8sII16sQQQQ")
_BLKGETSIZE64 = 0x80081272
#: Looked at before formatting: partition tables, LVM labels, every file system's superblock lie here.
_PROBE = 1 << 20
#: Below this there is no room for a journal and a few slots.
SMALLEST = 4 << 20
#: Space for a file is reserved in pieces of this size, so that progress can be told.
_RESERVE = 1 << 30
#: udev holds a block device locked for a moment while it looks what is on it, as after each time it was written.
_LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class Superblock:
    """What a formatted device says of itself; sizes in bytes."""

    uuid: uuid.UUID
    block_size: int
    size: int
    journal_size: int
    data_offset: int
    slots: int

    def grown(self, size: int) -> Superblock:
        """The layout with ``size`` bytes: more slots, everything else where it was."""
        return replace(self, size=size, slots=(size - self.data_offset) // BLOCK)

    def pack(self) -> bytes:
        """The 4096 bytes that lie on the device; the last four are a CRC32 of the others."""
        body = _SUPER.pack(
            MAGIC,
            FORMAT,
            self.block_size,
            self.uuid.bytes,
            self.size,
            self.journal_size,
            self.data_offset,
            self.slots,
        )
        body = body.ljust(SUPERBLOCK - 4, b"\0")
        return body + zlib.crc32(body).to_bytes(4, "little")

    @classmethod
    def unpack(cls, raw: bytes, path: Path) -> Superblock:
        """Raises :class:`CacheError` on a damaged superblock or a format this version does not know."""
        if not _is_whole(raw):
            raise CacheError(
                f"{path}: the superblock is damaged; if nothing dirty can be on it, run "
                "'forebay cache format --force'"
            )
        _, version, block_size, ident, size, journal, data, slots = _SUPER.unpack_from(raw)
        if version != FORMAT:
            raise CacheError(
                f"{path}: cache format {version}, this version knows only {FORMAT}; "
                "drain it with the version that wrote it"
            )
        found = cls(uuid.UUID(bytes=ident), block_size, size, journal, data, slots)
        ends = (JOURNAL_OFFSET + journal, data + slots * BLOCK)
        if block_size != BLOCK or not journal or not slots or ends[0] > data or ends[1] > size:
            raise CacheError(
                f"{path}: the superblock makes no sense, whole as it is; if nothing dirty can be on it, run "
                "'forebay cache format --force'"
            )
        return found


def _is_whole(raw: bytes) -> bool:
    return zlib.crc32(raw[:-4]) == int.from_bytes(raw[-4:], "little")


def plan(size: int, ident: uuid.UUID) -> Superblock:
    """Lay out a device of ``size`` bytes. Raises :class:`CacheError` when it is too small."""
    if size < SMALLEST:
        raise CacheError(f"a cache of {size} bytes is too small: at least {SMALLEST >> 20} MiB")
    journal = min(max(size // 64, 256 << 10), 32 << 20) // BLOCK * BLOCK
    data = JOURNAL_OFFSET + journal
    return Superblock(ident, BLOCK, size, journal, data, (size - data) // BLOCK)


def size_of(fd: int) -> int:
    """Size in bytes of the open file or block device."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        raw = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
        return int.from_bytes(raw, "little")
    return info.st_size


def _read_all(fd: int, length: int, offset: int) -> bytes:
    parts = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def is_blank(fd: int, start: int = 0) -> bool:
    """True when a file holds only zeros from ``start`` on, or when neither end of a device holds anything else."""
    size = size_of(fd)
    ends = ((0, min(size, _PROBE)), (max(0, size - _PROBE), min(size, _PROBE)))
    ranges = _written(fd, size) if stat.S_ISREG(os.fstat(fd).st_mode) else ends
    return all(_is_zero(_read_all(fd, at + n - max(at, start), max(at, start))) for at, n in ranges)


def format_was_cut(fd: int, ident: uuid.UUID) -> bool:
    """Whether there is nothing on the device but a part of what :func:`write_format` would write for that uuid.

    A power cut came in between: what a medium writes whole is 512 bytes.
    """
    both = _read_all(fd, COPY_OFFSET + SUPERBLOCK, 0)
    expected = plan(size_of(fd), ident).pack() * 2
    pieces = [(both[at : at + 512], expected[at : at + 512]) for at in range(0, len(both), 512)]
    return all(found in (bytes(512), ours) for found, ours in pieces) and is_blank(fd, len(both))


def _is_zero(data: bytes) -> bool:
    return data == bytes(len(data))


def _written(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what a sparse file holds, in pieces."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: holes from here to the end
            return
        end = os.lseek(fd, at, os.SEEK_HOLE)
        for start in range(at, end, _PROBE):
            yield start, min(_PROBE, end - start)
        at = end


def read_superblock(fd: int, path: Path) -> Superblock | None:
    """The superblock, or None when the device does not begin with our magic.

    Where a power cut tore it, its copy. Raises :class:`CacheError` when both are damaged, or the format is unknown.
    """
    raw = _read_all(fd, SUPERBLOCK, 0)
    if len(raw) < SUPERBLOCK or not raw.startswith(MAGIC):
        return None
    if not _is_whole(raw):
        copy = _read_all(fd, SUPERBLOCK, COPY_OFFSET)
        if copy.startswith(MAGIC) and _is_whole(copy):
            raw = copy
    return Superblock.unpack(raw, path)


def write_superblock(fd: int, layout: Superblock) -> None:
    """Replace the superblock. At any instant one of the two copies on the device is whole. Raises OSError."""
    write_copy(fd, layout)
    os.pwrite(fd, layout.pack(), 0)
    os.fdatasync(fd)


def write_copy(fd: int, layout: Superblock) -> None:
    """The copy alone; also to see whether the device takes writes. Raises OSError."""
    os.pwrite(fd, layout.pack(), COPY_OFFSET)
    os.fdatasync(fd)


def erase(fd: int) -> None:
    """Nobody takes this device for a cache any more. Raises OSError."""
    os.pwrite(fd, bytes(COPY_OFFSET + SUPERBLOCK), 0)
    os.fdatasync(fd)


def open_device(path: Path, *, create_size: int | None = None) -> int:
    """Open and lock the device; create a sparse file of ``create_size`` bytes where there is none.

    Raises :class:`CacheError` when it is missing, in use, or not a file or block device.
    """
    if create_size is not None and not path.exists():
        _create_file(path, create_size)
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL  # refused while mounted or held by LVM, md, another of us
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise CacheError(
            f"{path}: no such cache device; create it or correct [cache] device"
        ) from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise CacheError(f"{path}: in use by another program; see 'lsblk {path}'") from None
        raise CacheError(f"{path}: {error.strerror}") from None
    try:
        _lock(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: Path) -> None:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise CacheError(f"{path}: a cache device is a block device or a regular file")
    # A block device is ours alone already (O_EXCL); the lock keeps udev from looking at what we are writing.
    deadline = time.monotonic() + (_LOCK_SECONDS if stat.S_ISBLK(mode) else 0)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise CacheError(
                f"{path}: another forebay uses this cache device; stop it, or give this one its own"
            ) from None
        return


def _create_file(path: Path, size: int) -> None:
    partial = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, path)
        sync_directory(path.parent)
    except OSError as error:
        raise CacheError(f"{path}: cannot create the cache file: {error.strerror}") from None


def sync_directory(path: Path) -> None:
    """Make renames and creations in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_format(fd: int, path: Path, ident: uuid.UUID) -> Superblock:
    """Write an empty journal, then the superblock; the caller has made sure that nothing is lost by it."""
    layout = plan(size_of(fd), ident)
    try:
        zeros = bytes(1 << 20)
        for start in range(0, layout.journal_size, len(zeros)):
            part = min(len(zeros), layout.journal_size - start)
            os.pwrite(fd, zeros[:part], JOURNAL_OFFSET + start)
        os.fsync(fd)
        os.pwrite(fd, layout.pack(), 0)
        os.fsync(fd)
        os.pwrite(fd, layout.pack(), COPY_OFFSET)
        os.fsync(fd)
    except OSError as error:
        raise CacheError(
            f"{path}: cannot format: {error.strerror}; free space there or choose another device"
        ) from None
    return layout


def reserve(fd: int, path: Path, size: int, progress: Progress) -> None:
    """Make a regular file ``size`` bytes long, its new part with space of its own, durably.

    Raises :class:`CacheError` when there is no room, and the file has the length it had; OSError from fsync.
    """
    old = os.fstat(fd).st_size
    room = os.fstatvfs(fd)
    # asked first: others are not to run out of space
    if size - old > room.f_bavail * room.f_frsize:
        raise CacheError(
            f"{path}: cannot be made {size} bytes: no space left: make room there, or say less"
        )
    try:
        for start in range(old, size, _RESERVE):
            progress(start - old, size - old)
            os.posix_fallocate(fd, start, min(_RESERVE, size - start))
    except OSError as error:
        os.ftruncate(fd, old)
        raise CacheError(
            f"{path}: cannot be made {size} bytes: {error.strerror}; make room there, or say less"
        ) from None
    os.fsync(fd)
    progress(size - old, size - old)


def grow(
    fd: int, path: Path, layout: Superblock, size: int | None, progress: Progress
) -> Superblock:
    """Let the cache on the device take all of it; a file is made ``size`` bytes long first. The new layout.

    Killed at any moment, the device holds the old layout or the new, and enough bytes for it. Raises
    :class:`CacheError` when it would not become larger, and OSError.
    """
    now = size_of(fd)
    if size is not None and size < max(now, layout.size):
        raise CacheError(
            f"{path}: is {max(now, layout.size)} bytes already, more than {size}: a cache only grows; "
            "for a smaller one remove it and create another"
        )
    larger = layout.grown(size or now)
    if larger.slots <= layout.slots:
        raise CacheError(
            f"{path}: the cache takes all of its {now} bytes already: say a larger size, or make the "
            "device larger first"
        )
    if stat.S_ISREG(os.fstat(fd).st_mode):
        reserve(fd, path, larger.size, progress)
    elif larger.size > now:
        raise CacheError(
            f"{path}: a device of {now} bytes cannot be made {size}: make the device larger first, "
            "then extend the cache without a size"
        )
    write_superblock(fd, larger)
    return larger


class Device:
    """An open, locked, formatted cache device. Offsets in bytes; slots counted from 0.

    ``map`` is a read-only mapping of the whole device: slices of it go straight to ``sendmsg``, nothing else
    touches it, so a page that cannot be read is an error code of a system call and not a signal.
    """

    def __init__(self, fd: int, path: Path, layout: Superblock) -> None:
        self.fd = fd
        self.path = path
        self.data_offset = layout.data_offset
        self.adopt(layout)

    def adopt(self, layout: Superblock) -> None:
        """Map the device anew: it has grown. Slices of the old map stay valid. Raises OSError, and nothing changed."""
        new = mmap.mmap(self.fd, layout.size, mmap.MAP_SHARED, mmap.PROT_READ)
        with contextlib.suppress(OSError):
            new.madvise(mmap.MADV_RANDOM)
        self.layout = layout
        self._mmap = new
        self.map = memoryview(new)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.layout.slots

    def at(self, slot: int, start: int = 0) -> int:
        """Where byte ``start`` of a slot lies on the device."""
        return self.data_offset + slot * BLOCK + start

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``. Raises OSError; what then lies there is unknown."""
        done = os.pwrite(self.fd, data, offset)
        while done < len(data):
            part = os.pwrite(self.fd, memoryview(data)[done:], offset + done)
            if part == 0:
                raise OSError(errno.EIO, "short write to the cache device")
            done += part

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes. Raises OSError."""
        found = os.pread(self.fd, length, offset)
        if len(found) < length:
            found = _read_all(self.fd, length, offset)
        if len(found) < length:
            raise OSError(errno.EIO, "short read from the cache device")
        return found

    def read_into(self, offset: int, buffers: Sequence[bytearray | memoryview]) -> None:
        """Fill the buffers from one contiguous range. Raises OSError."""
        want = sum(len(b) for b in buffers)
        done = os.preadv(self.fd, buffers, offset)
        if done == want:
            return
        whole = _read_all(self.fd, want, offset)
        if len(whole) != want:
            raise OSError(errno.EIO, "short read from the cache device")
        for buffer in buffers:
            buffer[:] = whole[: len(buffer)]
            whole = whole[len(buffer) :]

    def read_nothing_ahead(self) -> None:
        """From now on what comes into memory was asked for: anything else would be believed there, unseen.

        Not before the journal is replayed, which is read in order: that takes 25 ms for 32 MiB, and 230 without.
        """
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def sync(self) -> None:
        """Make everything written so far durable. Raises OSError: then nothing may be assumed durable."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Unlock and close; slices of the map that replies still hold stay valid."""
        fcntl.flock(
            self.fd, fcntl.LOCK_UN
        )  # the map keeps a duplicate of the descriptor, and so the lock
        with contextlib.suppress(BufferError):
            self.map.release()
            self._mmap.close()
        os.close(self.fd)
