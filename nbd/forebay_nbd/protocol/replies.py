# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The client's half of the transmission phase without I/O: decoding replies.

requests.encode_request() encodes what they answer. The reader is told of each request, because the request determines
how long a simple reply is, and where data are to be put. The data of a READ are put into memory that the client gave
with the request; long data are received there.
"""

import bisect
from dataclasses import dataclass, field

from forebay_nbd.protocol.events import (
    NEED_DATA,
    DataChunk,
    ErrorChunk,
    HoleChunk,
    NeedData,
    NoneChunk,
    Reply,
    Request,
    SimpleReply,
    StatusChunk,
)
from forebay_nbd.protocol.receive import ReceiveBuffer
from forebay_nbd.protocol.wire import (
    CHUNK_DONE,
    CHUNK_ERROR_BIT,
    CHUNK_HEADER,
    ERROR_BODY,
    EXTENT,
    HOLE_BODY,
    MAX_EXTENTS,
    MAX_STRING,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U64,
    Chunk,
    Cmd,
    ProtocolError,
)

_IN_PLACE = 64 << 10
"""Data of up to so many bytes are received into the buffer until complete; longer ones are received to where they
belong, but for what the buffer has of them already."""
_CAPACITY = _IN_PLACE + (16 << 10)
"""Bytes of the receive buffer. Data that are received into it are copied once more, so it is no larger than needed."""
_MAX_ERROR = ERROR_BODY.size + MAX_STRING + U64.size
"""Longest payload of an error chunk that is accepted, bytes."""
_MAX_STATUS = U32.size + EXTENT.size * MAX_EXTENTS
"""Longest payload of a BLOCK_STATUS chunk that is accepted, bytes."""


@dataclass(slots=True)
class _Pending:
    """A request whose reply has not come to its end."""

    request: Request
    sink: memoryview
    """Where the data of a READ are put: as many bytes as it asks for."""
    covered: list[tuple[int, int]] = field(default_factory=list)
    """The parts of a READ that have been answered, as [start, end) on the export, in bytes, sorted."""
    failed: bool = False
    """An error has come."""
    described: bool = False
    """Extents have come."""

    def cover(self, offset: int, length: int) -> memoryview:
        """Marks a part of a READ as answered, and returns its place in `sink`.

        Raises ProtocolError if the request is no READ, or the part lies outside it or was answered before.
        """
        r, stop = self.request, offset + length
        if r.command != Cmd.READ:
            raise ProtocolError("content for a request that is not a READ")
        if not length or offset < r.offset or stop > r.offset + r.length:
            raise ProtocolError("content outside the request")
        at = bisect.bisect(self.covered, (offset, stop))
        if at and self.covered[at - 1][1] > offset:
            raise ProtocolError("content sent twice")
        if at < len(self.covered) and self.covered[at][0] < stop:
            raise ProtocolError("content sent twice")
        self.covered.insert(at, (offset, stop))
        return self.sink[offset - r.offset : stop - r.offset]

    def check_complete(self) -> None:
        """Raises ProtocolError if a reply that says success ends without all data of a READ, or without any extent."""
        if self.failed:
            return
        if self.request.command == Cmd.READ:
            if sum(stop - start for start, stop in self.covered) != self.request.length:
                raise ProtocolError("a READ's reply ends without all of its content")
        elif self.request.command == Cmd.BLOCK_STATUS and not self.described:
            raise ProtocolError("a BLOCK_STATUS reply without an extent")


class ReplyReader(ReceiveBuffer):
    """Decodes replies. `structured` says whether structured replies were agreed on in the handshake."""

    def __init__(self, structured: bool, capacity: int = _CAPACITY) -> None:
        super().__init__(capacity)
        self._structured = structured
        self._pending: dict[int, _Pending] = {}
        self._body = bytearray()
        self._arriving: Reply | None = None

    def expect(self, request: Request, sink: memoryview | None = None) -> None:
        """Tells the reader of a request, before it is sent. The data of a READ are put into `sink`, which is as long.

        Without a `sink` they can be had from the events only. The cookie must not be that of a request without a reply.
        """
        assert request.cookie not in self._pending, "cookie in use"
        if sink is None:
            sink = memoryview(bytearray(request.length if request.command == Cmd.READ else 0))
        self._pending[request.cookie] = _Pending(request, sink)

    def next_event(self) -> Reply | NeedData:
        """The next simple reply or chunk, or NEED_DATA.

        Raises ProtocolError for anything that the protocol does not allow in reply to the requests that were sent.
        """
        if self._arriving is not None:
            if not self._finish_target():
                return NEED_DATA
            event, self._arriving = self._arriving, None
            return self._finish(event)
        have = self.end - self.start
        if have < SIMPLE_REPLY.size:
            return self._need(SIMPLE_REPLY.size)
        (magic,) = U32.unpack_from(self.view, self.start)
        if magic == SIMPLE_REPLY_MAGIC:
            return self._decode_simple()
        if magic != STRUCTURED_REPLY_MAGIC or not self._structured:
            raise ProtocolError(f"bad reply magic {magic:#x}")
        if have < CHUNK_HEADER.size:
            return self._need(CHUNK_HEADER.size)
        return self._decode_chunk()

    def _need(self, needed: int) -> NeedData:
        """NEED_DATA, because a message of `needed` bytes is not complete."""
        self._make_room(needed)
        return NEED_DATA

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolError("a reply to no request")
        return pending

    # --- simple replies ---------------------------------------------------------------------
    def _decode_simple(self) -> Reply | NeedData:
        _, error, cookie = SIMPLE_REPLY.unpack_from(self.view, self.start)
        pending = self._find(cookie)
        request = pending.request
        if error:
            pending.failed = True
        elif request.command == Cmd.BLOCK_STATUS or (
            request.command == Cmd.READ and self._structured
        ):
            raise ProtocolError("a simple reply where a structured one is due")
        if error or request.command != Cmd.READ or not request.length:
            self.start += SIMPLE_REPLY.size
            return self._finish(SimpleReply(cookie, error))
        place = pending.cover(request.offset, request.length)
        return self._fill(SIMPLE_REPLY.size, place, SimpleReply(cookie, 0, place))

    # --- chunks ------------------------------------------------------------------------------
    def _decode_chunk(self) -> Reply | NeedData:
        _, flags, kind, cookie, length = CHUNK_HEADER.unpack_from(self.view, self.start)
        pending, done = self._find(cookie), bool(flags & CHUNK_DONE)
        if kind == Chunk.OFFSET_DATA:
            return self._decode_data_chunk(pending, length, done)
        most = {
            Chunk.NONE: 0,
            Chunk.OFFSET_HOLE: HOLE_BODY.size,
            Chunk.BLOCK_STATUS: _MAX_STATUS,
        }.get(kind, _MAX_ERROR if kind & CHUNK_ERROR_BIT else -1)
        if length > most:
            raise ProtocolError(f"chunk of type {kind} with {length} bytes")
        body = self._take_body(length)
        if body is None:
            return NEED_DATA
        return self._finish(self._decode_short_chunk(kind, pending, body, done))

    def _take_body(self, length: int) -> bytes | None:
        """The `length` bytes after a chunk's header, taken once all of them are there; None before that."""
        whole = CHUNK_HEADER.size + length
        if whole > len(self.view):
            self._grow(whole)
        if self.end - self.start < whole:
            self._make_room(whole)
            return None
        body = bytes(self.view[self.start + CHUNK_HEADER.size : self.start + whole])
        self.start += whole
        return body

    def _grow(self, needed: int) -> None:
        """Makes the buffer `needed` bytes long, for good: a BLOCK_STATUS chunk may have 8 MiB."""
        view = memoryview(bytearray(needed))
        have = self.end - self.start
        view[:have] = self.view[self.start : self.end]
        self.view, self.start, self.end = view, 0, have

    def _decode_data_chunk(self, pending: _Pending, length: int, done: bool) -> Reply | NeedData:
        head = CHUNK_HEADER.size + U64.size
        size = length - U64.size
        if size <= 0 or size > pending.request.length:
            raise ProtocolError(f"data chunk with {length} bytes")
        if self.end - self.start < head:
            return self._need(head)
        (offset,) = U64.unpack_from(self.view, self.start + CHUNK_HEADER.size)
        have = self.end - self.start - head
        if have < size <= _IN_PLACE:
            return self._need(head + size)
        place = pending.cover(offset, size)
        return self._fill(head, place, DataChunk(pending.request.cookie, offset, place, done))

    def _fill(self, head: int, place: memoryview, event: Reply) -> Reply | NeedData:
        """Fills `place` with what follows the header of `head` bytes; once it is full, returns `event`."""
        self.start += head
        if self.end - self.start >= len(place):
            place[:] = self.view[self.start : self.start + len(place)]
            self.start += len(place)
            return self._finish(event)
        self._set_target(place)
        self._arriving = event
        return NEED_DATA

    def _decode_short_chunk(self, kind: int, pending: _Pending, body: bytes, done: bool) -> Reply:
        cookie = pending.request.cookie
        if kind == Chunk.NONE:
            if not done:
                raise ProtocolError("an empty chunk that is not the last")
            return NoneChunk(cookie)
        if kind == Chunk.OFFSET_HOLE:
            if len(body) != HOLE_BODY.size:
                raise ProtocolError(f"hole chunk with {len(body)} bytes")
            offset, length = HOLE_BODY.unpack(body)
            pending.cover(offset, length)[:] = bytes(length)
            return HoleChunk(cookie, offset, length, done)
        if kind == Chunk.BLOCK_STATUS:
            return self._decode_status(pending, body, done)
        pending.failed = True
        return _decode_error(kind, cookie, body, done)

    def _decode_status(self, pending: _Pending, body: bytes, done: bool) -> Reply:
        if pending.request.command != Cmd.BLOCK_STATUS:
            raise ProtocolError("extents for a request that is not BLOCK_STATUS")
        if len(body) < U32.size + EXTENT.size or (len(body) - U32.size) % EXTENT.size:
            raise ProtocolError(f"extents in {len(body)} bytes")
        extents = tuple(EXTENT.iter_unpack(body[U32.size :]))
        if not all(length for length, _ in extents):
            raise ProtocolError("an extent of no bytes")
        pending.described = True
        return StatusChunk(pending.request.cookie, U32.unpack_from(body)[0], extents, done)

    def _finish(self, event: Reply) -> Reply:
        """Returns `event`. If it ends the reply, checks that and forgets the request. Raises ProtocolError."""
        if isinstance(event, (SimpleReply, NoneChunk)) or event.done:
            self._pending.pop(event.cookie).check_complete()
        return event


def _decode_error(kind: int, cookie: int, body: bytes, done: bool) -> ErrorChunk:
    """The event for the payload `body` of an error chunk. Raises ProtocolError if it cannot be decoded."""
    if len(body) < ERROR_BODY.size:
        raise ProtocolError(f"error chunk with {len(body)} bytes")
    code, size = ERROR_BODY.unpack_from(body)
    rest = body[ERROR_BODY.size :]
    if size > len(rest):
        raise ProtocolError("an error text longer than its chunk")
    if not code:
        raise ProtocolError("an error without a number")
    text = rest[:size].decode(errors="replace")
    offset = None
    if kind == Chunk.ERROR_OFFSET:
        if len(rest) != size + U64.size:
            raise ProtocolError(f"error chunk with {len(body)} bytes")
        (offset,) = U64.unpack(rest[size:])
    return ErrorChunk(cookie, code, text, offset, done)
