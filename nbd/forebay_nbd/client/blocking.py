# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A blocking NBD client, for threads: one connection, one request at a time."""

import errno
import os
import socket
from collections.abc import Sequence

from forebay_nbd.client.connecting import MAX_REPLIES
from forebay_nbd.client.negotiation import ClientMessage, Negotiated, Replies, negotiate
from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.handshake import ClientHandshake
from forebay_nbd.protocol.replies import ReplyReader
from forebay_nbd.protocol.requests import encode_request
from forebay_nbd.protocol.wire import (
    BASE_ALLOCATION,
    Buffer,
    Cmd,
    CmdFlag,
    ProtocolError,
    local_errno,
    remaining,
)


class BlockingClient:
    """A connection to one export, made over a connected socket. Offsets and lengths are bytes, inside the export.

    Every method blocks for as long as the server takes, and raises OSError: that of the server, or ConnectionError once
    the connection is of no use any more.
    """

    def __init__(self, sock: socket.socket, export: str = "") -> None:
        """Do the handshake on the socket, and take it over. Raises OSError; the socket is closed then."""
        self._sock = sock
        self._cookie = 0
        try:
            self.negotiated, early = _handshake(sock, export)
        except ProtocolError as exc:
            sock.close()
            raise ConnectionError(errno.EPROTO, str(exc)) from exc
        except BaseException:
            sock.close()
            raise
        self._reader = ReplyReader(self.negotiated.structured)
        self._reader.feed(early)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Read len(view) bytes into `view`."""
        self._request(Cmd.READ, offset, len(view), sink=view)

    def write(self, offset: int, data: Sequence[Buffer]) -> None:
        """Write the buffers one after the other. Not durable before `flush`."""
        length = sum(memoryview(one).nbytes for one in data)
        self._request(Cmd.WRITE, offset, length, payload=data)

    def zero(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Have a range read as zeros; with `no_hole` it has space then."""
        flags = CmdFlag.NO_HOLE if no_hole else CmdFlag(0)
        self._request(Cmd.WRITE_ZEROES, offset, length, flags)

    def flush(self) -> None:
        """Make durable all that was written before, by whichever connection."""
        self._request(Cmd.FLUSH, 0, 0)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The extents (length, flags of base:allocation) from `offset` on, at least one. They may cover any length."""
        found: list[tuple[int, int]] = []
        for event in self._request(Cmd.BLOCK_STATUS, offset, length):
            if isinstance(event, ev.StatusChunk):
                found = list(event.extents)
        return found

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _request(
        self,
        command: Cmd,
        offset: int,
        length: int,
        flags: CmdFlag | None = None,
        payload: Sequence[Buffer] = (),
        sink: memoryview | None = None,
    ) -> list[ev.Reply]:
        """Send a request, and return all of its reply. Raises OSError."""
        self._cookie += 1
        request = ev.Request(command, flags or CmdFlag(0), self._cookie, offset, length)
        self._reader.expect(request, sink)
        try:
            buffers: list[Buffer] = [*encode_request(request), *payload]
            while buffers:
                buffers = remaining(buffers, self._sock.sendmsg(buffers))
            replies = self._receive()
        except ProtocolError as exc:
            self.close()
            raise ConnectionError(errno.EPROTO, f"the server broke the protocol: {exc}") from exc
        for reply in replies:
            _check(reply)
        return replies

    def _receive(self) -> list[ev.Reply]:
        """All chunks of the next reply. Raises OSError, ProtocolError."""
        replies: list[ev.Reply] = []
        while True:
            event = self._reader.next_event()
            if isinstance(event, ev.NeedData):
                count = self._sock.recv_into(self._reader.space())
                if not count:
                    raise _hung_up()
                self._reader.received(count)
                continue
            replies.append(event)
            if isinstance(event, (ev.SimpleReply, ev.NoneChunk)) or event.done:
                return replies


def _check(reply: ev.Reply) -> None:
    """Raise the OSError that a reply, or a chunk of one, stands for."""
    if isinstance(reply, (ev.SimpleReply, ev.ErrorChunk)) and reply.error:
        number = local_errno(reply.error)
        said = reply.text if isinstance(reply, ev.ErrorChunk) else ""
        raise OSError(number, said or os.strerror(number))


def _hung_up() -> ConnectionError:
    return ConnectionError(errno.ECONNRESET, "the server closed the connection")


def _handshake(sock: socket.socket, export: str) -> tuple[Negotiated, bytes]:
    """What was agreed on, and bytes that came after that. Raises OSError, ProtocolError."""
    handshake = ClientHandshake()
    greeting = _next(sock, handshake)
    if not isinstance(greeting, ev.Greeting):
        raise ProtocolError("no greeting")
    negotiation = negotiate(greeting, export, (BASE_ALLOCATION,), block_sizes=False)
    message: ClientMessage = next(negotiation)
    while True:
        sock.sendall(handshake.send(message))
        replies: Replies = []
        while not isinstance(message, ev.ClientFlags) and not _is_complete(replies):
            reply = _next(sock, handshake)
            assert not isinstance(reply, ev.Greeting)
            replies.append(reply)
            if len(replies) > MAX_REPLIES:
                raise ProtocolError(f"more than {MAX_REPLIES} replies to one option")
        try:
            message = negotiation.send(replies)
        except StopIteration as stop:
            negotiated: Negotiated = stop.value
            return negotiated, handshake.trailing()


def _is_complete(replies: Replies) -> bool:
    """True if no further reply to the option follows these."""
    return bool(replies) and isinstance(replies[-1], (ev.Ack, ev.OptionError, ev.ExportBegins))


def _next(sock: socket.socket, handshake: ClientHandshake) -> ev.Greeting | ev.HandshakeReply:
    """The server's next message. Raises OSError, ProtocolError."""
    while isinstance(event := handshake.next_event(), ev.NeedData):
        data = sock.recv(4096)
        if not data:
            raise _hung_up()
        handshake.receive(data)
    return event
