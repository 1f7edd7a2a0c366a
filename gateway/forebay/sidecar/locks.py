# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""QEMU's locks on an image: a VM or a tool that has the image open by itself, and we, know of each other.

QEMU says by read locks on single bytes of an image what it does with it and what it bars others from (its
block/file-posix.c): byte 100 + n, "I do n"; byte 200 + n, "nobody else may do n". n is 0 for reading what stays
consistent, 1 for writing, 3 for changing the size. Whoever comes takes its own locks first, then looks for those that
speak against it, so that of two who come at once at least one sees the other. The bytes need not be there.

They are OFD locks (fcntl(2)) of the very descriptor that does the I/O of the image: an NFS client whose locks were lost
fails what is done through that descriptor, and would let another one write over the new owner's data.

Everything blocks, and raises OSError.
"""

import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from forebay.origin import mounts
from forebay.origin.worker import syscalls

_DOES, _BARS = 100, 200
_GATEWAY = 400
"""The byte that the gateway which writes the image has a write lock on. QEMU uses none beyond 263."""
_READ, _WRITE, _RESIZE = 0, 1, 3

# struct flock of fcntl(2): type, whence, start, length, pid (0 for OFD locks)
_FLOCK = struct.Struct("hhqqi")
_NONE_THERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class Access:
    """What is done with an image, and what nobody else may do meanwhile: the `n` of the head of this module."""

    does: tuple[int, ...]
    bars: tuple[int, ...]


WRITES = Access((_READ, _WRITE), (_WRITE, _RESIZE))
"""The access of a VM's disk: others may look at it with tools that take what comes (qemu-img, qemu-io -r), no more."""

READS = Access((_READ,), (_WRITE, _RESIZE))
"""The access of a VM's read-only disk, or an overlay's backing file: any number of these share the image."""

LOOKS = Access((_READ,), ())
"""The access of whoever reads an image while somebody else writes it."""


class NoLocks(OSError):
    """The file system has no locks that another host, or another program, would see."""


class InUse(Exception):
    """Somebody's locks speak against ours.

    `written`: True if that one writes the image. `by`: the programs that have it open on this host, as far as we see.
    `is_gateway`: True if it is a gateway.
    """

    def __init__(self, *, written: bool, by: list[str], is_gateway: bool = False) -> None:
        super().__init__()
        self.written = written
        self.by = by
        self.is_gateway = is_gateway


def take_locks(fd: int, access: Access, *, gateway: bool = False) -> None:
    """Take the locks of that access, which last until the descriptor is closed. It may have some of them already.

    With `gateway`, which needs a descriptor for writing, that of the one gateway that writes the image comes first.
    Raises InUse, with no lock taken, where somebody's locks speak against it; NoLocks; OSError.
    """
    if mounts.has_local_locks(mounts.of_this_process(), syscalls.fstat(fd).st_dev):
        raise NoLocks(errno.ENOLCK, "mounted so that locks stay on this host")
    if gateway:
        _take_gateways(fd)
    try:
        _take(fd, access)
    except BaseException:
        if gateway:
            set_lock(fd, fcntl.F_UNLCK, _GATEWAY, 1)
        raise


def _take_gateways(fd: int) -> None:
    try:
        set_lock(fd, fcntl.F_WRLCK, _GATEWAY, 1)
    except BlockingIOError:
        raise InUse(written=True, by=_who(fd), is_gateway=True) from None


def _take(fd: int, access: Access) -> None:
    try:
        for byte in _bytes(access):
            set_lock(fd, fcntl.F_RDLCK, byte, 1)
        against = [_BARS + n for n in access.does] + [_DOES + n for n in access.bars]
        if not any(_locked(fd, byte) for byte in against):
            return
    except BlockingIOError:
        pass  # a lock on the whole file, which is not QEMU's way
    for byte in _bytes(access):
        set_lock(fd, fcntl.F_UNLCK, byte, 1)
    raise InUse(written=_locked(fd, _DOES + _WRITE), by=_who(fd))


def _bytes(access: Access) -> list[int]:
    """The bytes of the image that are locked for it."""
    return [_DOES + n for n in access.does] + [_BARS + n for n in access.bars]


def set_lock(fd: int, kind: int, start: int = 0, length: int = 0) -> None:
    """Take or drop an OFD lock of a kind of fcntl(2) on a range of bytes, whose length 0 means to the end.

    Raises BlockingIOError when another descriptor has it, NoLocks where the file system has none, OSError.
    """
    try:
        syscalls.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno == errno.EACCES:
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno in _NONE_THERE:
            raise NoLocks(error.errno, error.strerror) from None
        raise


def _locked(fd: int, byte: int) -> bool:
    """True if another descriptor has a lock on the byte. The kernel does not say whose: OFD locks have no pid."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    found = syscalls.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


# ------------------------------------------------------------------------------------------------------- who it may be


_PROGRAMS = ("qemu", "kvm", "libvirt")
_SERVER = "qemu-storage-da"
"""What the kernel keeps of the name of QEMU's storage daemon."""


def _who(fd: int) -> list[str]:
    """The QEMUs of this host that have the file open, as far as this user may see that: "qemu-io (pid 17)"."""
    found = []
    for name, pid in syscalls.holders(fd, _PROGRAMS):
        what = f"{name} (pid {pid})" if pid else "a call of this daemon that still hangs"
        if name.startswith(_SERVER):
            what = f"a disk on an image that it is of, or that lies on it ({_SERVER}, pid {pid})"
        found.append(what)
    return sorted(found)
