"""Requests that have to wait: one task each, within the connection's bounds."""

import errno
import logging

import trio

from forebay_nbd.protocol.events import ErrorChunk, NoneChunk, Request, SimpleReply, StatusChunk
from forebay_nbd.protocol.requests import encode_reply
from forebay_nbd.protocol.wire import (
    CHUNK_DONE,
    CHUNK_HEADER,
    MAX_EXTENTS,
    STRUCTURED_REPLY_MAGIC,
    U64,
    Buffer,
    Chunk,
    Cmd,
    CmdFlag,
    wire_errno,
)
from forebay_nbd.server.budget import Budget
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import Limits
from forebay_nbd.server.outbox import Outbox

log = logging.getLogger(__name__)

_WITH_BYTES = frozenset((Cmd.READ, Cmd.WRITE))


def failure(request: Request, structured: bool, error: OSError) -> list[Buffer]:
    """The reply to a request that failed. With structured replies it says why."""
    code = wire_errno(error.errno)
    if structured:
        return encode_reply(ErrorChunk(request.cookie, code, error.strerror or ""))
    return encode_reply(SimpleReply(request.cookie, code))


def success(request: Request, structured: bool) -> list[Buffer]:
    """The reply to a request that is done and has nothing to tell."""
    if (
        structured and request.command == Cmd.READ
    ):  # "a read request MUST result in a structured reply"
        return encode_reply(NoneChunk(request.cookie))
    return encode_reply(SimpleReply(request.cookie))


class SlowRequests:
    """The tasks of one connection.

    start() takes a request if there is room(); bytes of requests are counted here and in the server's `budget`. A
    payload that gets a buffer of its own is counted from expect() on, before it has arrived.
    """

    def __init__(self, out: Outbox, limits: Limits, budget: Budget) -> None:
        self._out = out
        self._limits = limits
        self._budget = budget
        self._freed = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None
        self._export: Export | None = None
        self._structured = False
        self._contexts: dict[int, str] = {}
        self._payload = 0
        self._unanswered: dict[int, tuple[Request, float]] = {}  # oldest first, with trio's time
        self.answered = 0
        """Requests answered so far."""
        self.count = 0
        self.bytes = 0
        self.payload_since: float | None = None
        """Trio time since when a payload with a buffer of its own is awaited."""

    def begin(
        self, nursery: trio.Nursery, export: Export, structured: bool, contexts: dict[int, str]
    ) -> None:
        """Transmission begins."""
        self._nursery, self._export, self._structured, self._contexts = (
            nursery,
            export,
            structured,
            contexts,
        )

    # --- bounds ----------------------------------------------------------------------
    def _take(self, size: int) -> bool:
        if self.bytes and self.bytes + size > self._limits.inflight_bytes:
            return False
        if size and not self._budget.take(size):
            return False
        self.bytes += size
        return True

    def _give(self, size: int) -> None:
        if size:
            self.bytes -= size
            self._budget.give(size)
        self._freed.unpark_all()

    async def room(self) -> None:
        """Returns when start() or expect() is worth another try: after something ended, here or in the server."""
        with trio.move_on_after(self._limits.stall_seconds):
            if self.count:
                await self._freed.park()
            else:
                await self._budget.changed()

    def expect(self, size: int) -> bool:
        """Counts a payload of `size` bytes that is being received; False while there is no room for it."""
        if self._payload:
            return True
        if not self._take(size):
            return False
        self._payload, self.payload_since = size, trio.current_time()
        return True

    def payload_done(self) -> None:
        """The payload counted by expect() is not needed any more."""
        size, self._payload, self.payload_since = self._payload, 0, None
        self._give(size)

    # --- tasks ----------------------------------------------------------------------
    def start(self, request: Request) -> bool:
        """Makes the request a task; False where the connection's bounds forbid it for now.

        A payload that is not `owned` is copied.
        """
        assert self._nursery is not None
        if self.count >= self._limits.inflight_requests:
            return False
        if request.owned:
            size, self._payload, self.payload_since = self._payload, 0, None
        else:
            size = request.length if request.command in _WITH_BYTES else 0
            if not self._take(size):
                return False
            request.payload = bytes(request.payload)
        self.count += 1
        self._unanswered[id(request)] = (request, trio.current_time())
        self._nursery.start_soon(self._run, request, size)
        return True

    def unanswered(self) -> list[Request]:
        """What was begun and has no reply: under way, or, when the tasks were cancelled, to be done again."""
        return [request for request, _ in self._unanswered.values()]

    @property
    def unanswered_since(self) -> float | None:
        """Trio time since when the oldest of them is under way."""
        return next((began for _, began in self._unanswered.values()), None)

    async def _run(self, request: Request, size: int) -> None:
        try:
            buffers = await self._answer(request)
            del self._unanswered[id(request)]
            self.answered += 1
            # No await here: the buffers may be slices of the export's memory.
            if not self._out.send(buffers, sum(map(len, buffers))):
                await self._out.drain()
        finally:
            self.count -= 1
            self._give(size)

    async def _answer(self, request: Request) -> list[Buffer]:
        try:
            return await self._perform(request)
        except OSError as exc:
            return failure(request, self._structured, exc)
        except Exception:
            log.exception(
                "request %d at %d+%d failed", request.command, request.offset, request.length
            )
            return failure(request, self._structured, OSError(errno.EIO, "internal error"))

    async def _perform(self, request: Request) -> list[Buffer]:
        export, fua = self._export, bool(request.flags & CmdFlag.FUA)
        assert export is not None
        offset, length = request.offset, request.length
        match request.command:
            case Cmd.READ:
                return self._data(request, await export.read(offset, length))
            case Cmd.WRITE:
                await export.write(offset, memoryview(request.payload), fua)
            case Cmd.FLUSH:
                await export.flush()
            case Cmd.TRIM:
                await export.trim(offset, length, fua)
            case Cmd.CACHE:
                await export.cache(offset, length)
            case Cmd.WRITE_ZEROES:
                no_hole = bool(request.flags & CmdFlag.NO_HOLE)
                await export.zero(
                    offset, length, fua, no_hole, bool(request.flags & CmdFlag.FAST_ZERO)
                )
            case Cmd.BLOCK_STATUS:
                return await self._status(export, request)
        return success(request, self._structured)

    def _data(self, request: Request, buffers: list[Buffer]) -> list[Buffer]:
        size = sum(map(len, buffers))
        if size != request.length:
            raise RuntimeError(f"the export read {size} bytes instead of {request.length}")
        return [data_head(request, self._structured), *buffers]

    async def _status(self, export: Export, request: Request) -> list[Buffer]:
        one = bool(request.flags & CmdFlag.REQ_ONE)
        replies: list[Buffer] = []
        last = max(self._contexts)
        for number, context in self._contexts.items():
            found = await export.extents(context, request.offset, request.length, one)
            extents = clip_extents(found, request.offset, request.length, export.size, one)
            replies += encode_reply(
                StatusChunk(request.cookie, number, extents, done=number == last)
            )
        return replies


def data_head(request: Request, structured: bool) -> bytes:
    """What goes before the data of a successful READ."""
    if not structured:
        return bytes(encode_reply(SimpleReply(request.cookie))[0])
    size = U64.size + request.length
    head = CHUNK_HEADER.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.OFFSET_DATA, request.cookie, size
    )
    return head + U64.pack(request.offset)


def clip_extents(
    found: list[tuple[int, int]], offset: int, length: int, size: int, one: bool
) -> tuple[tuple[int, int], ...]:
    """What of the extents (length, flags) an export found may be sent as an answer to [offset, offset + length).

    Neighbours with equal flags become one. All but the last end inside the request ("the sum of the first N-1 extents
    MUST be less than the requested length"), the last one inside the export of `size` bytes and, with `one`, inside the
    request. Lengths fit 32 bits (CVE-2025-47711, CVE-2025-47712). Raises RuntimeError if nothing is left.
    """
    merged: list[tuple[int, int]] = []
    covered = 0
    for extent, flags in found:
        count = min(extent, (length if one else size - offset) - covered)
        if count <= 0 or covered >= length:
            break
        covered += count
        if merged and merged[-1][1] == flags:
            merged[-1] = (merged[-1][0] + count, flags)
        elif len(merged) >= (1 if one else MAX_EXTENTS):
            break
        else:
            merged.append((count, flags))
    if not merged:
        raise RuntimeError("the export told no extent")
    # A multiple of 64 KiB below 2^32, so that what follows a shortened extent stays aligned.
    whole = next((i for i, (count, _) in enumerate(merged) if count >> 32), None)
    if whole is not None:
        merged[whole:] = [((1 << 32) - (64 << 10), merged[whole][1])]
    return tuple(merged)
