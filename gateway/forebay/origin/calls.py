# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The system calls that origins make, in one class, so that a test can stand a failing device in its place.

They are made as `worker/syscalls.py` says. Sources: fallocate(2), statx(2), openat2(2), linux/fs.h.
"""

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forebay.origin.worker import syscalls

Buffer = bytes | bytearray | memoryview

PUNCH_HOLE = 0x03
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE: the range reads as zeros and gives its space back."""

ZERO_RANGE = 0x11
"""FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE: the range reads as zeros and keeps its space."""

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, 524}
"""What a file system says that cannot do a mode of fallocate, or tell holes. 524 is the kernel's own ENOTSUPP, which
some NFS versions leak."""

MAYBE_DEAD = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ECONNABORTED}
"""What each call of a descriptor says that is of no use any more, where a fresh one works: its locks were lost, its
server forgot it (GPFS after an unmount), or its file system was mounted anew."""

IOV_MAX = 1024
"""Buffers that one preadv or pwritev takes (limits.h)."""

# struct statx up to stx_ctime (statx(2)): mask blksize attributes nlink uid gid mode ino size blocks attributes_mask,
# then atime btime ctime mtime, each seconds, nanoseconds, padding, then rdev and dev
_STATX = struct.Struct("=IIQIIIHxxQQQQ" + "qIxxxx" * 4 + "IIII")

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268

_BLOCK = 4096
"""Bytes that are zeroed, or not, together: what file systems give space in."""
_LOOK = 1 << 20
"""Bytes that are read at once."""
_zeros = bytes(_BLOCK)

_STAT_BLOCK = 512
"""Bytes in which stat(2) counts what a file takes, whatever its file system does."""


@dataclass(frozen=True)
class Status:
    """What statx(2) says of a file, as far as origins ask. Times in nanoseconds since the epoch, size in bytes."""

    mode: int
    links: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    owner: int = 0
    allocated: int = 0
    """Bytes that the file takes where it lies."""

    @classmethod
    def of(cls, found: os.stat_result) -> "Status":
        """The same from what os.stat returned."""
        return cls(
            mode=found.st_mode,
            links=found.st_nlink,
            inode=found.st_ino,
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            device=found.st_dev,
            owner=found.st_uid,
            allocated=found.st_blocks * _STAT_BLOCK,
        )


class SystemCalls:
    """The operating system. Every method raises OSError, and may block for as long as the storage does."""

    def preadv(self, fd: int, buffers: list[bytearray | memoryview], offset: int) -> int:
        """Read into the buffers. How many bytes were read; 0 at the end of the file."""
        return syscalls.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write the buffers one after the other. How many bytes were written, possibly fewer than given."""
        return syscalls.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        """Make durable what this descriptor wrote."""
        syscalls.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Make durable what this descriptor wrote, and the file's times."""
        syscalls.fsync(fd)

    def forget(self, fd: int, offset: int = 0, length: int = 0) -> None:
        """Have what the kernel keeps of the range in memory, and need not write, read again when it is asked for.

        A length of 0 means to the end of the file.
        """
        syscalls.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def seek_data(self, fd: int, offset: int) -> int:
        """The offset at which the next data at or after `offset` begins. ENXIO: there is none."""
        return syscalls.lseek(fd, offset, os.SEEK_DATA)

    def seek_hole(self, fd: int, offset: int) -> int:
        """The offset at which the next hole at or after `offset` begins; the end of the file counts as one."""
        return syscalls.lseek(fd, offset, os.SEEK_HOLE)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Make the range read as zeros; `mode`, PUNCH_HOLE or ZERO_RANGE, says what becomes of its space."""
        syscalls.fallocate(fd, mode, offset, length)

    def status(self, fd: int) -> Status:
        """The status of an open file as its server knows it now.

        AT_STATX_FORCE_SYNC because plain fstat on NFS answers from a cache that lags seconds behind.
        """
        try:
            return _unpack_statx(syscalls.statx(fd))
        except OSError as error:
            # an old kernel or a strict seccomp filter
            if error.errno in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
                return Status.of(syscalls.fstat(fd))
            raise

    def device_size(self, fd: int) -> int:
        """Bytes of a block device (BLKGETSIZE64)."""
        answer = syscalls.ioctl(fd, _BLKGETSIZE64, bytes(8))
        return int(struct.unpack("=Q", answer)[0])

    def sector_size(self, fd: int) -> int:
        """Bytes of a block device's logical sector (BLKSSZGET)."""
        answer = syscalls.ioctl(fd, _BLKSSZGET, bytes(4))
        return int(struct.unpack("=i", answer)[0])


def written_runs(calls: SystemCalls, fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """What does not read as zeros of the bytes from `offset` to `end`, in order: (first byte, byte behind the last).

    Holes that the file system tells are not read; many tell none (NFS before 4.2), so the rest is. It counts in blocks
    of 4 KiB. Raises OSError.
    """
    for first, behind in data_runs(calls, fd, offset, end):
        run = at = first
        while at < behind:
            data = syscalls.pread(fd, min(_LOOK - at % _BLOCK, behind - at), at)
            if not data:
                break  # it was truncated
            for part in _blocks(at, at + len(data)):
                if data[part.start - at : part.stop - at] == _zeros[: len(part)]:
                    if run < part.start:
                        yield run, part.start
                    run = part.stop
            at += len(data)
        if run < behind:
            yield run, behind


def _blocks(first: int, end: int) -> Iterator[range]:
    """The parts of a range of bytes that lie in one block each."""
    while first < end:
        behind = min(end, first - first % _BLOCK + _BLOCK)
        yield range(first, behind)
        first = behind


def data_runs(calls: SystemCalls, fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """What is no hole of the bytes from `offset` to `end`, as `written_runs`. Where none is told, all is."""
    while offset < end:
        try:
            first = calls.seek_data(fd, offset)
            behind = min(end, calls.seek_hole(fd, first)) if first < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # holes only
            if error.errno not in UNSUPPORTED:
                raise
            first, behind = offset, end
        if first >= end:
            return
        if behind <= first:
            behind = end  # it moved while we looked
        yield first, behind
        offset = behind


def _unpack_statx(raw: bytes) -> Status:
    fields = _STATX.unpack_from(raw)
    _mask, _blksize, _attributes, links, uid, _gid, mode, inode, size, blocks, _known = fields[:11]
    ctime, ctime_ns, mtime, mtime_ns, _rdev_major, _rdev_minor, major, minor = fields[15:23]
    return Status(
        mode=mode,
        links=links,
        inode=inode,
        size=size,
        mtime_ns=mtime * 10**9 + mtime_ns,
        ctime_ns=ctime * 10**9 + ctime_ns,
        device=os.makedev(major, minor),
        owner=uid,
        allocated=blocks * _STAT_BLOCK,
    )


def open_beneath(root: int, path: str, flags: int) -> int:
    """A new descriptor of `path` below the directory `root`, opened without following any link, symbolic or magic.

    Raises OSError: EXDEV when the path leaves `root`, ELOOP when a part of it is a symbolic link.
    """
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    try:
        return syscalls.openat2(root, path, flags | os.O_CLOEXEC, resolve)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM) and ".." not in path.split("/"):
            return _walk_beneath(root, path, flags)
        raise


def _walk_beneath(root: int, path: str, flags: int) -> int:
    """As `open_beneath`, where openat2 is missing or forbidden: part by part, with O_NOFOLLOW at each."""
    *folders, last = [part for part in path.split("/") if part not in ("", ".")] or ["."]
    here = root
    try:
        for folder in folders:
            below = syscalls.open(
                folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here
            )
            if here != root:
                syscalls.close(here)
            here = below
        return syscalls.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
    finally:
        if here != root:
            syscalls.close(here)
