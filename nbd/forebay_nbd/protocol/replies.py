"""The client's half of the transmission phase without I/O: bytes in, replies out (requests.encode_request is the rest).

The reader knows which requests are out, since only they say how long a simple reply is and where data belong. A READ's
data land in the memory given with the request, long ones without being copied on the way.
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
"""Data up to this many bytes wait in the receive buffer until complete; of longer ones the rest goes to its place."""
_CAPACITY = _IN_PLACE + (16 << 10)
"""Bytes received before it is known where they belong, and so copied once more: as few as hold the longest of those."""
_MAX_ERROR = ERROR_BODY.size + MAX_STRING + U64.size
_MAX_STATUS = U32.size + EXTENT.size * MAX_EXTENTS


@dataclass(slots=True)
class _Pending:
    """A request that is out. `covered` are the answered parts of a READ, [start, end) in bytes, sorted."""

    request: Request
    sink: memoryview
    covered: list[tuple[int, int]] = field(default_factory=list)
    failed: bool = False
    described: bool = False

    def cover(self, offset: int, length: int) -> memoryview:
        """Marks a part as answered and returns its place. Raises ProtocolError outside or twice."""
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
        """Raises ProtocolError if a reply ends without having said everything."""
        if self.failed:
            return
        if self.request.command == Cmd.READ:
            if sum(stop - start for start, stop in self.covered) != self.request.length:
                raise ProtocolError("a READ's reply ends without all of its content")
        elif self.request.command == Cmd.BLOCK_STATUS and not self.described:
            raise ProtocolError("a BLOCK_STATUS reply without an extent")


class ReplyReader(ReceiveBuffer):
    """Replies from bytes. `structured`: agreed on in the handshake."""

    def __init__(self, structured: bool, capacity: int = _CAPACITY) -> None:
        super().__init__(capacity)
        self._structured = structured
        self._pending: dict[int, _Pending] = {}
        self._body = bytearray()
        self._arriving: Reply | None = None

    def expect(self, request: Request, sink: memoryview | None = None) -> None:
        """The request is out; a READ's data go to `sink`, `length` bytes of writable memory."""
        assert request.cookie not in self._pending, "cookie in use"
        if sink is None:
            sink = memoryview(bytearray(request.length if request.command == Cmd.READ else 0))
        self._pending[request.cookie] = _Pending(request, sink)

    def next_event(self) -> Reply | NeedData:
        """The next reply or chunk. Raises ProtocolError where the server cannot be believed any more."""
        if self._arriving is not None:
            if not self._hit():
                return NEED_DATA
            event, self._arriving = self._arriving, None
            return self._finished(event)
        have = self.end - self.start
        if have < SIMPLE_REPLY.size:
            return self._more(SIMPLE_REPLY.size)
        (magic,) = U32.unpack_from(self.view, self.start)
        if magic == SIMPLE_REPLY_MAGIC:
            return self._simple()
        if magic != STRUCTURED_REPLY_MAGIC or not self._structured:
            raise ProtocolError(f"bad reply magic {magic:#x}")
        if have < CHUNK_HEADER.size:
            return self._more(CHUNK_HEADER.size)
        return self._chunk()

    def _more(self, needed: int) -> NeedData:
        self._make_room(needed)
        return NEED_DATA

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolError("a reply to no request")
        return pending

    # --- simple replies ---------------------------------------------------------------------
    def _simple(self) -> Reply | NeedData:
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
            return self._finished(SimpleReply(cookie, error))
        place = pending.cover(request.offset, request.length)
        return self._content(SIMPLE_REPLY.size, place, SimpleReply(cookie, 0, place))

    # --- chunks ------------------------------------------------------------------------------
    def _chunk(self) -> Reply | NeedData:
        _, flags, kind, cookie, length = CHUNK_HEADER.unpack_from(self.view, self.start)
        pending, done = self._find(cookie), bool(flags & CHUNK_DONE)
        if kind == Chunk.OFFSET_DATA:
            return self._data_chunk(pending, length, done)
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
        return self._finished(self._short_chunk(kind, pending, body, done))

    def _take_body(self, length: int) -> bytes | None:
        """The `length` bytes after a chunk's header, once they are all there; they may exceed the buffer."""
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
        """A block status may be 8 MiB long; such a server pays with our memory once, not per reply."""
        view = memoryview(bytearray(needed))
        have = self.end - self.start
        view[:have] = self.view[self.start : self.end]
        self.view, self.start, self.end = view, 0, have

    def _data_chunk(self, pending: _Pending, length: int, done: bool) -> Reply | NeedData:
        head = CHUNK_HEADER.size + U64.size
        size = length - U64.size
        if size <= 0 or size > pending.request.length:
            raise ProtocolError(f"data chunk with {length} bytes")
        if self.end - self.start < head:
            return self._more(head)
        (offset,) = U64.unpack_from(self.view, self.start + CHUNK_HEADER.size)
        have = self.end - self.start - head
        if have < size <= _IN_PLACE:
            return self._more(head + size)
        place = pending.cover(offset, size)
        return self._content(head, place, DataChunk(pending.request.cookie, offset, place, done))

    def _content(self, head: int, place: memoryview, event: Reply) -> Reply | NeedData:
        """`place` is filled by what follows the `head` bytes of the message; then `event` is ready."""
        self.start += head
        if self.end - self.start >= len(place):
            place[:] = self.view[self.start : self.start + len(place)]
            self.start += len(place)
            return self._finished(event)
        self._aim(place)
        self._arriving = event
        return NEED_DATA

    def _short_chunk(self, kind: int, pending: _Pending, body: bytes, done: bool) -> Reply:
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
            return self._status(pending, body, done)
        pending.failed = True
        return _error(kind, cookie, body, done)

    def _status(self, pending: _Pending, body: bytes, done: bool) -> Reply:
        if pending.request.command != Cmd.BLOCK_STATUS:
            raise ProtocolError("extents for a request that is not BLOCK_STATUS")
        if len(body) < U32.size + EXTENT.size or (len(body) - U32.size) % EXTENT.size:
            raise ProtocolError(f"extents in {len(body)} bytes")
        extents = tuple(EXTENT.iter_unpack(body[U32.size :]))
        if not all(length for length, _ in extents):
            raise ProtocolError("an extent of no bytes")
        pending.described = True
        return StatusChunk(pending.request.cookie, U32.unpack_from(body)[0], extents, done)

    def _finished(self, event: Reply) -> Reply:
        """Forgets the request where this was the end of its reply."""
        if isinstance(event, (SimpleReply, NoneChunk)) or event.done:
            self._pending.pop(event.cookie).check_complete()
        return event


def _error(kind: int, cookie: int, body: bytes, done: bool) -> ErrorChunk:
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
