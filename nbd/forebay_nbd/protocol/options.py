"""Options of the handshake and their replies: events to bytes and back, for both roles."""

import struct
from collections.abc import Callable

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.wire import (
    INFO_BLOCK_SIZE_BODY,
    INFO_EXPORT_BODY,
    MAX_STRING,
    OPTION_HEADER,
    OPTION_MAGIC,
    OPTION_REPLY_HEADER,
    OPTION_REPLY_MAGIC,
    REP_ERROR_BIT,
    U16,
    U32,
    Info,
    Opt,
    ProtocolError,
    Rep,
)


class _MalformedError(Exception):
    """An option's data do not parse; the text says how."""


class _Data:
    """Reads the fields of one option's or reply's data; every length is checked against what is there."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def number(self, layout: struct.Struct) -> int:
        try:
            (value,) = layout.unpack_from(self.data, self.pos)
        except struct.error:
            raise _MalformedError("data too short") from None
        self.pos += layout.size
        return int(value)

    def text(self, length: int) -> str:
        raw = self.data[self.pos : self.pos + length]
        if len(raw) < length:
            raise _MalformedError("string longer than the data")
        self.pos += length
        return decode_string(raw)

    def rest(self) -> bytes:
        raw = self.data[self.pos :]
        self.pos = len(self.data)
        return raw

    def end(self) -> None:
        if self.pos != len(self.data):
            raise _MalformedError("unexpected data")


def decode_string(raw: bytes) -> str:
    """A string of the protocol: UTF-8, no NUL, at most 4096 bytes."""
    if len(raw) > MAX_STRING:
        raise _MalformedError("string longer than 4096 bytes")
    if 0 in raw:
        raise _MalformedError("NUL in a string")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _MalformedError("not UTF-8") from None


# --- client to server ----------------------------------------------------------------------
def decode_option(option: int, data: bytes, max_queries: int) -> ev.ClientOption:
    """The event of an option that came with `data`.

    Returns BadOption where the data of a known option make no sense. Raises ProtocolError where not even that can be
    answered (EXPORT_NAME has no error reply).
    """
    decoder = _OPTION_DECODERS.get(option)
    if decoder is None:
        return ev.UnknownOption(option, data)
    fields = _Data(data)
    try:
        event = decoder(fields, max_queries)
        fields.end()
    except _MalformedError as exc:
        if option == Opt.EXPORT_NAME:
            raise ProtocolError(f"EXPORT_NAME: {exc}") from None
        return ev.BadOption(option, str(exc), Rep.ERR_INVALID)
    return event


def _export_name(fields: _Data, _: int) -> ev.ClientOption:
    return ev.ExportName(fields.text(len(fields.data)))


def _abort(fields: _Data, _: int) -> ev.ClientOption:
    fields.rest()  # a server "SHOULD ignore any data"
    return ev.Abort()


def _wanted(fields: _Data) -> tuple[str, tuple[int, ...]]:
    name = fields.text(fields.number(U32))
    count = fields.number(U16)
    return name, tuple(fields.number(U16) for _ in range(count))


def _contexts(option: int, fields: _Data, most: int) -> tuple[str, tuple[str, ...]] | ev.BadOption:
    name = fields.text(fields.number(U32))
    count = fields.number(U32)
    if count > most:
        fields.rest()
        return ev.BadOption(option, f"more than {most} queries", Rep.ERR_TOO_BIG)
    return name, tuple(fields.text(fields.number(U32)) for _ in range(count))


def _list_contexts(fields: _Data, most: int) -> ev.ClientOption:
    found = _contexts(Opt.LIST_META_CONTEXT, fields, most)
    return found if isinstance(found, ev.BadOption) else ev.ListContexts(*found)


def _set_contexts(fields: _Data, most: int) -> ev.ClientOption:
    found = _contexts(Opt.SET_META_CONTEXT, fields, most)
    return found if isinstance(found, ev.BadOption) else ev.SetContexts(*found)


_OPTION_DECODERS: dict[int, Callable[[_Data, int], ev.ClientOption]] = {
    Opt.EXPORT_NAME: _export_name,
    Opt.ABORT: _abort,
    Opt.LIST: lambda _fields, _: ev.ListExports(),
    Opt.STARTTLS: lambda _fields, _: ev.StartTls(),
    Opt.INFO: lambda _fields, _: ev.InfoOption(*_wanted(_fields)),
    Opt.GO: lambda _fields, _: ev.GoOption(*_wanted(_fields)),
    Opt.STRUCTURED_REPLY: lambda _fields, _: ev.StructuredReplies(),
    Opt.LIST_META_CONTEXT: _list_contexts,
    Opt.SET_META_CONTEXT: _set_contexts,
}

_BARE_OPTIONS: dict[type, int] = {
    ev.Abort: Opt.ABORT,
    ev.ListExports: Opt.LIST,
    ev.StartTls: Opt.STARTTLS,
    ev.StructuredReplies: Opt.STRUCTURED_REPLY,
}


def option_number(event: ev.ClientOption) -> int:
    """The number under which an option is sent and answered."""
    match event:
        case ev.UnknownOption(option=number) | ev.BadOption(option=number):
            return number
        case ev.ExportName():
            return Opt.EXPORT_NAME
        case ev.InfoOption():
            return Opt.INFO
        case ev.GoOption():
            return Opt.GO
        case ev.ListContexts():
            return Opt.LIST_META_CONTEXT
        case ev.SetContexts():
            return Opt.SET_META_CONTEXT
        case _:
            return _BARE_OPTIONS[type(event)]


def encode_option(event: ev.ClientOption) -> bytes:
    """The bytes of an option. Raises ValueError for a string that the protocol cannot carry."""
    data = _option_data(event)
    return OPTION_HEADER.pack(OPTION_MAGIC, option_number(event), len(data)) + data


def _option_data(event: ev.ClientOption) -> bytes:
    match event:
        case ev.ExportName(name=name):
            return encode_string(name)
        case ev.InfoOption(name=name, wanted=wanted) | ev.GoOption(name=name, wanted=wanted):
            numbers = b"".join(map(U16.pack, wanted))
            return _counted(name) + U16.pack(len(wanted)) + numbers
        case (
            ev.ListContexts(name=name, queries=queries) | ev.SetContexts(name=name, queries=queries)
        ):
            return _counted(name) + U32.pack(len(queries)) + b"".join(map(_counted, queries))
        case ev.UnknownOption(data=data):
            return data
        case ev.BadOption():
            raise ValueError("BadOption is for readers only")
        case _:
            return b""


def encode_string(text: str) -> bytes:
    """UTF-8 of a string; raises ValueError where the protocol's rules for strings are not met."""
    raw = text.encode()
    if len(raw) > MAX_STRING or 0 in raw:
        raise ValueError("NBD strings have at most 4096 bytes and no NUL")
    return raw


def _counted(text: str) -> bytes:
    raw = encode_string(text)
    return U32.pack(len(raw)) + raw


# --- server to client ----------------------------------------------------------------------
def encode_option_reply(event: ev.OptionReply) -> bytes:
    """The bytes of one reply to an option."""
    kind, data = _reply_data(event)
    return OPTION_REPLY_HEADER.pack(OPTION_REPLY_MAGIC, event.option, kind, len(data)) + data


def _reply_data(event: ev.OptionReply) -> tuple[int, bytes]:
    match event:
        case ev.Ack():
            return Rep.ACK, b""
        case ev.ExportListed(name=name, description=description):
            return Rep.SERVER, _counted(name) + description.encode()
        case ev.ExportInfo(size=size, flags=flags):
            return Rep.INFO, INFO_EXPORT_BODY.pack(Info.EXPORT, size, flags)
        case ev.BlockSizeInfo(minimum=minimum, preferred=preferred, maximum=maximum):
            return Rep.INFO, INFO_BLOCK_SIZE_BODY.pack(Info.BLOCK_SIZE, minimum, preferred, maximum)
        case ev.NameInfo(name=name):
            return Rep.INFO, U16.pack(Info.NAME) + encode_string(name)
        case ev.OtherInfo(kind=kind, data=data):
            return Rep.INFO, U16.pack(kind) + data
        case ev.ContextListed(context_id=number, name=name):
            return Rep.META_CONTEXT, U32.pack(number) + encode_string(name)
        case ev.OptionError(code=code, text=text):
            return code, text.encode()[:MAX_STRING]


def decode_option_reply(option: int, kind: int, data: bytes) -> ev.OptionReply:
    """The event of one reply to an option. Raises ProtocolError for types and data that make no sense."""
    if kind & REP_ERROR_BIT:
        return ev.OptionError(option, kind, data[:MAX_STRING].decode(errors="replace"))
    decoder = _REPLY_DECODERS.get(kind)
    if decoder is None:
        raise ProtocolError(f"unknown reply type {kind} to option {option}")
    fields = _Data(data)
    try:
        event = decoder(option, fields)
        fields.end()
    except _MalformedError as exc:
        raise ProtocolError(f"reply type {kind} to option {option}: {exc}") from None
    return event


def _listed(option: int, fields: _Data) -> ev.OptionReply:
    name = fields.text(fields.number(U32))
    return ev.ExportListed(option, name, fields.rest()[:MAX_STRING].decode(errors="replace"))


def _info(option: int, fields: _Data) -> ev.OptionReply:
    kind = fields.number(U16)
    if kind == Info.NAME:
        return ev.NameInfo(option, fields.text(len(fields.data) - fields.pos))
    layout = (
        {Info.EXPORT: INFO_EXPORT_BODY, Info.BLOCK_SIZE: INFO_BLOCK_SIZE_BODY}.get(Info(kind))
        if kind < 4
        else None
    )
    if layout is None:
        return ev.OtherInfo(option, kind, fields.rest())
    if len(fields.data) != layout.size:
        raise _MalformedError(f"information of {len(fields.data)} bytes, not {layout.size}")
    fields.rest()
    _, *values = layout.unpack(fields.data)
    return (
        ev.ExportInfo(option, *values) if kind == Info.EXPORT else ev.BlockSizeInfo(option, *values)
    )


_REPLY_DECODERS: dict[int, Callable[[int, _Data], ev.OptionReply]] = {
    Rep.ACK: lambda option, _: ev.Ack(option),
    Rep.SERVER: _listed,
    Rep.INFO: _info,
    Rep.META_CONTEXT: lambda option, fields: ev.ContextListed(
        option, fields.number(U32), fields.text(len(fields.data) - fields.pos)
    ),
}
