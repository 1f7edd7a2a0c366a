# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The files of an image: itself, and those that it lies on, each opened by us, in the stores, and looked at.

No other program ever follows a name that stands in a file: QEMU is handed open files, and told what each of them is. So
what is written into a file later changes nothing about which files are read.

Everything here blocks, and raises OSError.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.origin.addresses import Address, FileAddress, path_in_store
from forebay.origin.calls import Status
from forebay.origin.opening import OpenImage, open_image
from forebay.origin.virtual import qcow2, vdi, vhdx, vmdk
from forebay.origin.virtual.header import File, Header
from forebay.origin.worker import syscalls

MOST_FILES = 16
"""In a chain. Each takes some memory of the server, and a hop of every read."""

READERS: dict[str, Callable[[File], Header]] = {
    qcow2.NAME: qcow2.read,
    vmdk.NAME: vmdk.read,
    vdi.NAME: vdi.read,
    vhdx.NAME: vhdx.read,
}
"""By format."""

FORMATS = (RAW, *READERS)
"""That an image may be served as."""

_PROTOCOL = re.compile(r"[^/]*:")

Locate = Callable[[str], Address]
"""The address of an absolute path. Raises ForebayError for one in no store."""


@dataclass(frozen=True)
class Link:
    """One file of a chain."""

    address: FileAddress
    file: OpenImage
    header: Header


def look_at(key: str, fd: int, length: int, image_format: str) -> Header:
    """What the open file of that format says of itself. Raises ForebayError, OSError."""
    return READERS[image_format](File(key, fd, length))


def open_chain(
    address: FileAddress, *, read_only: bool, admitted: bool, locate: Locate
) -> list[Link]:
    """The image and all that it lies on, in that order; the caller closes the files. Raises ForebayError, OSError.

    All but the first are open for reading only. `address` has the format of the image; `admitted` is as for
    `open_image`.
    """
    chain: list[Link] = []
    wanted: FileAddress | None = address
    try:
        while wanted is not None:
            if len(chain) == MOST_FILES:
                raise ForebayError(
                    f"{address.name} lies on more than {MOST_FILES - 1} files: make the chain shorter with "
                    "qemu-img rebase or convert"
                )
            below = bool(chain)
            chain.append(_open(wanted, read_only=read_only or below, admitted=admitted or below))
            _check_new(chain)
            wanted = _below(chain[-1], locate)
        return chain
    except BaseException:
        close_all(chain)
        raise


def close_all(chain: list[Link]) -> None:
    """Close the files of a chain."""
    for link in chain:
        syscalls.close(link.file.fd)


def _open(address: FileAddress, *, read_only: bool, admitted: bool) -> Link:
    file = open_image(address, read_only=read_only, admitted=admitted, as_bytes=True)
    try:
        if address.format == RAW:
            header = Header(RAW, file.size)
        else:
            header = look_at(address.name, file.fd, file.size, address.format)
        if header.not_writable is not None and not read_only:
            raise ForebayError(
                f"{address.name} {header.not_writable}, or attach it with --overlay or --read-only"
            )
    except BaseException:
        syscalls.close(file.fd)
        raise
    return Link(address, file, header)


def _check_new(chain: list[Link]) -> None:
    """Raise ForebayError where the last file of the chain is in it before."""
    seen = [_identity_of(link.file.status) for link in chain]
    if seen[-1] in seen[:-1]:
        raise ForebayError(
            f"{chain[0].address.name} lies on itself, by way of {chain[-1].address.name}: see qemu-img rebase -u"
        )


def _identity_of(status: Status | None) -> tuple[int, int]:
    assert status is not None, "a file has one"
    return status.device, status.inode


def _below(link: Link, locate: Locate) -> FileAddress | None:
    """Where the file lies that this one lies on; None if it lies on none. Raises ForebayError."""
    name = link.header.backing
    if name is None:
        return None
    address = _named(link.address, name, locate)
    return replace(address, format=_format_of_backing(link, address))


def _named(by: FileAddress, name: str, locate: Locate) -> FileAddress:
    """The address of what a file calls its backing file: a path in a store. Raises ForebayError for all else."""
    if _PROTOCOL.match(name):
        raise ForebayError(
            f"{by.name} lies on '{name[:80]}', which is no file in a store: convert it with qemu-img convert"
        )
    try:
        if not name.startswith("/"):
            path = os.path.normpath(os.path.join(os.path.dirname(by.path), name))
            return FileAddress(by.store, by.root, path_in_store(name, path))
        found = locate(name)
    except ForebayError:
        found = None
    if not isinstance(found, FileAddress):
        raise ForebayError(
            f"{by.name} lies on '{name[:200]}', which is in no store: put that into one, and name it with "
            "qemu-img rebase -u"
        )
    return found


def _format_of_backing(link: Link, address: FileAddress) -> str:
    """The format of a backing file: what names it says, never what its first bytes look like. Raises ForebayError."""
    told = link.header.backing_format
    if told is None and address.path.endswith(f".{RAW}"):
        return RAW
    if told is None:
        raise ForebayError(
            f"{link.address.name} does not say of which format {address.name} is: say it with qemu-img rebase -u -F"
        )
    if told not in FORMATS:
        raise ForebayError(
            f"{link.address.name} lies on a file in format '{told[:40]}', which is not served: convert it with "
            "qemu-img convert"
        )
    return told
