# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where the torrent of an image lies: beside it, `IMAGE.forebay/torrent`, so that every host has the same one.

Everything here blocks, raises OSError, and belongs in a thread of the image's store.
"""

import contextlib
import errno

from forebay.origin.addresses import SIDECAR, FileAddress
from forebay.origin.protocol import Identity
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files
from forebay.sidecar.files import Sidecar
from forebay.sidecar.record import UnreadableError
from forebay.staging.torrent import LONGEST, BadTorrentError, Torrent, decoded, encoded

NAME = "torrent"
"""The file, in the directory beside the image."""


def find(address: FileAddress) -> Torrent | None:
    """The torrent that lies beside an image; None if there is none. Raises BadTorrentError for what is none."""
    try:
        with Sidecar(address) as sidecar:
            sidecar.open()
            fd = own_files.open_existing(sidecar.fd, NAME, sidecar.look_beside())
            try:
                data = syscalls.pread(fd, LONGEST + 1, 0)
            finally:
                syscalls.close(fd)
    except FileNotFoundError:
        return None
    except (own_files.DoesNotCountError, UnreadableError) as fault:
        raise BadTorrentError(str(fault)) from None
    return decoded(data)


def identity(address: FileAddress) -> Identity:
    """What the image looks like now."""
    with Sidecar(address) as sidecar:
        status = sidecar.look_beside()
    if status is None:
        raise FileNotFoundError(errno.ENOENT, f"{address.key} is gone")
    return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def keep(address: FileAddress, torrent: Torrent, gateway: str) -> None:
    """Put a torrent beside the image, durably, in the place of the one before. `gateway` is our cache's uuid.

    It has the name when it is whole: of two hosts that make one at the same time, that of one of them stays.
    """
    new = f"{NAME}.{gateway}"
    with Sidecar(address) as sidecar:
        try:
            sidecar.make()
            fd = own_files.make(sidecar.fd, new, 0o644)
            try:
                syscalls.pwrite_all(fd, encoded(torrent), 0)
                syscalls.fsync(fd)
            finally:
                syscalls.close(fd)
            own_files.rename(sidecar.fd, new, NAME)
        except BaseException:
            if sidecar.fd >= 0:
                with contextlib.suppress(OSError):
                    own_files.remove(sidecar.fd, new)
            sidecar.remove_if_empty()
            raise
        syscalls.fsync(sidecar.fd)


def place(address: FileAddress) -> str:
    """Where that is, as operators name it."""
    return f"{address.name}{SIDECAR}/{NAME}"
