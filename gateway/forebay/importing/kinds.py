# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a source is: a disk's format, and what it is packed with.

Looked up in its first bytes where the operator does not say it. Those of a raw disk are its guest's to choose, so a
disk that a stranger had could be taken for a qcow2 image that the stranger wrote into it. That image is the stranger's
as well, it may name no other file, and it is bounded as any: nothing is gained by it but another disk than was meant,
which `--format raw` keeps from happening.
"""

from dataclasses import dataclass

from forebay.formats.magic import RAW, START, detect
from forebay.importing.unpack import MAGIC, packed_how

QCOW2 = "qcow2"

DISKS = (RAW, QCOW2, "vmdk", "vdi", "vhdx")

_NEITHER = {
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"BZh": "packed by bzip2: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"\x04\x22\x4d\x18": "packed by lz4: unpack it first",
    b"<!DOCTYPE": "a web page, and no image: check the URL",
    b"<!doctype": "a web page, and no image: check the URL",
    b"<html": "a web page, and no image: check the URL",
    b"conectix": "in vpc format: convert it with 'qemu-img convert -O qcow2' first",
    b"QED\0": "in qed format: convert it with 'qemu-img convert -O qcow2' first",
}
"""How files begin that are no disks: what they are, and what to do."""
_TAR = (257, b"ustar")

HEAD = START
"""Bytes from the start that `packing_of` and `disk_of` want."""


@dataclass(frozen=True)
class Kind:
    """A format, written `qcow2` or `raw.xz`."""

    disk: str
    packing: str = ""

    def __str__(self) -> str:
        return f"{self.disk}.{self.packing}" if self.packing else self.disk


def parse_kind(text: str) -> Kind:
    """The format that an operator writes. Raises ValueError."""
    disk, _, packing = text.strip().lower().partition(".")
    if disk not in DISKS or (packing and packing not in MAGIC):
        raise ValueError(
            f"{text!r} is no format: write one of {', '.join(DISKS)}, with one of .{', .'.join(MAGIC)} behind it where "
            "the file is packed"
        )
    return Kind(disk, packing)


def packing_of(head: bytes) -> str:
    """What a file is packed with, by its first bytes; empty where it is not."""
    return packed_how(head)


def disk_of(head: bytes) -> str:
    """The format of a disk, by its first bytes. Raises ValueError, whose text goes on after the file's name."""
    if packed_how(head):
        raise ValueError("is packed twice: unpack it first")
    for magic, what in _NEITHER.items():
        if head.startswith(magic):
            raise ValueError(f"is {what}, or say --format raw if it is a disk")
    if head.startswith(_TAR[1], _TAR[0]):
        raise ValueError("is a tar archive: unpack it first, or say --format raw if it is a disk")
    return detect(head)
