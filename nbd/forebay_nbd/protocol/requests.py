# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The server's half of the transmission phase without I/O: decoding and checking requests, encoding replies.

RequestReader owns the memory that requests are received into, so that payloads are not copied: the server receives into
space(), reports with received() how many bytes came, and takes requests from next_event(). The headers of a run of
requests can be taken as tuples from headers(), without an object for each, which makes deep queues of reads cheap.
"""

import errno
import mmap
from collections.abc import Iterator

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
    CHUNK_HEADER,
    ERROR_BODY,
    EXTENT,
    HOLE_BODY,
    MAX_PAYLOAD,
    REQUEST,
    REQUEST_FAST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U64,
    Buffer,
    Chunk,
    Cmd,
    CmdFlag,
    ProtocolError,
    RequestError,
    clipped,
)

_HEADER = REQUEST.size
_MAP_FROM = 8 << 20
"""Payloads of so many bytes or more are received into an anonymous map of their own: see _payload_memory()."""
MAX_TEXT = 256
"""Longest text of an error reply that is sent, bytes."""


class RequestReader(ReceiveBuffer):
    """Decodes requests.

    The receive buffer has `capacity` bytes. Payloads of up to `in_place` bytes are handed out as parts of it; each
    longer one is received into memory of its own, which belongs to its request.
    """

    def __init__(self, capacity: int = 256 << 10, in_place: int = 128 << 10) -> None:
        if capacity < in_place + _HEADER:
            raise ValueError("the receive buffer has to hold a request with its payload")
        super().__init__(capacity)
        self._in_place = in_place
        self._large: Request | None = None

    def large_payload(self) -> int:
        """The length in bytes of the payload that is being received into memory of its own, or 0."""
        return 0 if self._large is None else self._large.length

    def unparsed(self) -> bytes:
        """The bytes received and not handed out as a request; a reader that is fed them goes on from there."""
        if self._large is None:
            return bytes(self.view[self.start : self.end])
        return b"".join(encode_request(self._large))[: _HEADER + self._filled]

    def headers(self, most: int) -> Iterator[tuple[int, bytes, int, int]]:
        """The received bytes as up to `most` headers: (magic flags type, cookie, offset, length), as in REQUEST_FAST.

        They are headers only up to and including the first that is a WRITE or has a wrong magic. They are not taken
        until skip() is called.
        """
        count = min((self.end - self.start) // _HEADER, most)
        return REQUEST_FAST.iter_unpack(self.view[self.start : self.start + count * _HEADER])

    def skip(self, count: int) -> None:
        """Takes the first `count` of headers()."""
        self.start += count * _HEADER

    def next_event(self) -> Request | NeedData:
        """The next request with its whole payload, or NEED_DATA.

        Raises ProtocolError for a wrong magic, and for a WRITE of more than MAX_PAYLOAD bytes.
        """
        if self._large is not None:
            return self._finish_large()
        if self.end - self.start < _HEADER:
            self._make_room(_HEADER)
            return NEED_DATA
        magic, flags, command, cookie, offset, length = REQUEST.unpack_from(self.view, self.start)
        if magic != REQUEST_MAGIC:
            raise ProtocolError(f"bad request magic {magic:#x}")
        request = Request(command, flags, cookie, offset, length)
        if command != Cmd.WRITE:
            self.start += _HEADER
            return request
        if length > MAX_PAYLOAD:
            raise ProtocolError(f"WRITE of {length} bytes")
        return self._with_payload(request)

    def _with_payload(self, request: Request) -> Request | NeedData:
        whole = _HEADER + request.length
        if self.end - self.start >= whole:
            request.payload = self.view[self.start + _HEADER : self.start + whole]
            self.start += whole
            return request
        if request.length <= self._in_place:
            self._make_room(whole)
            return NEED_DATA
        payload = _payload_memory(request.length)
        request.payload, request.owned = payload, True
        self._large = request
        self.start += _HEADER
        self._set_target(payload)
        return NEED_DATA

    def _finish_large(self) -> Request | NeedData:
        request = self._large
        if request is None or not self._finish_target():
            return NEED_DATA
        self._large = None
        return request


def _payload_memory(length: int) -> memoryview:
    """`length` bytes of writable memory for a payload.

    From _MAP_FROM bytes on it is an anonymous map, of which pages exist only where data have arrived: a client that
    announces 32 MiB and sends nothing costs neither memory nor the time to clear it. For less, a map is slower.
    """
    if length < _MAP_FROM:
        return memoryview(bytearray(length))
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def encode_request(request: Request) -> list[Buffer]:
    """The buffers to be sent for a request: its header, then the payload, if any, which is not copied."""
    r = request
    head = REQUEST.pack(REQUEST_MAGIC, r.flags, r.command, r.cookie, r.offset, r.length)
    return [head, r.payload] if len(r.payload) else [head]


# --- checking ----------------------------------------------------------------------
_ALLOWED_FLAGS = {
    Cmd.READ: CmdFlag.DF,
    Cmd.WRITE: CmdFlag(0),
    Cmd.FLUSH: CmdFlag(0),
    Cmd.TRIM: CmdFlag(0),
    Cmd.CACHE: CmdFlag(0),
    Cmd.WRITE_ZEROES: CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.REQ_ONE,
}
"""The commands that the server knows, each with its flags beside FUA, which "the server MUST accept" with all of
them."""
_WRITING = frozenset((Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES))


def check_request(
    request: Request, size: int, read_only: bool, structured: bool, contexts: bool
) -> None:
    """Raises RequestError unless the request may be carried out on an export of `size` bytes.

    `structured` says whether structured replies were agreed on, `contexts` whether a metadata context was selected. A
    request that has passed is not checked again by anybody.
    """
    command = request.command
    flags = request.flags & ~int(
        CmdFlag.FUA
    )  # the complement of an IntFlag has its known bits only
    allowed = _ALLOWED_FLAGS.get(command)  # type: ignore[call-overload]
    if allowed is None:
        raise RequestError(errno.EINVAL, "unknown command")
    if flags & ~int(allowed) or (flags & CmdFlag.DF and not structured):
        raise RequestError(errno.EINVAL, "flag not valid with this command")
    if command in _WRITING and read_only:
        raise RequestError(errno.EPERM, "the export is read-only")
    if command == Cmd.FLUSH:
        if request.offset or request.length:
            raise RequestError(errno.EINVAL, "FLUSH has no range")
        return
    if request.offset + request.length > size:
        full = command in (Cmd.WRITE, Cmd.WRITE_ZEROES)
        raise RequestError(errno.ENOSPC if full else errno.EINVAL, "beyond the end of the export")
    if command == Cmd.READ and request.length > MAX_PAYLOAD:
        raise RequestError(errno.EINVAL, "read longer than the maximum payload")
    if command == Cmd.BLOCK_STATUS and not (contexts and request.length):
        raise RequestError(
            errno.EINVAL, "no metadata context was selected" if not contexts else "empty range"
        )


# --- replies ----------------------------------------------------------------------
def encode_reply(reply: Reply) -> list[Buffer]:
    """The buffers to be sent for a reply or a chunk of one; data are not copied."""
    match reply:
        case SimpleReply(cookie=cookie, error=error, data=data):
            head = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
            return [head, data] if len(data) else [head]
        case NoneChunk(cookie=cookie):
            return [_chunk(Chunk.NONE, cookie, True, b"")]
        case DataChunk(cookie=cookie, offset=offset, data=data, done=done):
            head = CHUNK_HEADER.pack(
                STRUCTURED_REPLY_MAGIC, CHUNK_DONE * done, Chunk.OFFSET_DATA, cookie, 8 + len(data)
            )
            return [head + U64.pack(offset), data]
        case HoleChunk(cookie=cookie, offset=offset, length=length, done=done):
            return [_chunk(Chunk.OFFSET_HOLE, cookie, done, HOLE_BODY.pack(offset, length))]
        case StatusChunk(cookie=cookie, context_id=number, extents=extents, done=done):
            body = U32.pack(number) + b"".join(EXTENT.pack(*extent) for extent in extents)
            return [_chunk(Chunk.BLOCK_STATUS, cookie, done, body)]
        case ErrorChunk():
            return [_error_chunk(reply)]


def _chunk(kind: int, cookie: int, done: bool, body: bytes) -> bytes:
    return (
        CHUNK_HEADER.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE * done, kind, cookie, len(body)) + body
    )


def _error_chunk(reply: ErrorChunk) -> bytes:
    text = clipped(reply.text, MAX_TEXT)
    body = ERROR_BODY.pack(reply.error, len(text)) + text
    if reply.offset is None:
        return _chunk(Chunk.ERROR, reply.cookie, reply.done, body)
    return _chunk(Chunk.ERROR_OFFSET, reply.cookie, reply.done, body + U64.pack(reply.offset))
