# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The messages of NBD, one class each, without their bytes on the wire.

Both roles share these classes: a message that one side encodes is decoded to an equal one by the other side. Offsets,
lengths and sizes are bytes; numbers named `option` are Opt, `code` Rep, `error` errno values of the wire.
"""

from dataclasses import dataclass

from forebay_nbd.protocol.wire import Buffer


class NeedData:
    """The type of NEED_DATA, which next_event() returns while the next message is not complete."""

    def __repr__(self) -> str:
        return "NEED_DATA"


NEED_DATA = NeedData()
"""The only instance of NeedData."""


# --- handshake, both directions ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Greeting:
    """The server's first message: it speaks newstyle, with these HandshakeFlags."""

    flags: int


@dataclass(frozen=True, slots=True)
class ClientFlags:
    """The client's first message: the HandshakeFlags of the greeting that it is going to use."""

    flags: int


# --- handshake, client to server ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ExportName:
    """EXPORT_NAME asks for transmission on this export. The server cannot refuse it but by closing the connection."""

    name: str


@dataclass(frozen=True, slots=True)
class Abort:
    """ABORT says that the client is going to close the connection."""


@dataclass(frozen=True, slots=True)
class ListExports:
    """LIST asks for the names of all exports."""


@dataclass(frozen=True, slots=True)
class StartTls:
    """STARTTLS asks for encryption."""


@dataclass(frozen=True, slots=True)
class InfoOption:
    """INFO asks for size and flags of this export, and for the Info types `wanted`."""

    name: str
    wanted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GoOption:
    """GO asks for the same as INFO, and for transmission on the export."""

    name: str
    wanted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StructuredReplies:
    """STRUCTURED_REPLY asks for replies in chunks."""


@dataclass(frozen=True, slots=True)
class ListContexts:
    """LIST_META_CONTEXT asks which metadata contexts of an export match the queries."""

    name: str
    queries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetContexts:
    """SET_META_CONTEXT selects the metadata contexts of an export that BLOCK_STATUS is to tell about."""

    name: str
    queries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnknownOption:
    """An option without a class of its own."""

    option: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class BadOption:
    """A known option whose data cannot be decoded. Only the server's reader makes it; nobody sends it.

    It can be answered, since the end of the option is known: with the Rep error `reply`.
    """

    option: int
    reason: str
    reply: int


ClientOption = (
    ExportName
    | Abort
    | ListExports
    | StartTls
    | InfoOption
    | GoOption
    | StructuredReplies
    | ListContexts
    | SetContexts
    | UnknownOption
    | BadOption
)

NamesExport = ExportName | InfoOption | GoOption | ListContexts | SetContexts


# --- handshake, server to client ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Ack:
    """ACK: the option has been carried out; no further reply to it follows."""

    option: int


@dataclass(frozen=True, slots=True)
class ExportListed:
    """SERVER: one export, in reply to LIST."""

    option: int
    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """Size and transmission flags of an export, in reply to INFO and GO."""

    option: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class BlockSizeInfo:
    """Size constraints of requests, in reply to INFO and GO: smallest block, efficient block, longest payload."""

    option: int
    minimum: int
    preferred: int
    maximum: int


@dataclass(frozen=True, slots=True)
class NameInfo:
    """The canonical name of an export, in reply to INFO and GO."""

    option: int
    name: str


@dataclass(frozen=True, slots=True)
class OtherInfo:
    """Other information, in reply to INFO and GO: a description, or of an unknown type `kind`."""

    option: int
    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ContextListed:
    """META_CONTEXT: one metadata context. After SET_META_CONTEXT, BLOCK_STATUS chunks carry its `context_id`."""

    option: int
    context_id: int
    name: str


@dataclass(frozen=True, slots=True)
class OptionError:
    """The option is refused, and no further reply to it follows: `code` is a Rep error, `text` for people."""

    option: int
    code: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class ExportBegins:
    """The reply to EXPORT_NAME: transmission begins. `zeroes`: 124 bytes of padding belong to it."""

    size: int
    flags: int
    zeroes: bool = False


OptionReply = (
    Ack
    | ExportListed
    | ExportInfo
    | BlockSizeInfo
    | NameInfo
    | OtherInfo
    | ContextListed
    | OptionError
)

HandshakeReply = OptionReply | ExportBegins
"""Everything that a server sends in reply to an option."""


# --- transmission, client to server ----------------------------------------------------------------------
@dataclass(slots=True)
class Request:
    """One request. `payload` is the data of a WRITE.

    `command` and `flags` are as received, so they may be unknown numbers. A payload from RequestReader is memory of the
    receive buffer, valid until more bytes are received, unless `owned` is true: then it is memory of its own, which the
    reader does not use again.
    """

    command: int
    flags: int
    cookie: int
    offset: int = 0
    length: int = 0
    payload: Buffer = b""
    owned: bool = False


# --- transmission, server to client ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SimpleReply:
    """The request is done, or failed with `error`. Without structured replies it carries the data of a READ."""

    cookie: int
    error: int = 0
    data: Buffer = b""


@dataclass(frozen=True, slots=True)
class NoneChunk:
    """The last chunk of a reply, without content."""

    cookie: int


@dataclass(frozen=True, slots=True)
class DataChunk:
    """OFFSET_DATA: the content of [offset, offset + len(data)). `done`: no further chunk of the reply follows."""

    cookie: int
    offset: int
    data: Buffer
    done: bool = True


@dataclass(frozen=True, slots=True)
class HoleChunk:
    """OFFSET_HOLE: [offset, offset + length) reads as zeros."""

    cookie: int
    offset: int
    length: int
    done: bool = True


@dataclass(frozen=True, slots=True)
class StatusChunk:
    """BLOCK_STATUS: extents (length, flags) in one metadata context, from the request's offset on."""

    cookie: int
    context_id: int
    extents: tuple[tuple[int, int], ...]
    done: bool = True


@dataclass(frozen=True, slots=True)
class ErrorChunk:
    """ERROR or, with an `offset`, ERROR_OFFSET: the request failed; `text` is for people."""

    cookie: int
    error: int
    text: str = ""
    offset: int | None = None
    done: bool = True


Reply = SimpleReply | NoneChunk | DataChunk | HoleChunk | StatusChunk | ErrorChunk
