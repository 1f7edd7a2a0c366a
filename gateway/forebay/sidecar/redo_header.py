# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The header of a redo journal: whose checkpoint it is, of which image, and of which instant.

Everything here blocks, and raises OSError.
"""

import errno
import json
import struct
from dataclasses import asdict, dataclass

from xxhash import xxh3_64_intdigest

from forebay.origin.worker import syscalls
from forebay.sidecar.record import (
    LARGEST,
    Owner,
    check_instant,
    check_number,
    check_text,
    parse_object,
)

FORMAT, PLAIN = 4, 3
"""The format of a journal, with PROVISIONED and without. One of a larger number is a newer version's: refused."""

LONGEST_NAME = 255
"""Characters of each name in a header, at most."""

MAGIC = b"FBREDO\0\0"
LENGTH = 4096
"""Bytes of a header."""
SUM = struct.Struct("<Q")
"""The checksum of a header, or of a record."""


@dataclass(frozen=True)
class Checkpoint:
    """What a journal says in its header: whose checkpoint it is, of which image, and of which instant."""

    gateway: str
    host: str
    disk: str
    size: int
    """Bytes of the image."""
    inode: int
    """Of the image."""
    as_of: str
    """The instant: UTC, ISO 8601; empty where it is not known."""
    mtime_ns: int = 0
    """The image's when the journal was committed, nanoseconds since the epoch; 0 in journals of format 1."""
    ctime_ns: int = 0
    """The same of its last change of status."""
    token: int = 0
    """The token of the owner whose checkpoint it is; 0 in journals of formats 1 and 2."""
    format: int = PLAIN

    def is_of(self, owner: Owner) -> bool:
        """True if it is a checkpoint of that owner, and not of one before it."""
        return self.gateway == owner.gateway and self.token in (0, owner.token)


def packed(checkpoint: Checkpoint) -> bytes:
    """The header's bytes. Raises OSError(ENAMETOOLONG) where names do not fit into it."""
    text = json.dumps(asdict(checkpoint)).encode()
    body = (MAGIC + text).ljust(LENGTH - SUM.size, b"\0")
    if len(body) > LENGTH - SUM.size:
        raise OSError(errno.ENAMETOOLONG, "a redo journal's header does not hold such long names")
    return body + SUM.pack(xxh3_64_intdigest(body))


def read(fd: int) -> Checkpoint:
    """The checked header. Raises ValueError for one that is damaged, makes no sense, or is of another version."""
    raw = syscalls.pread(fd, LENGTH, 0)
    if len(raw) < LENGTH or not raw.startswith(MAGIC):
        raise ValueError("no header")
    body, (found,) = raw[: -SUM.size], SUM.unpack(raw[-SUM.size :])
    if xxh3_64_intdigest(body) != found:
        raise ValueError("damaged header")
    try:
        return _parsed(body[len(MAGIC) :].rstrip(b"\0"))
    except ValueError as why:
        raise ValueError(f"a header that makes no sense: {why}") from None


def _parsed(text: bytes) -> Checkpoint:
    """What the JSON of a header says. Raises ValueError."""
    fields = parse_object(text)
    version = fields.get("format")
    if type(version) is not int or version not in range(1, FORMAT + 1):
        known = f"this version knows only 1 to {FORMAT}"
        raise ValueError(f"format {version}, {known}" if type(version) is int else known)
    for name in ("mtime_ns", "ctime_ns", "token"):
        fields.setdefault(name, 0)
    check_number("token", fields["token"], LARGEST)
    for name in ("gateway", "host", "disk"):
        check_text(name, fields.get(name), LONGEST_NAME)
    check_instant("as_of", fields.get("as_of"))
    for name in ("size", "inode", "mtime_ns", "ctime_ns"):
        check_number(name, fields.get(name), (1 << 64) - 1)
    return Checkpoint(**{name: fields[name] for name in Checkpoint.__dataclass_fields__})
