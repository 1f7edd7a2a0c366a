# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The hot loops: they answer all requests that one recv() brought, as far as nothing has to be waited for.

Nothing here awaits. A run of READs without flags is decoded to tuples, and costs one read_now() each; a run of WRITEs
without flags is given to write_now() as a whole, with payloads that are parts of the receive buffer. Each other request
becomes a Request and is answered for itself.
"""

import enum
import socket
from time import perf_counter

import forebay_fast
from forebay_fast.latency import FLUSH, HIT, REQUESTS, WRITE
from forebay_nbd.protocol.events import NeedData, Request
from forebay_nbd.protocol.requests import RequestReader, check_request
from forebay_nbd.protocol.wire import (
    DATA_CHUNK_FAST,
    DATA_DONE,
    MAX_PAYLOAD,
    PLAIN_READ,
    PLAIN_WRITE,
    REQUEST_FAST,
    SIMPLE_OK,
    U64,
    Buffer,
    Cmd,
    CmdFlag,
    ProtocolError,
)
from forebay_nbd.server import polling
from forebay_nbd.server.answers import data_header, error_reply, refusal, success_reply
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import Limits
from forebay_nbd.server.outbox import Outbox
from forebay_nbd.server.slow import SlowRequests

_HEADER = REQUEST_FAST.size


class Outcome(enum.Enum):
    """Why Batch.run() returned. In every case the replies gathered have to be sent first."""

    NEEDS_DATA = "all that was received has been handled: receive more"
    FULL = "enough replies were gathered: run() again"
    NO_ROOM = "a request needs a task, and bounds forbid it: wait for room, then run() again"
    DISCONNECT = "the client sent DISC: take no more requests"
    PROTOCOL_ERROR = (
        "the client broke the protocol: raise Batch.error when requests in flight are done"
    )


class Batch:
    """Turns the bytes that a RequestReader holds into replies, and into tasks for requests that have to wait.

    `structured`: structured replies were agreed on; `contexts`: a metadata context was selected.
    """

    def __init__(
        self,
        reader: RequestReader,
        export: Export,
        slow: SlowRequests,
        limits: Limits,
        structured: bool,
        contexts: bool,
    ) -> None:
        self._reader = reader
        self._export = export
        self._slow = slow
        self._limits = limits
        self._structured = structured
        self._contexts = contexts
        self._size = export.size
        self._read_only = export.read_only
        self._header_size = DATA_CHUNK_FAST.size if structured else len(SIMPLE_OK) + 8
        """Bytes before the data in the reply to a READ."""
        self._buffers: list[Buffer] = []
        self._total = 0
        """Bytes in `_buffers`."""
        self._has_written = False
        """WRITEs are acknowledged by the replies gathered."""
        self._waiting: Request | None = None
        self.since = perf_counter()
        """perf_counter() when what is answered now had come; set by whoever receives."""
        self._answered = [0] * len(REQUESTS)
        """How many requests, by kind, the replies gathered answer."""
        self.error: ProtocolError | None = None
        """Set when run() has returned PROTOCOL_ERROR."""

    @property
    def waiting(self) -> Request | None:
        """The request for which run() returned NO_ROOM: taken from the reader, but not begun. None if there is none."""
        return self._waiting

    def take_replies(self) -> tuple[list[Buffer], int]:
        """The replies gathered and their length in bytes; they have to be sent before anything is awaited."""
        buffers, total = self._buffers, self._total
        self._buffers, self._total = [], 0
        return buffers, total

    def note_time(self) -> None:
        """Called when these replies were given to the kernel: counts how long their requests took."""
        if any(self._answered):
            timing, took = self._export.timing, perf_counter() - self.since
            for kind, times in enumerate(self._answered):
                if times:
                    timing.latency.note(kind, took, times)
                    self._answered[kind] = 0
            if took >= timing.slow_seconds:
                timing.held_up(took)

    def note_sent(self) -> None:
        """Called when all of these replies were sent at once."""
        if self._has_written:
            self._has_written = False
            self._export.answered()

    def run(self) -> Outcome:
        """Answers requests until there is a reason to return. Whatever an export raises beside OSError is passed on."""
        try:
            outcome = self._run()
        except ProtocolError as exc:
            self.error, outcome = exc, Outcome.PROTOCOL_ERROR
        return outcome

    # The methods below return None if run() shall go on.

    def _run(self) -> Outcome:
        outcome = None if self._waiting is None else self._start_waiting()
        reader = self._reader
        while outcome is None:
            have = reader.end - reader.start
            if have < _HEADER:
                if not have and not reader.large_payload():
                    return Outcome.NEEDS_DATA
                return self._answer_one() or Outcome.FULL
            (head,) = U64.unpack_from(reader.view, reader.start)
            if head == PLAIN_READ:
                outcome = self._answer_reads()
            elif head == PLAIN_WRITE:
                outcome = self._answer_writes()
            else:
                outcome = self._answer_one()
        return outcome

    def _answer_reads(self) -> Outcome | None:
        """Answers a run of READs without flags."""
        size, structured, limit = self._size, self._structured, self._limits.batch_bytes
        read_now, append, pack = self._export.read_now, self._buffers.append, DATA_CHUNK_FAST.pack
        total, taken, header_size = self._total, 0, self._header_size
        outcome, hits = None, 0
        most = (self._limits.batch_buffers - len(self._buffers)) // 2
        for head, cookie, offset, length in self._reader.headers(most):
            if head != PLAIN_READ or offset + length > size or not 0 < length <= MAX_PAYLOAD:
                break
            taken += 1
            try:
                data = read_now(offset, length)
            except OSError as exc:
                append(self._read_error(cookie, exc))
                total += len(self._buffers[-1])
                continue
            if data is None:
                outcome = self._start(Request(Cmd.READ, 0, int.from_bytes(cookie), offset, length))
                if outcome is not None:
                    break
                continue
            append(
                pack(DATA_DONE, cookie, length + 8, offset) if structured else SIMPLE_OK + cookie
            )
            append(data)
            hits += 1
            total += length + header_size
            if total >= limit:
                break
        self._total = total
        self._answered[HIT] += hits
        self._reader.skip(taken)
        if not taken:
            return self._answer_one()
        return Outcome.FULL if outcome is None and (total >= limit or taken == most) else outcome

    def _read_error(self, cookie: bytes, error: OSError) -> bytes:
        request = Request(Cmd.READ, 0, int.from_bytes(cookie))
        return b"".join(error_reply(request, self._structured, error))

    def _answer_writes(self) -> Outcome | None:
        """Answers a run of WRITEs without flags whose payloads lie complete in the receive buffer."""
        reader, size = self._reader, self._size
        view, pos, end = reader.view, reader.start, reader.end
        unpack = REQUEST_FAST.unpack_from
        writes: list[tuple[int, memoryview]] = []
        cookies: list[bytes] = []
        while end - pos >= _HEADER:
            head, cookie, offset, length = unpack(view, pos)
            stop = pos + _HEADER + length
            if (
                head != PLAIN_WRITE
                or stop > end
                or offset + length > size
                or not length
                or self._read_only
            ):
                break
            writes.append((offset, view[pos + _HEADER : stop]))
            cookies.append(cookie)
            pos = stop
        if not writes:
            return self._answer_one()
        return self._perform_writes(writes, cookies)

    def _perform_writes(
        self, writes: list[tuple[int, memoryview]], cookies: list[bytes]
    ) -> Outcome | None:
        """Has the export carry out writes (offset, data), and takes them from the reader.

        For each that has to wait a task is started. If there is no room for one, NO_ROOM is returned, and the writes
        after it stay in the reader.
        """
        outcome = None
        begun = 0
        while begun < len(writes) and outcome is None:
            taken, failed = 0, None
            try:
                taken = self._export.write_now(writes[begun:] if begun else writes)
            except OSError as exc:
                failed = exc
            if taken:
                self._publish(cookies[begun : begun + taken])
                begun += taken
                continue
            offset, data = writes[begun]
            cookie = int.from_bytes(cookies[begun])
            request = Request(Cmd.WRITE, 0, cookie, offset, len(data), data)
            begun += 1
            if failed is not None:
                self._reply(error_reply(request, self._structured, failed))
            else:
                outcome = self._start(request)
        self._reader.start += sum(_HEADER + len(data) for _, data in writes[:begun])
        return outcome

    def _publish(self, cookies: list[bytes]) -> None:
        """Publishes the writes of these cookies, which write_now() has carried out, and acknowledges them."""
        try:
            self._export.publish()
        except OSError as exc:
            for cookie in cookies:
                self._reply(
                    error_reply(
                        Request(Cmd.WRITE, 0, int.from_bytes(cookie)), self._structured, exc
                    )
                )
        else:
            self._reply([SIMPLE_OK + SIMPLE_OK.join(cookies)])
            self._has_written = True
        self._answered[WRITE] += len(cookies)

    # --- requests of any kind ----------------------------------------------------------------------
    def _reply(self, buffers: list[Buffer]) -> None:
        """Adds a reply to those gathered."""
        self._buffers += buffers
        self._total += sum(map(len, buffers))

    def _answer_one(self) -> Outcome | None:
        """Checks one request of any kind and answers it, or starts a task for it."""
        request = self._reader.next_event()
        if isinstance(request, NeedData):
            return Outcome.NEEDS_DATA
        if request.command == Cmd.DISC:
            return Outcome.DISCONNECT
        try:
            check_request(request, self._size, self._read_only, self._structured, self._contexts)
            if not self._answer_at_once(request):
                return self._start(request)
        except OSError as exc:
            self._reply(error_reply(request, self._structured, exc))
        if request.owned:
            self._slow.release_payload()
        full = (
            len(self._buffers) > self._limits.batch_buffers - 2
            or self._total >= self._limits.batch_bytes
        )
        return Outcome.FULL if full else None

    def _answer_at_once(self, request: Request) -> bool:
        """Answers a request that does not have to wait; False if it has to, and nothing has been done then.

        Raises OSError if the request failed.
        """
        if request.command == Cmd.READ and request.length:
            data = self._export.read_now(request.offset, request.length)
            if data is None:
                return False
            self._reply([data_header(request, self._structured), data])
            self._answered[HIT] += 1
        elif request.command == Cmd.WRITE and request.length:
            if request.flags & CmdFlag.FUA:
                return False
            if not self._export.write_now([(request.offset, memoryview(request.payload))]):
                return False
            self._publish([request.cookie.to_bytes(8)])
        elif request.command == Cmd.FLUSH:
            if not self._export.flush_now():
                return False
            self._reply(success_reply(request, self._structured))
            self._answered[FLUSH] += 1
        elif request.length:
            return False
        else:
            self._reply(success_reply(request, self._structured))
        return True

    def _start(self, request: Request) -> Outcome | None:
        """Starts a task for a request. If bounds forbid that, returns NO_ROOM and keeps it for the next run()."""
        if self._slow.start(request, self.since):
            return None
        self._waiting = request
        return Outcome.NO_ROOM

    def _start_waiting(self) -> Outcome | None:
        """Tries again to start a task for the request for which there was no room."""
        request, self._waiting = self._waiting, None
        assert request is not None
        return self._start(request)


def compiled_turn(
    reader: RequestReader,
    export: Export | None,
    out: Outbox,
    sock: socket.socket,
    limits: Limits,
    structured: bool,
) -> "forebay_fast.core.Turn | None":
    """What does the same with plain requests, if this process serves with the compiled core."""
    if not forebay_fast.serves():
        return None
    return forebay_fast.core.Turn(
        reader,
        export,
        out,
        sock.fileno(),
        limits,
        structured=structured,
        refusal=refusal(structured),
        polling=polling,
    )
