# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where the torrent of an image lies: beside it, `IMAGE.forebay/torrent`, so that every host has the same one.

Everything here blocks, raises OSError, and belongs in a thread of the image's store.
"""

from forebay.origin.addresses import SIDECAR, FileAddress
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
            data = own_files.read(sidecar.fd, NAME, sidecar.look_beside(), LONGEST + 1)
    except FileNotFoundError:
        return None
    except (own_files.DoesNotCountError, UnreadableError) as fault:
        raise BadTorrentError(str(fault)) from None
    return decoded(data)


def keep(address: FileAddress, torrent: Torrent, gateway: str) -> None:
    """Put a torrent beside the image, durably, in the place of the one before. `gateway` is our cache's uuid.

    It has the name when it is whole: of two hosts that make one at the same time, that of one of them stays.
    """
    with Sidecar(address) as sidecar:
        try:
            sidecar.make()
            own_files.keep(sidecar.fd, NAME, f"{NAME}.{gateway}", encoded(torrent))
        except BaseException:
            sidecar.remove_if_empty()
            raise
        syscalls.fsync(sidecar.fd)


def place(address: FileAddress) -> str:
    """Where that is, as operators name it."""
    return f"{address.name}{SIDECAR}/{NAME}"
