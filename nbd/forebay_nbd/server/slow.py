# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Requests that have to wait, for an origin or for a flush: one task each, within the bounds of the server."""

import errno
import logging
from time import perf_counter

import trio

from forebay_nbd.protocol.events import Request, StatusChunk
from forebay_nbd.protocol.requests import encode_reply
from forebay_nbd.protocol.wire import Buffer, Cmd, CmdFlag
from forebay_nbd.server.answers import clip_extents, data_header, error_reply, success_reply
from forebay_nbd.server.budget import Pace, Share
from forebay_nbd.server.export import Export, Flushing
from forebay_nbd.server.limits import SERVER_REQUESTS, STALL_BYTES, STATUS_REQUESTS, Limits
from forebay_nbd.server.outbox import Outbox

log = logging.getLogger(__name__)

_EXTENT_BYTES = 256
"""What an extent costs while a reply is made: two pairs of numbers, in lists, and eight bytes in the reply."""
_LEAST_EXTENT = 512
"""Bytes of the shortest extent that an export tells of, but for its first and last."""

_WITH_DATA = frozenset((Cmd.READ, Cmd.WRITE))


class SlowRequests:
    """The tasks of one connection, and the memory that they hold.

    The bytes of READs and WRITEs are counted here, against `inflight_bytes`, and in the server's `budget`. A payload
    that is received into memory of its own is counted from reserve_payload() on, before it has arrived.
    """

    def __init__(self, out: Outbox, limits: Limits, budget: Share, status: Share) -> None:
        """`status` is what BLOCK_STATUS is counted in, `budget` all else."""
        self._out = out
        self._limits = limits
        self._budget = budget
        self._status = status
        self._ended = trio.lowlevel.ParkingLot()
        """Where wait_for_room() waits until a task of this connection ends."""
        self._nursery: trio.Nursery | None = None
        self._export: Export | None = None
        self._structured = False
        self._contexts: dict[int, str] = {}
        self._payload = 0
        """Bytes reserved by reserve_payload() for the payload that is being received."""
        self._unanswered: dict[int, tuple[Request, float]] = {}
        """Requests without a reply, oldest first, each with the trio time since when it has a task; by id()."""
        self._flushing: dict[int, Flushing] = {}
        """By id() of a FLUSH among these: what was begun for it."""
        self.answered = 0
        """Number of requests that had a task and have been answered."""
        self.count = 0
        """Number of tasks."""
        self.bytes = 0
        """Bytes that their READs and WRITEs, and the payload that is being received, have reserved."""
        self.payload_pace = Pace(STALL_BYTES)
        """Of the client, while the server waits for the rest of that payload."""
        self._status_turns = trio.Semaphore(STATUS_REQUESTS)
        """Held by each BLOCK_STATUS that is carried out, until its reply is sent."""

    def begin(
        self, nursery: trio.Nursery, export: Export, structured: bool, contexts: dict[int, str]
    ) -> None:
        """Called once, when transmission begins: tasks are started in `nursery`, requests carried out by `export`."""
        self._nursery, self._export = nursery, export
        self._structured, self._contexts = structured, contexts

    # --- bounds ----------------------------------------------------------------------
    def _reserve(self, size: int) -> bool:
        """Reserves `size` bytes for this connection; False if its bound or the server's forbids it for now.

        If this connection has reserved nothing yet, its own bound forbids nothing.
        """
        if self.bytes and self.bytes + size > self._limits.inflight_bytes:
            return False
        if size and not self._budget.reserve(size):
            return False
        self.bytes += size
        return True

    def _release(self, size: int) -> None:
        if size:
            self.bytes -= size
            self._budget.release(size)
        self._ended.unpark_all()

    async def wait_for_room(self) -> None:
        """Returns when start() or reserve_payload() is worth another try, at the latest after `stall_seconds`.

        With tasks of this connection, that is when one of them has ended; without, when another one has released
        memory.
        """
        with trio.move_on_after(self._limits.stall_seconds):
            if self.count:
                await self._ended.park()
            else:
                await self._budget.released()

    def drop_stalled(self, budget: Share | None = None) -> None:
        """Called when memory could not be reserved: ends the connection that has stalled for longest, if any has."""
        if (budget or self._budget).drop_stalled(self._limits.stall_seconds):
            log.info("connection dropped: it holds memory and does not move")

    def reserve_payload(self, size: int) -> bool:
        """Reserves memory for a payload of `size` bytes that is being received; False while there is no room for it."""
        if self._payload:
            return True
        if not self._reserve(size):
            return False
        self._payload = size
        self.payload_pace.wait()
        return True

    def release_payload(self) -> None:
        """Releases what reserve_payload() reserved, if anything: the payload is not needed any more."""
        self._release(self._take_payload())

    def _take_payload(self) -> int:
        """The bytes reserved for the payload, which has arrived or is not needed any more."""
        size, self._payload = self._payload, 0
        self.payload_pace.end()
        return size

    # --- tasks ----------------------------------------------------------------------
    def start(self, request: Request, since: float | None = None) -> bool:
        """Starts a task for a request; False, and nothing is done, if a bound forbids that for now.

        It had come at `since` (perf_counter()); None: just now. A payload that is not `owned` is copied. The memory of
        one that is has been reserved by reserve_payload().
        """
        if self.count and self._are_too_many():
            return False
        if request.owned:
            size = self._take_payload()
        else:
            size = request.length if request.command in _WITH_DATA else 0
            if not self._reserve(size):
                return False
            request.payload = bytes(request.payload)
        self._start(request, size, since)
        return True

    def take_over(self, begun: tuple[int, Flushing, float] | None) -> None:
        """Starts a task for a FLUSH that was begun without one, (cookie, what was begun, when), if there is one.

        Whatever the bounds say: a connection has no more than one of them.
        """
        if begun is not None:
            request = Request(Cmd.FLUSH, 0, begun[0])
            self._flushing[id(request)] = begun[1]
            self._start(request, 0, begun[2])

    def _start(self, request: Request, size: int, since: float | None) -> None:
        assert self._nursery is not None
        self.count += 1
        self._budget.requests += 1
        self._unanswered[id(request)] = (request, trio.current_time())
        since = perf_counter() if since is None else since
        self._nursery.start_soon(self._run, request, size, since)

    def _are_too_many(self) -> bool:
        """True if this connection, or all of the server, have as many tasks as they may."""
        limits = self._limits
        return self.count >= limits.inflight_requests or self._budget.requests >= SERVER_REQUESTS

    def unanswered(self) -> list[Request]:
        """The requests that have a task, or had one that was cancelled, and no reply; oldest first."""
        return [request for request, _ in self._unanswered.values()]

    @property
    def unanswered_since(self) -> float | None:
        """Trio time since when the oldest request of unanswered() has a task; None if there is none."""
        return next((began for _, began in self._unanswered.values()), None)

    async def _run(self, request: Request, size: int, since: float) -> None:
        """The task of one request: carries it out and sends the reply. `size` bytes are reserved for it."""
        try:
            if request.command == Cmd.BLOCK_STATUS:
                async with self._status_turns:
                    await self._run_status(request, since)
            else:
                await self._run_reserved(request, since)
        finally:
            self.count -= 1
            self._budget.requests -= 1
            self._release(size)

    async def _run_status(self, request: Request, since: float) -> None:
        """As `_run_reserved`, once memory is reserved for as many extents as the reply can have."""
        most = min(self._limits.status_extents, request.length // _LEAST_EXTENT + 2)
        size = most * _EXTENT_BYTES
        while not self._status.reserve(size):
            self.drop_stalled(self._status)
            with trio.move_on_after(self._limits.stall_seconds):
                await self._status.released()
        try:
            await self._run_reserved(request, since)
        finally:
            self._status.release(size)

    async def _run_reserved(self, request: Request, since: float) -> None:
        """Carries a request out and sends the reply, for which memory is reserved."""
        buffers = await self._answer(request)
        del self._unanswered[id(request)]
        self.answered += 1
        # No await here: the buffers may be slices of the export's memory.
        sent = self._out.send(buffers, sum(map(len, buffers)))
        assert self._export is not None
        took = perf_counter() - since
        self._export.timing.carried_out(request.command, request.offset, request.length, took)
        if not sent:
            await self._out.drain()

    async def _answer(self, request: Request) -> list[Buffer]:
        """The reply to a request, once it is carried out. An unexpected exception of the export becomes EIO."""
        try:
            return await self._perform(request)
        except OSError as exc:
            return error_reply(request, self._structured, exc)
        except Exception:
            log.exception(
                "request %d at %d+%d failed", request.command, request.offset, request.length
            )
            return error_reply(request, self._structured, OSError(errno.EIO, "internal error"))

    async def _perform(self, request: Request) -> list[Buffer]:
        """Has the export carry out a request, and returns the reply. Raises what the export raises."""
        export, fua = self._export, bool(request.flags & CmdFlag.FUA)
        assert export is not None
        offset, length = request.offset, request.length
        match request.command:
            case Cmd.READ:
                return self._data_reply(request, await export.read(offset, length))
            case Cmd.WRITE:
                await export.write(offset, memoryview(request.payload), fua)
            case Cmd.FLUSH:
                flushing = self._flushing.pop(id(request), None)
                if flushing is None or not await flushing.wait():
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
                return await self._status_reply(export, request)
        return success_reply(request, self._structured)

    def _data_reply(self, request: Request, buffers: list[Buffer]) -> list[Buffer]:
        """The reply to a READ whose data are `buffers`. Raises RuntimeError if they have not its length."""
        size = sum(map(len, buffers))
        if size != request.length:
            raise RuntimeError(f"the export read {size} bytes instead of {request.length}")
        return [data_header(request, self._structured), *buffers]

    async def _status_reply(self, export: Export, request: Request) -> list[Buffer]:
        """The reply to a BLOCK_STATUS: one chunk for each metadata context that was selected."""
        one = bool(request.flags & CmdFlag.REQ_ONE)
        replies: list[Buffer] = []
        last = max(self._contexts)
        for number, context in self._contexts.items():
            found = await export.extents(context, request.offset, request.length, one)
            most = 1 if one else self._limits.status_extents
            extents = clip_extents(found, request.offset, request.length, export.size, one, most)
            replies += encode_reply(
                StatusChunk(request.cookie, number, extents, done=number == last)
            )
        return replies
