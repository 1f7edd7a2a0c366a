"""The handshake without I/O, one class per role: bytes in, events out; events in, bytes out.

Fixed newstyle only ("Fixed newstyle negotiation"). Both classes walk the same states; an event that TRANSITIONS does
not know in the present state is the peer's fault when it was received (ProtocolError) and ours when it was to be
sent (LocalProtocolError).
"""

import enum

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.options import (
    decode_option,
    decode_option_reply,
    encode_option,
    encode_option_reply,
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
    """Our own code wanted to say something out of turn: a bug here, not the peer's fault."""


class State(enum.Enum):
    """Where a handshake stands. Both sides go through the same states."""

    START = "start"  # nothing said
    GREETED = "greeted"  # the server has spoken
    OPTIONS = "options"  # the client's turn: it may send an option
    ANSWER = "answer"  # the server's turn: it answers the option
    TRANSMISSION = "transmission"
    CLOSED = "closed"


_OPTION_EVENTS: tuple[type, ...] = (
    ev.ExportName,
    ev.Abort,
    ev.ListExports,
    ev.StartTls,
    ev.InfoOption,
    ev.GoOption,
    ev.StructuredReplies,
    ev.ListContexts,
    ev.SetContexts,
    ev.UnknownOption,
    ev.BadOption,
)
_PARTIAL_REPLIES: tuple[type, ...] = (
    ev.ExportListed,
    ev.ExportInfo,
    ev.BlockSizeInfo,
    ev.NameInfo,
    ev.OtherInfo,
    ev.ContextListed,
)

TRANSITIONS: dict[tuple[State, type], State] = {
    (State.START, ev.Greeting): State.GREETED,
    (State.GREETED, ev.ClientFlags): State.OPTIONS,
    **{(State.OPTIONS, kind): State.ANSWER for kind in _OPTION_EVENTS},
    **{(State.ANSWER, kind): State.ANSWER for kind in _PARTIAL_REPLIES},
    (State.ANSWER, ev.Ack): State.OPTIONS,
    (State.ANSWER, ev.OptionError): State.OPTIONS,
    (State.ANSWER, ev.ExportBegins): State.TRANSMISSION,
}
_AFTER_ACK = {ev.GoOption: State.TRANSMISSION, ev.Abort: State.CLOSED}
"""Options whose Ack ends the haggling."""


class _Handshake:
    """What both roles share: the input buffer, the state, the option under discussion."""

    def __init__(self) -> None:
        self.state = State.START
        self.no_zeroes = False
        self._input = bytearray()
        self._option: type | None = None

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes from the peer."""
        self._input += data

    def trailing(self) -> bytes:
        """What came after the last event; belongs to the transmission phase once that has begun."""
        return bytes(self._input)

    def _peek(self, size: int) -> bytes | None:
        return bytes(self._input[:size]) if len(self._input) >= size else None

    def _drop(self, size: int) -> None:
        del self._input[:size]

    def _message(self, head: int, length: int) -> bytes | None:
        """The data of a message of `head` + `length` bytes, taken from the input once it is complete."""
        if len(self._input) < head + length:
            return None
        data = bytes(self._input[head : head + length])
        self._drop(head + length)
        return data

    def _step(self, event: object, error: type[Exception]) -> None:
        after = TRANSITIONS.get((self.state, type(event)))
        if after is None:
            raise error(f"{type(event).__name__} in state {self.state.value}")
        if after is State.ANSWER and self.state is State.OPTIONS:
            self._option = type(event)
        if isinstance(event, ev.Ack) and self._option is not None:
            after = _AFTER_ACK.get(self._option, after)
        if isinstance(event, ev.ExportBegins) and self._option is not ev.ExportName:
            raise error("an export begins without EXPORT_NAME")
        self.state = after


class ServerHandshake(_Handshake):
    """The server's half.

    `option_bytes` and `queries` bound one option's data and its metadata queries.
    """

    FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES

    def __init__(self, option_bytes: int = 8 << 10, queries: int = 32) -> None:
        super().__init__()
        self._option_bytes = option_bytes
        self._queries = queries
        self.fixed = False

    def next_event(self) -> ev.ClientFlags | ev.ClientOption | ev.NeedData:
        """The next thing the client said. Raises ProtocolError if it made no sense."""
        if self.state is State.GREETED:
            return self._client_flags()
        if self.state is State.OPTIONS:
            return self._client_option()
        return ev.NEED_DATA

    def _client_flags(self) -> ev.ClientFlags | ev.NeedData:
        data = self._message(0, CLIENT_FLAGS.size)
        if data is None:
            return ev.NEED_DATA
        (flags,) = CLIENT_FLAGS.unpack(data)
        if flags & ~int(self.FLAGS):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self.fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self.no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        event = ev.ClientFlags(flags)
        self._step(event, ProtocolError)
        return event

    def _client_option(self) -> ev.ClientOption | ev.NeedData:
        head = self._peek(OPTION_HEADER.size)
        if head is None:
            return ev.NEED_DATA
        magic, option, length = OPTION_HEADER.unpack(head)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"bad option magic {magic:#x}")
        if length > self._option_bytes:
            raise ProtocolError(f"option {option} with {length} bytes of data")
        data = self._message(OPTION_HEADER.size, length)
        if data is None:
            return ev.NEED_DATA
        event = decode_option(option, data, self._queries)
        if not self.fixed and not isinstance(event, ev.ExportName):
            raise ProtocolError(f"option {option} from a client that does not speak fixed newstyle")
        self._step(event, ProtocolError)
        return event

    def send(self, event: ev.Greeting | ev.OptionReply | ev.ExportBegins) -> bytes:
        """The bytes that say `event`. Raises LocalProtocolError if it is not our turn to say it."""
        self._step(event, LocalProtocolError)
        match event:
            case ev.Greeting(flags=flags):
                return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, flags)
            case ev.ExportBegins(size=size, flags=flags, zeroes=zeroes):
                return EXPORT_REPLY.pack(size, flags) + bytes(EXPORT_REPLY_ZEROES if zeroes else 0)
            case _:
                return encode_option_reply(event)


class ClientHandshake(_Handshake):
    """The client's half."""

    MAX_REPLY = 64 << 10
    """Longest reply to an option we read, bytes: strings have 4096, descriptions are free text."""

    def __init__(self) -> None:
        super().__init__()
        self._number = 0

    def next_event(self) -> ev.Greeting | ev.OptionReply | ev.ExportBegins | ev.NeedData:
        """The next thing the server said. Raises ProtocolError if it made no sense."""
        if self.state is State.START:
            return self._greeting()
        if self.state is not State.ANSWER:
            return ev.NEED_DATA
        if self._option is ev.ExportName:
            return self._export_begins()
        return self._option_reply()

    def _greeting(self) -> ev.Greeting | ev.NeedData:
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
        data = self._message(0, GREETING.size)
        if data is None:
            return ev.NEED_DATA
        _, _, flags = GREETING.unpack(data)
        event = ev.Greeting(flags)
        self._step(event, ProtocolError)
        return event

    def _export_begins(self) -> ev.ExportBegins | ev.NeedData:
        padding = 0 if self.no_zeroes else EXPORT_REPLY_ZEROES
        data = self._message(0, EXPORT_REPLY.size + padding)
        if data is None:
            return ev.NEED_DATA
        size, flags = EXPORT_REPLY.unpack_from(data)
        event = ev.ExportBegins(size, flags, zeroes=bool(padding))
        self._step(event, ProtocolError)
        return event

    def _option_reply(self) -> ev.OptionReply | ev.NeedData:
        head = self._peek(OPTION_REPLY_HEADER.size)
        if head is None:
            return ev.NEED_DATA
        magic, option, kind, length = OPTION_REPLY_HEADER.unpack(head)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"bad option reply magic {magic:#x}")
        if option != self._number:
            raise ProtocolError(f"answer to option {option}, asked was {self._number}")
        if length > self.MAX_REPLY:
            raise ProtocolError(f"option reply of {length} bytes")
        data = self._message(OPTION_REPLY_HEADER.size, length)
        if data is None:
            return ev.NEED_DATA
        event = decode_option_reply(option, kind, data)
        self._step(event, ProtocolError)
        return event

    def send(self, event: ev.ClientFlags | ev.ClientOption) -> bytes:
        """The bytes that say `event`. Raises LocalProtocolError out of turn, ValueError for impossible strings."""
        data = (
            CLIENT_FLAGS.pack(event.flags)
            if isinstance(event, ev.ClientFlags)
            else encode_option(event)
        )
        self._step(event, LocalProtocolError)
        if isinstance(event, ev.ClientFlags):
            self.no_zeroes = bool(event.flags & HandshakeFlag.NO_ZEROES)
        else:
            self._number = int.from_bytes(data[8:12])
        return data
