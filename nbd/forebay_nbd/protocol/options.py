# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Options of the handshake and the replies to them: from events to bytes and back, for both roles."""

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
    clipped,
)


class _MalformedError(Exception):
    """The data of an option or of a reply cannot be decoded; the text says why."""


class _Data:
    """Decodes the fields of one option or reply, one after the other. All methods but rest() raise _MalformedError."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def number(self, layout: struct.Struct) -> int:
        """The next field, a number; `layout` says how long it is."""
        try:
            (value,) = layout.unpack_from(self.data, self.pos)
        except struct.error:
            raise _MalformedError("data too short") from None
        self.pos += layout.size
        return int(value)

    def text(self, length: int) -> str:
        """The next field, a string of `length` bytes."""
        raw = self.data[self.pos : self.pos + length]
        if len(raw) < length:
            raise _MalformedError("string longer than the data")
        self.pos += length
        return decode_string(raw)

    def rest(self) -> bytes:
        """All bytes that no field has been decoded from."""
        raw = self.data[self.pos :]
        self.pos = len(self.data)
        return raw

    def end(self) -> None:
        """Checks that nothing is left."""
        if self.pos != len(self.data):
            raise _MalformedError("unexpected data")


def decode_string(raw: bytes) -> str:
    """A string of the protocol: UTF-8, no NUL, at most 4096 bytes. Raises _MalformedError for any other."""
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
    """The event for the option number `option` with its `data`.

    It is BadOption if the data of a known option cannot be decoded, or if it has more than `max_queries` queries.
    Raises ProtocolError if the data of EXPORT_NAME cannot be decoded: there is no reply that refuses it.
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
    """The data of INFO and GO: the export's name and the information types asked for."""
    name = fields.text(fields.number(U32))
    count = fields.number(U16)
    return name, tuple(fields.number(U16) for _ in range(count))


def _contexts(option: int, fields: _Data, most: int) -> tuple[str, tuple[str, ...]] | ev.BadOption:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT: the export's name and at most `most` queries."""
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
"""For each known option: its event from its fields and the number of queries allowed."""

_BARE_OPTIONS: dict[type, int] = {
    ev.Abort: Opt.ABORT,
    ev.ListExports: Opt.LIST,
    ev.StartTls: Opt.STARTTLS,
    ev.StructuredReplies: Opt.STRUCTURED_REPLY,
}
"""The options without data."""


def option_number(event: ev.ClientOption) -> int:
    """The Opt number of an option, as it is on the wire in the option and in the replies to it."""
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
    """The bytes of an option. Raises ValueError for a string that the protocol does not allow, and for BadOption."""
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
    """The UTF-8 bytes of a string. Raises ValueError if they are more than 4096 or one is NUL."""
    raw = text.encode()
    if len(raw) > MAX_STRING or 0 in raw:
        raise ValueError("NBD strings have at most 4096 bytes and no NUL")
    return raw


def _counted(text: str) -> bytes:
    """A string with its length before it, as most fields are."""
    raw = encode_string(text)
    return U32.pack(len(raw)) + raw


# --- server to client ----------------------------------------------------------------------
def encode_option_reply(event: ev.OptionReply) -> bytes:
    """The bytes of one reply to an option. Raises ValueError for a string that the protocol does not allow."""
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
            return code, clipped(text, MAX_STRING)


def decode_option_reply(option: int, kind: int, data: bytes) -> ev.OptionReply:
    """The event for a reply of type `kind` to an option.

    Raises ProtocolError for an unknown type that is no error, and for data that cannot be decoded.
    """
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
    """The event for a reply of type INFO. Its data begin with the type of the information."""
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
"""For each type of reply that is no error: its event, from the option's number and the fields."""
