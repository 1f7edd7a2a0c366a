# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which format a file looks like by its first bytes. That it looks so does not make it one: a guest may write them."""

RAW = "raw"
"""The format of all files that do not look like another."""

START = 512
"""Bytes from the start of a file that `detect` wants."""

_BEGIN = {
    b"QFI\xfb": "qcow2",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk Descriptor": "vmdk",
    b"vhdxfile": "vhdx",
}
_VDI_AT, _VDI = 64, b"\x7f\x10\xda\xbe"


def detect(start: bytes) -> str:
    """The format of a file that begins so."""
    for magic, name in _BEGIN.items():
        if start.startswith(magic):
            return name
    return "vdi" if start[_VDI_AT:].startswith(_VDI) else RAW
