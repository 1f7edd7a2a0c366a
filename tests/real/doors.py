# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The doors to a disk, as the tests of tests/real/test_doors.py use them: all behave alike.

To add a door, write a function like `socket_door` (a context manager that takes a running gateway and gives a Door) and
add it to DOORS; it skips, and says why, where a part is missing. Every test then runs through it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest

from real.fuse_mount import FuseMount, need_fuse
from real.gateway_process import GatewayProcess
from real.nbdkit_door import NbdkitDoor


class DoorHandle(Protocol):
    """One open of a disk. Offsets and lengths are bytes. Whatever goes wrong raises DoorError.

    A handle is used by one thread. `close` never raises.
    """

    @property
    def size(self) -> int:
        """Bytes of the disk."""

    def pread(self, length: int, offset: int) -> bytes:
        """Exactly so many bytes."""

    def pwrite(self, data: bytes, offset: int) -> None:
        """All of it; the daemon has it on return."""

    def flush(self) -> None:
        """What was written survives a power cut."""

    def zero(self, length: int, offset: int) -> None:
        """The range reads as zeros, by the best means the door has for it."""

    def close(self) -> None:
        """Not needed any more; does not flush."""


class Door(Protocol):
    """A way to the disks of one gateway."""

    def open(self, disk: str, *, read_only: bool = False) -> DoorHandle:
        """Open a disk by its name. `read_only`: the caller does not want to write."""


class DoorError(Exception):
    """A door's own exception for what failed."""


MakeDoor = Callable[[GatewayProcess], AbstractContextManager[Door]]


# ------------------------------------------------------------------------------------------------------ the NBD socket


class NbdHandle:
    """libnbd on any URI; the nbdkit door can use it too."""

    def __init__(self, uri: str) -> None:
        import nbd

        self._failure = nbd.Error
        self._nbd: Any = nbd.NBD()
        self._nbd.set_uri_allow_local_file(True)  # the nbdkit door's URIs name a file of keys
        with self._told():
            self._nbd.connect_uri(uri)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._failure as fault:
            raise DoorError(str(fault)) from fault

    @property
    def size(self) -> int:
        return int(self._nbd.get_size())

    def pread(self, length: int, offset: int) -> bytes:
        with self._told():
            return bytes(self._nbd.pread(length, offset))

    def pwrite(self, data: bytes, offset: int) -> None:
        with self._told():
            self._nbd.pwrite(data, offset)

    def flush(self) -> None:
        with self._told():
            self._nbd.flush()

    def zero(self, length: int, offset: int) -> None:
        with self._told():
            self._nbd.zero(length, offset)

    def close(self) -> None:
        with contextlib.suppress(self._failure):
            self._nbd.shutdown()


class SocketDoor:
    """The disk's own NBD socket."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway

    def open(self, disk: str, *, read_only: bool = False) -> DoorHandle:
        return NbdHandle(self._gateway.uri(disk))


@contextlib.contextmanager
def socket_door(gateway: GatewayProcess) -> Iterator[Door]:
    pytest.importorskip(
        "libnbdmod", reason="python3-libnbd is not installed: `make setup` installs it"
    )
    yield SocketDoor(gateway)


# -------------------------------------------------------------------------------------------------------- the FUSE file


class FileHandle:
    """A file, through the kernel's page cache."""

    def __init__(self, path: Path, read_only: bool) -> None:
        with _told():
            self._fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def pread(self, length: int, offset: int) -> bytes:
        with _told():
            data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise DoorError(f"{len(data)} bytes of {length} at {offset}")
        return data

    def pwrite(self, data: bytes, offset: int) -> None:
        with _told():
            done = os.pwrite(self._fd, data, offset)
        if done != len(data):
            raise DoorError(f"{done} bytes written of {len(data)} at {offset}")

    def flush(self) -> None:
        with _told():
            os.fdatasync(self._fd)

    def zero(self, length: int, offset: int) -> None:
        self.pwrite(bytes(length), offset)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise DoorError(str(fault)) from fault


class FuseDoor:
    """The disk's file in a mount."""

    def __init__(self, mount: FuseMount) -> None:
        self._mount = mount

    def open(self, disk: str, *, read_only: bool = False) -> DoorHandle:
        return FileHandle(self._mount.disk(disk), read_only)


@contextlib.contextmanager
def fuse_door(gateway: GatewayProcess) -> Iterator[Door]:
    need_fuse()
    mount = FuseMount(gateway)
    try:
        yield FuseDoor(mount)
    finally:
        mount.remove()


# ------------------------------------------------------------------------------------------------------ the nbdkit door


class TlsDoor:
    """The disk's export in nbdkit, over TCP and TLS."""

    def __init__(self, nbdkit: NbdkitDoor) -> None:
        self._nbdkit = nbdkit

    def open(self, disk: str, *, read_only: bool = False) -> DoorHandle:
        return NbdHandle(self._nbdkit.uri(disk))


@contextlib.contextmanager
def nbdkit_door(gateway: GatewayProcess) -> Iterator[Door]:
    nbdkit = NbdkitDoor(gateway)
    try:
        yield TlsDoor(nbdkit)
    finally:
        nbdkit.remove()


DOORS: dict[str, MakeDoor] = {"socket": socket_door, "fuse": fuse_door, "nbdkit": nbdkit_door}
