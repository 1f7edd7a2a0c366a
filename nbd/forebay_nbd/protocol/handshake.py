# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The handshake without I/O, one class per role: it decodes what the peer sent, and encodes what is to be sent.

Newstyle only; with a peer that does not know fixed newstyle, EXPORT_NAME is the only option. Both roles go through the
same states. TRANSITIONS has every event that a state allows; any other is the peer's fault if it was
received (ProtocolError), and a bug of ours if it was to be sent (LocalProtocolError).
"""

import enum

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.options import (
    decode_option,
    decode_option_reply,
    encode_option,
    encode_option_reply,
    option_number,
)
from forebay_nbd.protocol.wire import (
    CLIENT_FLAGS,
    EXPORT_REPLY,
    EXPORT_REPLY_ZEROES,
    GREETING,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_HEADER,
    OPTION_MAGIC,
    OPTION_REPLY_HEADER,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    ProtocolError,
)


class LocalProtocolError(Exception):
    """Our own code was about to send what the state of the handshake does not allow: a bug, not the peer's fault."""


class State(enum.Enum):
    """What has been said in a handshake, and so who may say what next. The states of both sides are the same."""

    START = "start"
    """The server has to send its greeting."""
    GREETED = "greeted"
    """The client has to send its flags."""
    OPTIONS = "options"
    """The client may send an option."""
    ANSWER = "answer"
    """The server has to answer an option after which the client may send another one."""
    ANSWER_EXPORT_NAME = "answer to EXPORT_NAME"
    """The server has to answer EXPORT_NAME, which it can only do by beginning transmission."""
    ANSWER_GO = "answer to GO"
    """The server has to answer GO; if it acknowledges that, transmission begins."""
    ANSWER_ABORT = "answer to ABORT"
    """The server has to answer ABORT; if it acknowledges that, the connection is over."""
    TRANSMISSION = "transmission"
    """The handshake is over; requests and their replies follow."""
    CLOSED = "closed"
    """The handshake is over, and nothing follows."""


_ORDINARY_OPTIONS: tuple[type, ...] = (
    ev.ListExports,
    ev.StartTls,
    ev.InfoOption,
    ev.StructuredReplies,
    ev.ListContexts,
    ev.SetContexts,
    ev.UnknownOption,
    ev.BadOption,
)
"""Options that do not end the handshake, whatever the answer is."""
_PARTIAL_REPLIES: tuple[type, ...] = (
    ev.ExportListed,
    ev.ExportInfo,
    ev.BlockSizeInfo,
    ev.NameInfo,
    ev.OtherInfo,
    ev.ContextListed,
)
"""Replies to an option after which further ones follow."""
OPTION_ANSWERS = (State.ANSWER, State.ANSWER_GO, State.ANSWER_ABORT)
"""The states in which the server answers an option with option replies."""

TRANSITIONS: dict[tuple[State, type], State] = {
    (State.START, ev.Greeting): State.GREETED,
    (State.GREETED, ev.ClientFlags): State.OPTIONS,
    **{(State.OPTIONS, kind): State.ANSWER for kind in _ORDINARY_OPTIONS},
    (State.OPTIONS, ev.ExportName): State.ANSWER_EXPORT_NAME,
    (State.OPTIONS, ev.GoOption): State.ANSWER_GO,
    (State.OPTIONS, ev.Abort): State.ANSWER_ABORT,
    **{(state, kind): state for state in OPTION_ANSWERS for kind in _PARTIAL_REPLIES},
    **{(state, ev.OptionError): State.OPTIONS for state in OPTION_ANSWERS},
    (State.ANSWER, ev.Ack): State.OPTIONS,
    (State.ANSWER_GO, ev.Ack): State.TRANSMISSION,
    (State.ANSWER_ABORT, ev.Ack): State.CLOSED,
    (State.ANSWER_EXPORT_NAME, ev.ExportBegins): State.TRANSMISSION,
}
"""The state that follows when an event is sent or received in a state. The same table is in nbd/README.md."""


class _Handshake:
    """What both roles share: the bytes received, and the state."""

    def __init__(self) -> None:
        self.state = State.START
        self.no_zeroes = False
        """Both sides agreed on NO_ZEROES: the reply to EXPORT_NAME has no padding."""
        self._input = bytearray()

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Appends bytes from the peer to those that next_event() decodes."""
        self._input += data

    def trailing(self) -> bytes:
        """The bytes received after the last event. In state TRANSMISSION they belong to the transmission phase."""
        return bytes(self._input)

    def _peek(self, size: int) -> bytes | None:
        """The first `size` bytes, which stay where they are; None while there are fewer."""
        return bytes(self._input[:size]) if len(self._input) >= size else None

    def _take_message(self, head: int, length: int) -> bytes | None:
        """Takes a message with a header of `head` bytes and returns the `length` bytes of data after that header.

        Returns None, and takes nothing, while the message is not complete.
        """
        if len(self._input) < head + length:
            return None
        data = bytes(self._input[head : head + length])
        del self._input[: head + length]
        return data

    def _advance(self, event: object, error: type[Exception]) -> None:
        """Enters the state that follows `event`. Raises `error` if the present state does not allow it."""
        following = TRANSITIONS.get((self.state, type(event)))
        if following is None:
            raise error(f"{type(event).__name__} in state {self.state.value}")
        self.state = following


class ServerHandshake(_Handshake):
    """The server's half of a handshake: it decodes client flags and options, and encodes greeting and replies.

    An option may have `option_bytes` bytes of data and `queries` metadata queries.
    """

    FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    """What our greeting offers."""

    def __init__(self, option_bytes: int = 8 << 10, queries: int = 32) -> None:
        super().__init__()
        self._option_bytes = option_bytes
        self._queries = queries
        self.fixed = False
        """The client speaks fixed newstyle; one that does not may send EXPORT_NAME only."""

    def next_event(self) -> ev.ClientFlags | ev.ClientOption | ev.NeedData:
        """The next message of the client, or NEED_DATA. Raises ProtocolError if it cannot be decoded or is too long."""
        if self.state is State.GREETED:
            return self._decode_client_flags()
        if self.state is State.OPTIONS:
            return self._decode_client_option()
        return ev.NEED_DATA

    def _decode_client_flags(self) -> ev.ClientFlags | ev.NeedData:
        data = self._take_message(0, CLIENT_FLAGS.size)
        if data is None:
            return ev.NEED_DATA
        (flags,) = CLIENT_FLAGS.unpack(data)
        if flags & ~int(self.FLAGS):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self.fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self.no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        event = ev.ClientFlags(flags)
        self._advance(event, ProtocolError)
        return event

    def _decode_client_option(self) -> ev.ClientOption | ev.NeedData:
        head = self._peek(OPTION_HEADER.size)
        if head is None:
            return ev.NEED_DATA
        magic, option, length = OPTION_HEADER.unpack(head)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"bad option magic {magic:#x}")
        if length > self._option_bytes:
            raise ProtocolError(f"option {option} with {length} bytes of data")
        data = self._take_message(OPTION_HEADER.size, length)
        if data is None:
            return ev.NEED_DATA
        event = decode_option(option, data, self._queries)
        if not self.fixed and not isinstance(event, ev.ExportName):
            raise ProtocolError(f"option {option} from a client that does not speak fixed newstyle")
        self._advance(event, ProtocolError)
        return event

    def send(self, event: ev.Greeting | ev.HandshakeReply) -> bytes:
        """The bytes to be sent for `event`. Raises LocalProtocolError if the state does not allow it."""
        self._advance(event, LocalProtocolError)
        match event:
            case ev.Greeting(flags=flags):
                return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, flags)
            case ev.ExportBegins(size=size, flags=flags, zeroes=zeroes):
                return EXPORT_REPLY.pack(size, flags) + bytes(EXPORT_REPLY_ZEROES if zeroes else 0)
            case _:
                return encode_option_reply(event)


class ClientHandshake(_Handshake):
    """The client's half of a handshake: it decodes greeting and replies, and encodes client flags and options."""

    MAX_REPLY = 64 << 10
    """Most data of an option reply that are accepted, bytes: strings have 4096, descriptions are free text."""

    def __init__(self) -> None:
        super().__init__()
        self._option = 0
        """The Opt number of the option sent last."""

    def next_event(self) -> ev.Greeting | ev.HandshakeReply | ev.NeedData:
        """The next message of the server, or NEED_DATA. Raises ProtocolError if it cannot be decoded or is too long."""
        if self.state is State.START:
            return self._decode_greeting()
        if self.state is State.ANSWER_EXPORT_NAME:
            return self._decode_export_begins()
        if self.state in OPTION_ANSWERS:
            return self._decode_option_reply()
        return ev.NEED_DATA

    def _decode_greeting(self) -> ev.Greeting | ev.NeedData:
        head = self._peek(8)
        if head is None:
            return ev.NEED_DATA
        if int.from_bytes(head) != INIT_MAGIC:
            raise ProtocolError("this is not an NBD server")
        head = self._peek(16)
        if head is None:
            return ev.NEED_DATA
        style = int.from_bytes(head[8:])
        if style != OPTION_MAGIC:
            old = style == OLDSTYLE_MAGIC
            raise ProtocolError(
                "the NBD server speaks oldstyle only" if old else "this is not an NBD server"
            )
        data = self._take_message(0, GREETING.size)
        if data is None:
            return ev.NEED_DATA
        _, _, flags = GREETING.unpack(data)
        event = ev.Greeting(flags)
        self._advance(event, ProtocolError)
        return event

    def _decode_export_begins(self) -> ev.ExportBegins | ev.NeedData:
        padding = 0 if self.no_zeroes else EXPORT_REPLY_ZEROES
        data = self._take_message(0, EXPORT_REPLY.size + padding)
        if data is None:
            return ev.NEED_DATA
        size, flags = EXPORT_REPLY.unpack_from(data)
        event = ev.ExportBegins(size, flags, zeroes=bool(padding))
        self._advance(event, ProtocolError)
        return event

    def _decode_option_reply(self) -> ev.OptionReply | ev.NeedData:
        head = self._peek(OPTION_REPLY_HEADER.size)
        if head is None:
            return ev.NEED_DATA
        magic, option, kind, length = OPTION_REPLY_HEADER.unpack(head)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"bad option reply magic {magic:#x}")
        if option != self._option:
            raise ProtocolError(f"answer to option {option}, asked was {self._option}")
        if length > self.MAX_REPLY:
            raise ProtocolError(f"option reply of {length} bytes")
        data = self._take_message(OPTION_REPLY_HEADER.size, length)
        if data is None:
            return ev.NEED_DATA
        event = decode_option_reply(option, kind, data)
        self._advance(event, ProtocolError)
        return event

    def send(self, event: ev.ClientFlags | ev.ClientOption) -> bytes:
        """The bytes to be sent for `event`.

        Raises LocalProtocolError if the state does not allow it, ValueError for strings that the protocol does not
        allow.
        """
        data = (
            CLIENT_FLAGS.pack(event.flags)
            if isinstance(event, ev.ClientFlags)
            else encode_option(event)
        )
        self._advance(event, LocalProtocolError)
        if isinstance(event, ev.ClientFlags):
            self.no_zeroes = bool(event.flags & HandshakeFlag.NO_ZEROES)
        else:
            self._option = option_number(event)
        return data
