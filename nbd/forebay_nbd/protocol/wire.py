# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Numbers and layouts of the NBD protocol, its error numbers, and the two kinds of failure.

Everything here comes from doc/proto.md of github.com/NetworkBlockDevice/nbd, "the protocol document"; what stands in
quotation marks is quoted from it. All integers on the wire are big-endian; offsets, lengths and sizes are bytes.
"""

import enum
import errno
import struct
from typing import Final

Buffer = bytes | bytearray | memoryview
"""The types that carry payloads of requests and data of replies. Memoryviews have format "B" and are contiguous."""

# --- handshake ----------------------------------------------------------------------
INIT_MAGIC: Final = 0x4E42444D41474943
"""The first eight bytes of every server: "NBDMAGIC"."""
OPTION_MAGIC: Final = 0x49484156454F5054
"""The second eight bytes of a newstyle server, and the first of each option: "IHAVEOPT"."""
OLDSTYLE_MAGIC: Final = 0x00420281861253
"""The second eight bytes of an oldstyle server, which this package does not speak with."""
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
"""The first eight bytes of each reply to an option."""

GREETING: Final = struct.Struct(">QQH")
"""INIT_MAGIC, OPTION_MAGIC, handshake flags."""
CLIENT_FLAGS: Final = struct.Struct(">I")
"""The handshake flags that the client answers with."""
OPTION_HEADER: Final = struct.Struct(">QII")
"""OPTION_MAGIC, option, length of the data."""
OPTION_REPLY_HEADER: Final = struct.Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of the data."""
EXPORT_REPLY: Final = struct.Struct(">QH")
"""Size and transmission flags: the whole reply to EXPORT_NAME, but for the padding."""
EXPORT_REPLY_ZEROES: Final = 124
"""Bytes of padding after EXPORT_REPLY unless both sides agreed on NO_ZEROES."""

U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")
INFO_EXPORT_BODY: Final = struct.Struct(">HQH")
"""Info.EXPORT, size, transmission flags."""
INFO_BLOCK_SIZE_BODY: Final = struct.Struct(">HIII")
"""Info.BLOCK_SIZE, minimum, preferred, maximum payload."""

MAX_STRING: Final = 4096
"""Longest string of the protocol, bytes ("Values", last paragraph)."""
MAX_PAYLOAD: Final = 32 << 20
"""Largest READ or WRITE, bytes. Every client may count on 2^25 ("Size constraints")."""
MAX_SIZE: Final = (1 << 63) - 1
"""Largest export, bytes: a larger size is negative to libnbd before 1.18 (CVE-2023-5215) and to every off_t."""
MAX_EXTENTS: Final = 1 << 20
"""Most extents that a server should send in one BLOCK_STATUS chunk."""


def clipped(text: str, most: int) -> bytes:
    """The UTF-8 bytes of an error text, at most that many, and no part of a character.

    What is no character (the bytes of a file's name that is not UTF-8) is written as an escape.
    """
    raw = text.encode(errors="backslashreplace")
    return raw if len(raw) <= most else raw[:most].decode(errors="ignore").encode()


class HandshakeFlag(enum.IntFlag):
    """Handshake flags: the server offers them in its greeting, the client answers with those that it knows."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Opt(enum.IntEnum):
    """Numbers of the options, by which the client asks for something during the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(enum.IntEnum):
    """Types of a reply to an option. Errors have REP_ERROR_BIT set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


REP_ERROR_BIT: Final = 1 << 31
"""Set in the type of a reply that refuses an option."""


class Info(enum.IntEnum):
    """Types of the information that a server gives in its replies to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# --- transmission ----------------------------------------------------------------------
class Flag(enum.IntFlag):
    """Transmission flags: what the server says in the handshake of an export and of the commands it takes."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Cmd(enum.IntEnum):
    """Commands: the type of a request."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CmdFlag(enum.IntFlag):
    """Command flags, of one request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(enum.IntEnum):
    """Types of a chunk of a structured reply. Errors have CHUNK_ERROR_BIT set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


CHUNK_ERROR_BIT: Final = 1 << 15
"""Set in the type of a chunk that says that the request failed."""
CHUNK_DONE: Final = 1
"""Flag of the last chunk of a structured reply."""

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

REQUEST: Final = struct.Struct(">IHHQQI")
"""The header of a request: magic, flags, type, cookie, offset, length."""
REQUEST_FAST: Final = struct.Struct(">Q8sQI")
"""The same 28 bytes for the hot loop: magic, flags and type as one number, the cookie as the bytes to send back."""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""Magic, error, cookie. The data of a READ follow."""
CHUNK_HEADER: Final = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length of the chunk's payload."""
DATA_CHUNK_FAST: Final = struct.Struct(">Q8sIQ")
"""An OFFSET_DATA chunk up to its data: magic, flags and type as one number, the cookie as it came, length of the
payload, offset."""
HOLE_BODY: Final = struct.Struct(">QI")
"""The payload of OFFSET_HOLE: offset, length of the hole."""
EXTENT: Final = struct.Struct(">II")
"""One extent in the payload of BLOCK_STATUS: length, flags."""
ERROR_BODY: Final = struct.Struct(">IH")
"""The beginning of the payload of ERROR and ERROR_OFFSET: error number, length of the text that follows."""

PLAIN_READ: Final = (REQUEST_MAGIC << 32) | Cmd.READ
"""First number of REQUEST_FAST in a READ without flags."""
PLAIN_WRITE: Final = (REQUEST_MAGIC << 32) | Cmd.WRITE
"""First number of REQUEST_FAST in a WRITE without flags."""
SIMPLE_OK: Final = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 0)[:8]
"""The first eight bytes of a simple reply that says success; the cookie follows."""
DATA_DONE: Final = (STRUCTURED_REPLY_MAGIC << 32) | (CHUNK_DONE << 16) | Chunk.OFFSET_DATA
"""First number of DATA_CHUNK_FAST in an OFFSET_DATA chunk that is the last of its reply."""

BASE_ALLOCATION: Final = "base:allocation"
"""The metadata context that tells which parts of an export are holes and which read as zeros."""
STATE_HOLE: Final = 1
"""Flag of an extent in BASE_ALLOCATION: nothing is allocated there."""
STATE_ZERO: Final = 2
"""Flag of an extent in BASE_ALLOCATION: it reads as zeros."""

SUPPORTED_ERRNOS: Final = frozenset(
    (
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    )
)
"""The error numbers of the protocol ("Error values"); they are those of Linux."""
_ERRNO_MAP: Final = {
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.ENOMEM: errno.EIO,  # a server "SHOULD NOT return NBD_ENOMEM"
}
"""What is sent for an errno that is not sent as it is."""


class ProtocolError(Exception):
    """The peer broke the protocol. The stream cannot be followed any further, so the connection has to end."""


class RequestError(OSError):
    """One request cannot be carried out. Its errno and text are the reply to it, and the connection goes on."""


def wire_errno(code: int | None) -> int:
    """The number to be sent in a reply for the errno `code`: one of SUPPORTED_ERRNOS, EIO for all others."""
    if code is None:
        return errno.EIO
    code = _ERRNO_MAP.get(code, code)
    return code if code in SUPPORTED_ERRNOS else errno.EIO


def local_errno(code: int) -> int:
    """The errno for the error number `code` received from a server; "an unexpected error value" counts as EINVAL."""
    return code if code in SUPPORTED_ERRNOS else errno.EINVAL


def remaining(buffers: list[Buffer], sent: int) -> list[Buffer]:
    """What is left to be sent of `buffers` after their first `sent` bytes; nothing is copied."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
