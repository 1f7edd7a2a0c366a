"""What is said in an NBD conversation, one class per message, free of bytes and sockets.

Both roles share these: what one side's writer encodes, the other side's reader hands out again. Offsets, lengths and
sizes are bytes.
"""

from dataclasses import dataclass

from forebay_nbd.protocol.wire import Buffer


class NeedData:
    """The only instance, NEED_DATA, says that the next event is not complete yet."""

    def __repr__(self) -> str:
        return "NEED_DATA"


NEED_DATA = NeedData()


# --- handshake, both directions ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Greeting:
    """Server: I speak newstyle, with these HandshakeFlags."""

    flags: int


@dataclass(frozen=True, slots=True)
class ClientFlags:
    """Client: I understood these of your flags."""

    flags: int


# --- handshake, client to server ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ExportName:
    """EXPORT_NAME: serve me this export at once (no error can be answered)."""

    name: str


@dataclass(frozen=True, slots=True)
class Abort:
    """ABORT: I give up."""


@dataclass(frozen=True, slots=True)
class ListExports:
    """LIST: which exports are there?"""


@dataclass(frozen=True, slots=True)
class StartTls:
    """STARTTLS: let us encrypt."""


@dataclass(frozen=True, slots=True)
class InfoOption:
    """INFO: tell me about this export; `wanted` are Info numbers."""

    name: str
    wanted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GoOption:
    """GO: as INFO, then begin."""

    name: str
    wanted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StructuredReplies:
    """STRUCTURED_REPLY: answer my reads in chunks."""


@dataclass(frozen=True, slots=True)
class ListContexts:
    """LIST_META_CONTEXT: which metadata contexts match?"""

    name: str
    queries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetContexts:
    """SET_META_CONTEXT: I will ask for the block status in these."""

    name: str
    queries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnknownOption:
    """An option we have no class for."""

    option: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class BadOption:
    """A known option whose data makes no sense (reader only): answered with an error, the stream goes on.

    `reply` is the Rep error that fits.
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


# --- handshake, server to client ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Ack:
    """The option is done."""

    option: int


@dataclass(frozen=True, slots=True)
class ExportListed:
    """One export of LIST."""

    option: int
    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """Size and transmission flags, in INFO and GO."""

    option: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class BlockSizeInfo:
    """Size constraints, in INFO and GO."""

    option: int
    minimum: int
    preferred: int
    maximum: int


@dataclass(frozen=True, slots=True)
class NameInfo:
    """The export's canonical name, in INFO and GO."""

    option: int
    name: str


@dataclass(frozen=True, slots=True)
class OtherInfo:
    """An information type without a class of its own (a description, or one we do not know)."""

    option: int
    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ContextListed:
    """One metadata context; the id is what BLOCK_STATUS chunks will carry."""

    option: int
    context_id: int
    name: str


@dataclass(frozen=True, slots=True)
class OptionError:
    """The option is refused; `code` is a Rep error, `text` for a person."""

    option: int
    code: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class ExportBegins:
    """The answer to EXPORT_NAME: transmission begins. `zeroes`: with the 124 bytes of padding."""

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


# --- transmission, client to server ----------------------------------------------------------------------
@dataclass(slots=True)
class Request:
    """One request. `command` and `flags` are as received, so may be unknown numbers. `payload` is WRITE's data.

    A payload that the reader hands out is writable memory of the reader: valid until more bytes are received, unless
    `owned` is true, which means nobody else will touch it again.
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
    """Done, or failed with `error`. A READ's data follow where structured replies were not agreed on."""

    cookie: int
    error: int = 0
    data: Buffer = b""


@dataclass(frozen=True, slots=True)
class NoneChunk:
    """Last chunk of a reply, without content."""

    cookie: int


@dataclass(frozen=True, slots=True)
class DataChunk:
    """Content of [offset, offset + len(data))."""

    cookie: int
    offset: int
    data: Buffer
    done: bool = True


@dataclass(frozen=True, slots=True)
class HoleChunk:
    """[offset, offset + length) reads as zeros."""

    cookie: int
    offset: int
    length: int
    done: bool = True


@dataclass(frozen=True, slots=True)
class StatusChunk:
    """Extents (length, flags) of one metadata context from the request's offset on."""

    cookie: int
    context_id: int
    extents: tuple[tuple[int, int], ...]
    done: bool = True


@dataclass(frozen=True, slots=True)
class ErrorChunk:
    """The request failed, at `offset` where that is known."""

    cookie: int
    error: int
    text: str = ""
    offset: int | None = None
    done: bool = True


Reply = SimpleReply | NoneChunk | DataChunk | HoleChunk | StatusChunk | ErrorChunk
