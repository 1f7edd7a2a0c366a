# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A new image in a store: it is written under a name of our own, and gets its name when it is whole and durable.

No file is ever written over. What a kill leaves is one file under our own name for each image that was to be made; the
next start removes it, and so does the next attempt. Everything here blocks, raises OSError, and belongs in a thread.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Sequence

from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.origin.addresses import SIDECAR, FileAddress, is_nameable, resolve
from forebay.origin.calls import Buffer
from forebay.origin.opening import open_folder
from forebay.origin.threads import Descriptor
from forebay.origin.worker import syscalls

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


LONGEST_NAME = 255 - len(SIDECAR)
"""Bytes of a new image's name: the directory beside an image that is written has that name and `.forebay` behind it."""


def address_of_new(config: Config, text: str) -> FileAddress:
    """Where an image that is to be made is to lie. Raises ForebayError for what cannot be the name of one."""
    address = resolve(config, text)
    if not isinstance(address, FileAddress):
        raise ForebayError(f"'{text}' is not in a store: write STORE:relative/path of a new image")
    if address.key != address.name or not is_nameable(address.path):
        raise ForebayError(
            f"'{text}' means the disk in a file, and a file is to be made: leave out '?format='"
        )
    length = len(os.fsencode(os.path.basename(address.path)))
    if length > LONGEST_NAME:
        raise ForebayError(
            f"{address.key}: its name has {length} bytes: use at most {LONGEST_NAME}"
        )
    return address


def temporary_name(address: FileAddress, gateway: str, kind: str = "") -> str:
    """The name of the file that this gateway writes first. Attach refuses it, as all of our own files.

    `kind`, such as `.source`, tells several files for one image apart.
    """
    digest = hashlib.sha256(f"{gateway}\0{address.path}".encode()).hexdigest()[:32]
    return f".{digest}{kind}{SIDECAR}"


def open_folder_of(address: FileAddress) -> int:
    """A new descriptor of the directory that the image is to lie in. Raises ForebayError where that cannot be had."""
    try:
        return open_folder(address)
    except OSError as error:
        raise ForebayError(
            f"{address.key}: {os.path.dirname(address.path) or address.root}: {os.strerror(error.errno or 0)}: "
            "name a place in a folder that is there"
        ) from error


def check_free(address: FileAddress, folder: int) -> None:
    """Raises ForebayError where the name is taken, and OSError."""
    try:
        syscalls.stat(os.path.basename(address.path), dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    raise ForebayError(f"{address.key} is there already: choose another name")


def give_name(address: FileAddress, folder: int, temporary: str) -> None:
    """Give the file `temporary`, which is whole and durable, the image's name instead, durably.

    Raises ForebayError where the name was taken, and OSError.
    """
    name, folders = os.path.basename(address.path), {"src_dir_fd": folder, "dst_dir_fd": folder}
    try:
        syscalls.link(temporary, name, **folders)
    except FileExistsError:
        raise ForebayError(
            f"{address.key} is there by now, and not written over: choose another name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        check_free(address, folder)
        syscalls.rename(temporary, name, **folders)
    with contextlib.suppress(FileNotFoundError):
        syscalls.unlink(temporary, dir_fd=folder)
    syscalls.fsync(folder)


class NewImage:
    """One that is being written. `publish` or `drop` ends it."""

    def __init__(self, address: FileAddress, size: int, gateway: str) -> None:
        """Begin an image of `size` bytes, all zeros. Raises ForebayError where the name is taken, or cannot be used."""
        self._address = address
        self._temporary = temporary_name(address, gateway)
        folder = open_folder_of(address)
        self._folder = Descriptor(folder)
        try:
            check_free(address, folder)
            self._unlink(folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = syscalls.open(self._temporary, flags, 0o600, dir_fd=folder)
        except BaseException:
            self._folder.close()
            raise
        self._file = Descriptor(fd)
        try:
            syscalls.ftruncate(fd, size)
        except BaseException:
            self.drop()
            raise

    def write(self, parts: Sequence[tuple[int, Buffer]]) -> None:
        """Write some of it: (offset, data) each."""
        with self._file as fd:
            for offset, data in parts:
                syscalls.pwrite_all(fd, data, offset)

    def publish(self) -> None:
        """Give it its name, when it is durable; it is closed then. Raises ForebayError where the name was taken."""
        with self._file as fd, self._folder as folder:
            syscalls.fsync(fd)
            give_name(self._address, folder, self._temporary)
        self._close()

    def drop(self) -> None:
        """Remove what was written so far. Raises nothing. A call that still hangs is not disturbed by it."""
        with contextlib.suppress(OSError), self._folder as folder:
            self._unlink(folder)
        self._close()

    def _unlink(self, folder: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            syscalls.unlink(self._temporary, dir_fd=folder)

    def _close(self) -> None:
        for descriptor in (self._file, self._folder):
            with contextlib.suppress(OSError):
                descriptor.close()


def remove_left(address: FileAddress, gateway: str) -> None:
    """Remove what a kill left of an image that was to be made."""
    folder = open_folder(address)
    try:
        with contextlib.suppress(FileNotFoundError):
            syscalls.unlink(temporary_name(address, gateway), dir_fd=folder)
    finally:
        syscalls.close(folder)
