"""The hot loops: everything one recv brought, answered without waiting. Nothing here awaits.

A run of plain READs is taken as bare tuples and costs one read_now() each; a run of plain WRITEs is handed to
write_now() as a whole, straight from the receive buffer. Whatever else comes takes the general path, one Request at
a time.
"""

import enum

from forebay_nbd.protocol.events import NeedData, Request
from forebay_nbd.protocol.requests import RequestReader, check
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
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import Limits
from forebay_nbd.server.slow import SlowRequests, data_head, failure, success

_HEADER = REQUEST_FAST.size


class Outcome(enum.Enum):
    """Why Batch.run() came back."""

    ALL_TAKEN = "receive more"
    FULL = "send what was gathered and go on"
    NO_ROOM = "a request has to wait until others are done"
    LEFT = "the client said goodbye"
    BROKEN = "the client broke the protocol: send what was gathered, then raise Batch.error"


class Batch:
    """Turns what a RequestReader holds into replies and slow requests."""

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
        self._head_size = DATA_CHUNK_FAST.size if structured else len(SIMPLE_OK) + 8
        self._buffers: list[Buffer] = []
        self._total = 0
        self._waiting: Request | None = None
        self.error: ProtocolError | None = None

    def take(self) -> tuple[list[Buffer], int]:
        """The replies gathered and their length in bytes; they have to be sent before anything is awaited."""
        buffers, total = self._buffers, self._total
        self._buffers, self._total = [], 0
        return buffers, total

    def run(self) -> Outcome:
        """Goes on until there is a reason to stop."""
        try:
            outcome = self._run()
        except ProtocolError as exc:
            self.error, outcome = exc, Outcome.BROKEN
        return outcome

    def _run(self) -> Outcome:
        outcome = None if self._waiting is None else self._again()
        reader = self._reader
        while outcome is None:
            have = reader.end - reader.start
            if have < _HEADER:
                if not have and not reader.wanted():
                    return Outcome.ALL_TAKEN
                return self._other() or Outcome.FULL
            (head,) = U64.unpack_from(reader.view, reader.start)
            if head == PLAIN_READ:
                outcome = self._reads()
            elif head == PLAIN_WRITE:
                outcome = self._writes()
            else:
                outcome = self._other()
        return outcome

    def _reads(self) -> Outcome | None:
        """A run of READs without flags."""
        size, structured, limit = self._size, self._structured, self._limits.batch_bytes
        read_now, append, pack = self._export.read_now, self._buffers.append, DATA_CHUNK_FAST.pack
        total, taken, head_size = self._total, 0, self._head_size
        outcome = None
        most = (self._limits.batch_buffers - len(self._buffers)) // 2
        for head, cookie, offset, length in self._reader.headers(most):
            if head != PLAIN_READ or offset + length > size or not 0 < length <= MAX_PAYLOAD:
                break
            taken += 1
            try:
                data = read_now(offset, length)
            except OSError as exc:
                append(self._read_failed(cookie, exc))
                total += len(self._buffers[-1])
                continue
            if data is None:
                outcome = self._later(Request(Cmd.READ, 0, int.from_bytes(cookie), offset, length))
                if outcome is not None:
                    break
                continue
            append(
                pack(DATA_DONE, cookie, length + 8, offset) if structured else SIMPLE_OK + cookie
            )
            append(data)
            total += length + head_size
            if total >= limit:
                break
        self._total = total
        self._reader.skip(taken)
        if not taken:
            return self._other()
        return Outcome.FULL if outcome is None and (total >= limit or taken == most) else outcome

    def _read_failed(self, cookie: bytes, error: OSError) -> bytes:
        request = Request(Cmd.READ, 0, int.from_bytes(cookie))
        return b"".join(failure(request, self._structured, error))

    def _writes(self) -> Outcome | None:
        """A run of WRITEs without flags whose payloads lie complete in the receive buffer."""
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
            return self._other()
        return self._take(writes, cookies)

    def _take(self, writes: list[tuple[int, memoryview]], cookies: list[bytes]) -> Outcome | None:
        """Hands writes over, as many at a time as the export takes; those that have to wait are started."""
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
                self._reply(failure(request, self._structured, failed))
            else:
                outcome = self._later(request)
        self._reader.start += sum(_HEADER + len(data) for _, data in writes[:begun])
        return outcome

    def _publish(self, cookies: list[bytes]) -> None:
        """Acknowledges what write_now() took."""
        try:
            self._export.publish()
        except OSError as exc:
            for cookie in cookies:
                self._reply(
                    failure(Request(Cmd.WRITE, 0, int.from_bytes(cookie)), self._structured, exc)
                )
        else:
            self._reply([SIMPLE_OK + SIMPLE_OK.join(cookies)])

    # --- the general path ----------------------------------------------------------------------
    def _reply(self, buffers: list[Buffer]) -> None:
        self._buffers += buffers
        self._total += sum(map(len, buffers))

    def _other(self) -> Outcome | None:
        """One request of any kind."""
        request = self._reader.next_event()
        if isinstance(request, NeedData):
            return Outcome.ALL_TAKEN
        if request.command == Cmd.DISC:
            return Outcome.LEFT
        try:
            check(request, self._size, self._read_only, self._structured, self._contexts)
            if not self._at_once(request):
                return self._later(request)
        except OSError as exc:
            self._reply(failure(request, self._structured, exc))
        if request.owned:
            self._slow.payload_done()
        full = (
            len(self._buffers) > self._limits.batch_buffers - 2
            or self._total >= self._limits.batch_bytes
        )
        return Outcome.FULL if full else None

    def _at_once(self, request: Request) -> bool:
        """Answers a request that has not to wait."""
        if request.command == Cmd.READ and request.length:
            data = self._export.read_now(request.offset, request.length)
            if data is None:
                return False
            self._reply([data_head(request, self._structured), data])
        elif request.command == Cmd.WRITE and request.length:
            if request.flags & CmdFlag.FUA:
                return False
            if not self._export.write_now([(request.offset, memoryview(request.payload))]):
                return False
            self._publish([request.cookie.to_bytes(8)])
        elif request.command == Cmd.FLUSH:
            if not self._export.flush_now():
                return False
            self._reply(success(request, self._structured))
        elif request.length:
            return False
        else:
            self._reply(success(request, self._structured))
        return True

    def _later(self, request: Request) -> Outcome | None:
        if self._slow.start(request):
            return None
        self._waiting = request
        return Outcome.NO_ROOM

    def _again(self) -> Outcome | None:
        """Another try at the request that there was no room for."""
        request, self._waiting = self._waiting, None
        assert request is not None
        return self._later(request)

    def waiting(self) -> Request | None:
        """The request that there was no room for, if any: parsed, not begun."""
        return self._waiting
