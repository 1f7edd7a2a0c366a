# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The files beside an image, one by one: which of them count, and how new ones are made.

Whoever may write to the folder of an image can put anything there, also a link to somebody else's file. So a file
counts only if it is a regular one, has no other name, and belongs to somebody who may write the image anyway; and a new
one is never written through a name that is there already.

Everything here blocks, and raises OSError.
"""

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from typing import TypeVar

from forebay.errors import ForebayError
from forebay.origin.addresses import SIDECAR, FileAddress
from forebay.origin.worker import syscalls

T = TypeVar("T")

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

LOOKS = 5
"""How often a look is begun. A host that writes what is looked at does so a few times in a second, at most."""

LONGEST_NAME = 255
"""Bytes of a file's name (NAME_MAX of limits.h)."""


class DoesNotCountError(ValueError):
    """A file that is not to be believed, or not to be used. The text says why, as the end of a sentence."""


def looked(look: Callable[[], T]) -> T:
    """What `look` returns, which opens by names what it reads; begun anew where that was replaced meanwhile.

    A local file system goes on with the file of before. An NFS client is told ESTALE if another host has replaced it,
    also right after it was opened. Raises what `look` raises; ESTALE where it is not that.
    """
    for _ in range(LOOKS - 1):
        try:
            return look()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return look()


def open_existing(folder: int, name: str, image: os.stat_result | None) -> int:
    """A new descriptor of a file in the open directory, for reading, which the caller closes.

    `image` is what lies beside it; None if that is gone. Raises FileNotFoundError, DoesNotCountError and OSError.
    """
    try:
        fd = syscalls.open(name, _READ, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise DoesNotCountError("not a file") from None
        raise
    return _checked(fd, image)


def open_directory(folder: int, name: str, image: os.stat_result | None) -> int | None:
    """A new descriptor of a directory in the open one, which the caller closes. Raises OSError.

    None for what does not count, or is gone.
    """
    try:
        fd = syscalls.open(name, _DIRECTORY, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
            return None
        raise
    if may_write(syscalls.fstat(fd).st_uid, image):
        return fd
    syscalls.close(fd)
    return None


def make(folder: int, name: str, mode: int) -> int:
    """A new descriptor of a new, empty file, which takes the place of what has that name. Raises OSError."""
    remove(folder, name)
    return syscalls.open(name, _NEW, mode, dir_fd=folder)


def check_can_make(folder: int, name: str, address: FileAddress) -> None:
    """Raise ForebayError where the directory beside an image cannot have that name, or could not be made durable."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ForebayError(
            f"{address.key}: its name is too long: the directory beside it has that name and {SIDECAR} behind it: use "
            f"at most {LONGEST_NAME - len(SIDECAR)} bytes, or attach it with --read-only or --overlay"
        )
    try:
        syscalls.fsync(folder)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        raise ForebayError(
            f"{address.key}: the directory that it lies in cannot be read: let the daemon's user read it, or attach it "
            "with --read-only or --overlay"
        ) from None


def read(folder: int, name: str, image: os.stat_result | None, longest: int) -> bytes:
    """What a file in the open directory has, so many bytes at most. Raises what `open_existing` raises."""

    def look() -> bytes:
        fd = open_existing(folder, name, image)
        try:
            return syscalls.pread(fd, longest, 0)
        finally:
            syscalls.close(fd)

    return looked(look)


def keep(folder: int, name: str, new: str, data: bytes) -> None:
    """Have a file with this content, in the place of what has that name, when it is whole. Raises OSError.

    Until then it is called `new`, and is removed where it does not become whole. The directory is not synced.
    """
    fd = make(folder, new, 0o644)
    try:
        try:
            syscalls.pwrite_all(fd, data, 0)
            syscalls.fsync(fd)
        finally:
            syscalls.close(fd)
        rename(folder, new, name)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(folder, new)
        raise


def remove(folder: int, name: str) -> None:
    """Remove what has that name, if anything has. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), _no_directory(name):
        syscalls.unlink(name, dir_fd=folder)


def rename(folder: int, old: str, new: str) -> None:
    """Give a file a name, in the place of what has that. Raises OSError."""
    with _no_directory(new):
        syscalls.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


@contextlib.contextmanager
def _no_directory(name: str) -> Iterator[None]:
    """Have the error for a directory of that name say which it is, and what to do."""
    try:
        yield
    except IsADirectoryError as error:
        raise OSError(error.errno, f"'{name}' beside the image is a directory: remove it") from None


def _checked(fd: int, image: os.stat_result | None) -> int:
    try:
        _check(syscalls.fstat(fd), image)
    except BaseException:
        syscalls.close(fd)
        raise
    return fd


def _check(found: os.stat_result, image: os.stat_result | None) -> None:
    """Raise DoesNotCountError unless the file counts."""
    if not stat.S_ISREG(found.st_mode):
        raise DoesNotCountError("not a file")
    if found.st_nlink > 1:
        raise DoesNotCountError(f"a file with {found.st_nlink} names")
    if not may_write(found.st_uid, image):
        raise DoesNotCountError(
            f"a file of user {found.st_uid}, who is neither this user nor may write the image"
        )


def may_write(user: int, image: os.stat_result | None) -> bool:
    """True if that user is this process's, or may write the image, as far as owner, group and mode tell."""
    if user in (os.geteuid(), 0):
        return True
    if image is None:
        return False
    if user == image.st_uid or image.st_mode & stat.S_IWOTH:
        return True
    return bool(image.st_mode & stat.S_IWGRP) and image.st_gid in _groups(user)


def _groups(user: int) -> list[int]:
    """The groups of a user, as this host knows them."""
    try:
        known = pwd.getpwuid(user)
    except KeyError:
        return []
    return os.getgrouplist(known.pw_name, known.pw_gid)
