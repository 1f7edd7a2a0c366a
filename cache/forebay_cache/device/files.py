# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The file or block device below a cache: opening and locking it, and how large it is."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from forebay_cache.errors import CacheError

_BLKGETSIZE64 = 0x80081272
_LOCK_SECONDS = 5.0
"""For how long somebody may have the lock who has no use for it any more: udev, which looks what is on a block device
each time it was written; and a daemon that was killed, while the kernel, or a program that looks at processes, still
holds its memory: the device is mapped there, and its lock ends with the map."""
_LOCK_STEP = 0.05

_IN_MEMORY = {
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # xfs
    0x9123683E,  # btrfs
    0xF2F52010,  # f2fs
    0xCA451A4E,  # bcachefs
    0x2FC12FC1,  # zfs
    0x01021994,  # tmpfs
    0x858458F6,  # ramfs
    0x794C7630,  # overlayfs
}
"""File systems, by the number that statfs(2) gives, in which a write is a copy into the kernel's cache."""


def is_kept_in_memory(fd: int) -> bool:
    """True if a write usually ends when the kernel has it in memory: on a block device, and a local file system.

    Else it ends when somebody else has it, who may be slow, or hang: a server, or the program behind FUSE.
    """
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return True
    found = (ctypes.c_long * 64)()  # struct statfs, which begins with its type
    if ctypes.CDLL(None).fstatfs(fd, found) < 0:
        return False
    return ctypes.c_uint32(found[0]).value in _IN_MEMORY


def size_of(fd: int) -> int:
    """The size of an open file or block device, in bytes. Raises OSError."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        raw = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
        return int.from_bytes(raw, "little")
    return info.st_size


def open_device(path: Path, *, create_size: int | None = None) -> int:
    """Open and lock a device, and return its descriptor. Where there is none, make a file of ``create_size`` bytes.

    Raises CacheError when it is missing, in use, or neither a file nor a block device.
    """
    if create_size is not None and not path.exists():
        _create_file(path, create_size)
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL  # refused while mounted or held by LVM, md, another of us
        fd = _opened(path, flags)
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
    """Take the lock that keeps other daemons away. Raises CacheError."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise CacheError(f"{path}: a cache device is a block device or a regular file")
    # A block device is ours alone already (O_EXCL); the lock keeps udev from looking at what we are writing.
    if not lock(fd, fcntl.LOCK_EX):
        raise CacheError(
            f"{path}: another forebay uses this cache device; stop it, or give this one its own"
        )


def _opened(path: Path, flags: int) -> int:
    """A descriptor. Raises OSError: EBUSY if somebody has the device, and does not soon give it up."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return os.open(path, flags)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(_LOCK_STEP)


def lock(fd: int, kind: int) -> bool:
    """Take flock(2)'s lock of that kind; False if somebody has one that forbids it, and does not soon give it up."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_STEP)
        else:
            return True


def _create_file(path: Path, size: int) -> None:
    """Make a sparse file, durable when this returns. Raises CacheError."""
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
    """Make what was renamed and created in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
