# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which NFS 4 call an Ethernet frame begins: enough of IPv4, TCP, RPC (RFC 5531) and NFS (RFC 8881) to name it."""

import struct

NFS_PORT = 2049
NFS_PROGRAM = 100003
COMPOUND = 1
SEQUENCE_OPERANDS = 32
"""Bytes: session, sequence, slot, highest slot, cache this (RFC 8881, 18.46)."""

NAMES = {
    3: "ACCESS", 4: "CLOSE", 5: "COMMIT", 6: "CREATE", 8: "DELEGRETURN", 9: "GETATTR", 11: "LINK", 12: "LOCK",
    13: "LOCKT", 14: "LOCKU", 15: "LOOKUP", 18: "OPEN", 21: "OPEN_DOWNGRADE", 25: "READ", 26: "READDIR",
    28: "REMOVE", 29: "RENAME", 32: "SAVEFH", 34: "SETATTR", 38: "WRITE", 59: "ALLOCATE", 62: "DEALLOCATE",
    69: "SEEK",
}  # fmt: skip
SEQUENCE, PUTFH, PUTROOTFH, SAVEFH = 53, 22, 24, 32


class _Reader:
    """32-bit words and counted bytes (XDR) from a buffer; struct.error beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def word(self) -> int:
        (value,) = struct.unpack_from(">I", self._data, self._at)
        self._at += 4
        return int(value)

    def skip(self, length: int) -> None:
        self._at += length

    def skip_counted(self) -> None:
        self.skip((self.word() + 3) & ~3)


def call_of(frame: bytes) -> str | None:
    """The first operation of a call that does something to a file; None for all else.

    Calls that only keep the session alive, or make one, are none.
    """
    try:
        payload = _tcp_payload(frame)
        return _operation(_Reader(payload)) if payload else None
    except struct.error:
        return None


def _tcp_payload(frame: bytes) -> bytes:
    """What a frame carries to the NFS port, or nothing."""
    if frame[12:14] != b"\x08\x00" or frame[23:24] != b"\x06":
        return b""
    tcp = 14 + (frame[14] & 0xF) * 4
    if struct.unpack_from(">H", frame, tcp + 2)[0] != NFS_PORT:
        return b""
    length = struct.unpack_from(">H", frame, 16)[0]
    return frame[tcp + (frame[tcp + 12] >> 4) * 4 : 14 + length]


def _operation(reader: _Reader) -> str | None:
    reader.skip(8)  # the record's length, and the call's number
    if reader.word() != 0 or reader.word() != 2 or reader.word() != NFS_PROGRAM:
        return None
    if reader.word() != 4 or reader.word() != COMPOUND:
        return None
    for _ in ("credentials", "verifier"):
        reader.skip(4)
        reader.skip_counted()
    reader.skip_counted()  # the tag
    reader.skip(4)  # the minor version
    for _ in range(reader.word()):
        operation = reader.word()
        if operation == SEQUENCE:
            reader.skip(SEQUENCE_OPERANDS)
        elif operation == PUTFH:
            reader.skip_counted()
        elif operation not in (PUTROOTFH, SAVEFH):
            return NAMES.get(operation)
    return None
