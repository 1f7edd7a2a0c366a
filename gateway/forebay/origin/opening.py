# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Opening the file or the block device of an image, with a refusal that says what to do for each that is unfit.

Everything here touches storage, blocks, and belongs in a thread. Paths in a store are opened below its directory
without following any link, so that whoever may create files there cannot point a disk at something else.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from forebay.errors import ForebayError
from forebay.formats.magic import RAW, START, detect
from forebay.origin.addresses import DeviceAddress, FileAddress
from forebay.origin.calls import Status, SystemCalls, open_beneath
from forebay.origin.worker import syscalls

_FRESH = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
_DEVICE = os.O_NONBLOCK | os.O_CLOEXEC

_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class NoSuchImageError(ForebayError):
    """The store is there, and nothing of that name in it."""


@dataclass(frozen=True)
class Backing:
    """A file that an open image lies on."""

    address: FileAddress
    fd: int
    """Open for reading, until the image is closed."""


@dataclass
class OpenImage:
    """An open file or block device, as `open_image` and `open_device` return it. Whoever has it closes `fd`."""

    fd: int
    size: int
    """Bytes."""
    read_only: bool
    look: Callable[[], Status]
    """Returns what the name of the image leads to now, which may be another file than the open one. Blocks, and raises
    OSError."""
    sector: int = 1
    """Bytes of the smallest unit that can be written: a device's logical sector, 1 for a file."""
    status: Status | None = None
    """What the file was when it was opened; None for a device."""
    format: str | None = None
    """The format that its first bytes are of; None for a device, and where nobody looked."""
    backing: list[Backing] = field(default_factory=list)
    """The files that the image lies on."""
    fresh: Callable[[], int] | None = None
    """Returns a new descriptor of what the name of the image leads to now, for reading, which the caller closes."""


def open_image(
    address: FileAddress,
    *,
    read_only: bool,
    admitted: bool = False,
    as_bytes: bool = False,
    was_raw: Callable[[int, int], bool] | None = None,
    calls: SystemCalls | None = None,
) -> OpenImage:
    """Open an image file. Raises ForebayError for what the operator has to change, OSError for failing storage.

    `admitted`: the image is in use already, and comes back after a restart or an outage. What would keep it from being
    attached does not keep it from going on: a second name, or the first bytes of another format. `as_bytes`: a file in
    another format is no reason to refuse it, since its bytes are meant. `was_raw` is asked
    about a file that begins like a qcow2 image or the like, with its descriptor and its size, and returns True if it
    was a raw disk before: a guest may write whatever it likes to the start of its disk.
    """
    calls = calls or SystemCalls()
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK | os.O_NOCTTY
    try:
        try:
            fd = _open_in_store(address, address.path, flags)
        except FileNotFoundError:  # it may have been made at the server just now
            ask_server(address, calls)
            fd = _open_in_store(address, address.path, flags)
    except OSError as error:
        raise _file_refusal(address, error, read_only) from error
    try:
        found = calls.status(fd)
        _check_kind(address, found, read_only or admitted)
        kind = None
        if not admitted:
            kind = _format_of(address, fd, lambda: was_raw is not None and was_raw(fd, found.size))
            if kind != RAW and not as_bytes:
                raise _other_format(address, kind)
    except BaseException:
        syscalls.close(fd)
        raise
    return OpenImage(
        fd,
        found.size,
        read_only,
        lambda: look(address, calls),
        status=found,
        format=kind,
        fresh=lambda: open_fresh(address),
    )


def open_fresh(address: FileAddress, flags: int = 0) -> int:
    """A new descriptor of what the name of the image leads to now, for reading, which the caller closes.

    `flags`: further ones of open(2). Raises OSError.
    """
    return _open_in_store(address, address.path, _FRESH | flags)


def open_folder(address: FileAddress) -> int:
    """A new descriptor of the directory that the image lies in, which the caller closes. Raises OSError.

    Where we may pass through the directory, and not list it (mode 0711), it is one that only leads to files (O_PATH).
    """
    folder = os.path.dirname(address.path) or "."
    try:
        return _open_in_store(address, folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return _open_in_store(address, folder, os.O_PATH | os.O_DIRECTORY)


def ask_server(address: FileAddress, calls: SystemCalls) -> None:
    """Have the server asked what the directories on the way to the image are now.

    Only then does an NFS client look names in them up anew, instead of believing for up to a minute what it knew.
    """
    parts = os.path.dirname(address.path).split("/")
    with contextlib.suppress(OSError):
        for depth in range(len(parts) + 1):
            path = "/".join(parts[:depth]) or "."
            fd = _open_in_store(address, path, os.O_PATH | os.O_DIRECTORY)
            try:
                calls.status(fd)
            finally:
                syscalls.close(fd)


def look(address: FileAddress, calls: SystemCalls) -> Status:
    """What the name of the image leads to now, at the server. Raises OSError."""
    ask_server(address, calls)
    fd = _open_in_store(address, address.path, os.O_PATH | os.O_NOFOLLOW)
    try:
        return calls.status(fd)
    finally:
        syscalls.close(fd)


def look_in_store(address: FileAddress, calls: SystemCalls) -> tuple[Status | None, Status]:
    """What the name of the image leads to now, None where it leads nowhere; and the directory of its store.

    Raises OSError.
    """
    root = syscalls.open(str(address.root), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        store = calls.status(root)
        return _named(root, address.path, calls), store
    finally:
        syscalls.close(root)


def _named(root: int, path: str, calls: SystemCalls) -> Status | None:
    """What a path below the directory `root` leads to; None where it leads nowhere. Raises OSError."""
    try:
        fd = open_beneath(root, path, os.O_PATH | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return calls.status(fd)
    finally:
        syscalls.close(fd)


def _open_in_store(address: FileAddress, path: str, flags: int) -> int:
    """A new descriptor of `path` in the store of the address. Raises OSError."""
    root = syscalls.open(str(address.root), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_beneath(root, path, flags)
    finally:
        syscalls.close(root)


def _check_kind(address: FileAddress, found: Status, any_names: bool) -> None:
    """Raise ForebayError unless the file is a regular one with a size and, unless it may have `any_names`, with one."""
    if stat.S_ISDIR(found.mode):
        raise ForebayError(f"{address.key} is a directory: name an image in it")
    if not stat.S_ISREG(found.mode):
        raise ForebayError(f"{address.key} is not a regular file: name a raw image")
    if found.size == 0:
        raise ForebayError(
            f"{address.key} is empty: give it a size with truncate, or copy an image to it"
        )
    if found.links > 1 and not any_names:
        raise ForebayError(
            f"{address.key} has {found.links} names (hard links), and writing would change it under all of them: "
            "copy it, or attach it with --overlay or --read-only"
        )


def _format_of(address: FileAddress, fd: int, was_raw: Callable[[], bool]) -> str:
    """The format of an image by its first bytes: raw where its name says so, or where it was before."""
    found = detect(syscalls.pread(fd, START, 0))
    return RAW if found == RAW or address.path.endswith(f".{RAW}") or was_raw() else found


def _other_format(address: FileAddress, name: str) -> ForebayError:
    return ForebayError(
        f"{address.key} is in {name} format, and a guest would see that format's tables: convert it with "
        "qemu-img convert -O raw, or say --format raw (or give it a name that ends in .raw) if that is meant"
    )


def _file_refusal(address: FileAddress, error: OSError, read_only: bool) -> Exception:
    """What to raise for an error of opening the file: a ForebayError where the operator can do something about it."""
    key = address.key
    if not _is_directory(str(address.root)):
        return ForebayError(
            f"{key}: {address.root} is not there: mount the store '{address.store}'"
        )
    if error.errno in _NO_SUCH_FILE:
        return NoSuchImageError(f"{key}: no such image in {address.root}: check the name")
    if error.errno in (errno.ELOOP, errno.EXDEV):
        return ForebayError(f"{key}: a symbolic link is on the way: name the file it leads to")
    if error.errno == errno.EISDIR:
        return ForebayError(f"{key} is a directory: name an image in it")
    if error.errno in (*_NOT_ALLOWED, errno.ETXTBSY):
        way = "read" if read_only else "read and write"
        return ForebayError(
            f"{key}: {os.strerror(error.errno)}: let the daemon's user {way} it, and enter its directory"
            + ("" if read_only else ", or attach it with --read-only or --overlay")
        )
    return error


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(syscalls.stat(path).st_mode)
    except OSError:
        return False


def open_device(
    address: DeviceAddress, *, read_only: bool, calls: SystemCalls | None = None
) -> OpenImage:
    """Open a block device; for writing only if nothing else on this host has it open (O_EXCL).

    Raises ForebayError for what the operator has to change, OSError for failing storage.
    """
    calls = calls or SystemCalls()
    path = address.path
    flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_EXCL
    try:
        fd = syscalls.open_device(path, flags | _DEVICE)
    except OSError as error:
        raise _device_refusal(path, error) from error
    try:
        if not stat.S_ISBLK(syscalls.fstat(fd).st_mode):
            raise ForebayError(f"{path} is not a block device: put a file into a store")
        size, sector = calls.device_size(fd), calls.sector_size(fd)
        if size == 0:
            raise ForebayError(f"{path} has no size: activate or connect it first")
        return OpenImage(
            fd,
            size,
            read_only,
            lambda: Status.of(syscalls.stat_device(path)),
            sector,
            fresh=lambda: syscalls.open_device(path, os.O_RDONLY | _DEVICE),
        )
    except BaseException:
        syscalls.close(fd)
        raise


def _device_refusal(path: str, error: OSError) -> Exception:
    """What to raise for an error of opening the device: a ForebayError where the operator can do something."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return ForebayError(f"{path}: no such device: check the name")
    if error.errno == errno.EBUSY:
        return ForebayError(f"{path} is mounted or in use on this host: unmount it first")
    if error.errno in _NOT_ALLOWED:
        return ForebayError(f"{path}: {error.strerror}: let the daemon's user open it")
    return error
