"""Numbers and layouts of the NBD protocol, and the two ways in which it can fail.

Everything here comes from doc/proto.md of github.com/NetworkBlockDevice/nbd. All integers on the wire are big-endian;
offsets and lengths are bytes.
"""

import enum
import errno
import struct
from typing import Final

Buffer = bytes | bytearray | memoryview
"""What carries bytes: requests' payloads, replies' data. Memoryviews have format "B" and are contiguous."""

# --- handshake ----------------------------------------------------------------------
INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

GREETING: Final = struct.Struct(">QQH")  # INIT_MAGIC, OPTION_MAGIC, handshake flags
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")  # OPTION_MAGIC, option, length of the data
OPTION_REPLY_HEADER: Final = struct.Struct(
    ">QIII"
)  # OPTION_REPLY_MAGIC, option, reply type, length of the data
EXPORT_REPLY: Final = struct.Struct(
    ">QH"
)  # size, transmission flags: the whole answer to EXPORT_NAME
EXPORT_REPLY_ZEROES: Final = 124
"""Bytes of padding after EXPORT_REPLY unless both sides agreed on NO_ZEROES."""

U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
INFO_EXPORT_BODY: Final = struct.Struct(">HQH")  # INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE_BODY: Final = struct.Struct(
    ">HIII"
)  # INFO_BLOCK_SIZE, minimum, preferred, maximum payload

MAX_STRING: Final = 4096
"""Longest string of the protocol, in bytes ("Values", last paragraph)."""
MAX_PAYLOAD: Final = 32 << 20
"""Largest READ or WRITE, bytes. 2^25 is what every client may count on ("Size constraints")."""
MAX_SIZE: Final = (1 << 63) - 1
"""Largest export: bigger ones are negative numbers to libnbd before 1.18 (CVE-2023-5215) and to every off_t."""
MAX_EXTENTS: Final = 1 << 20
"""Most descriptors of one BLOCK_STATUS chunk that a server should send."""


class HandshakeFlag(enum.IntFlag):
    """Flags of the server's greeting; the client answers with those it understood."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Opt(enum.IntEnum):
    """Options of the handshake."""

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
    """Types of a reply to an option. Errors have bit 31 set."""

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


class Info(enum.IntEnum):
    """Information types of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# --- transmission ----------------------------------------------------------------------
class Flag(enum.IntFlag):
    """Transmission flags: what an export can do."""

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
    """Request types."""

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
    """Flags of one request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(enum.IntEnum):
    """Types of a structured reply's chunk. Errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_DONE: Final = 1

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
REQUEST_FAST: Final = struct.Struct(">Q8sQI")
"""The same 28 bytes for the hot loop: magic, flags and type as one number, the cookie as the bytes to send back."""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK_HEADER: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length of the payload
DATA_CHUNK_FAST: Final = struct.Struct(">Q8sIQ")
"""OFFSET_DATA up to its data: magic, flags and type as one number, the cookie as it came, payload length, offset."""
HOLE_BODY: Final = struct.Struct(">QI")  # offset, hole size
EXTENT: Final = struct.Struct(">II")  # length, flags
ERROR_BODY: Final = struct.Struct(">IH")  # error, length of the message that follows
U64: Final = struct.Struct(">Q")

PLAIN_READ: Final = (REQUEST_MAGIC << 32) | Cmd.READ
PLAIN_WRITE: Final = (REQUEST_MAGIC << 32) | Cmd.WRITE
"""First eight bytes, as a number, of a READ and a WRITE without flags (see REQUEST_FAST)."""
SIMPLE_OK: Final = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 0)[:8]
"""A successful simple reply up to the cookie."""
DATA_DONE: Final = (STRUCTURED_REPLY_MAGIC << 32) | (CHUNK_DONE << 16) | Chunk.OFFSET_DATA

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
"""Flags of the context base:allocation."""
BASE_ALLOCATION: Final = "base:allocation"

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
_ERRNO_MAP: Final = {
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.ENOMEM: errno.EIO,  # a server "SHOULD NOT return NBD_ENOMEM"
}


class ProtocolError(Exception):
    """The peer broke the protocol: the stream cannot be followed any further and the connection has to end."""


class RequestError(OSError):
    """One request cannot be done; its errno and text are the answer and the connection goes on."""


def wire_errno(code: int | None) -> int:
    """The error number that says `code` on the wire ("Error values"): one of eight, EIO for all others."""
    if code is None:
        return errno.EIO
    code = _ERRNO_MAP.get(code, code)
    return code if code in SUPPORTED_ERRNOS else errno.EIO


def local_errno(code: int) -> int:
    """The errno for an error number received from a server; "an unexpected error value" counts as EINVAL."""
    return code if code in SUPPORTED_ERRNOS else errno.EINVAL


def rest(buffers: list[Buffer], sent: int) -> list[Buffer]:
    """What of `buffers` is left to be sent after their first `sent` bytes."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
