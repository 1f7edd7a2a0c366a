"""One client of the server: handshake, then requests until it leaves.

The hot path awaits nothing: all that one recv brought is parsed, every hit is answered from read_now() and write_now(),
and one sendmsg carries the replies. What cannot be answered at once becomes a task (see slow.py). No await may come
between read_now() and the sendmsg that carries its buffer, except under the outbox's pin.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import sched_yield
from time import perf_counter

import trio

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.events import Request
from forebay_nbd.protocol.handshake import ServerHandshake, State
from forebay_nbd.protocol.requests import RequestReader, encode_request
from forebay_nbd.protocol.wire import ProtocolError
from forebay_nbd.server.batch import Batch, Outcome
from forebay_nbd.server.budget import Budget
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import Limits
from forebay_nbd.server.negotiation import Negotiation
from forebay_nbd.server.outbox import Outbox
from forebay_nbd.server.slow import SlowRequests


@dataclass(frozen=True)
class Session:
    """What another process needs, beside the socket, to carry a connection on from a request boundary."""

    export_name: str
    structured: bool
    contexts: dict[int, str] = field(default_factory=dict)
    unparsed: bytes = b""
    """Requests received and not answered; mostly none. What was begun, within the limits of what may be in flight, then
    at most one request and a receive buffer."""
    unsent: bytes = b""
    """Replies that the client did not take yet: they go first."""


class _Turn:
    """Which connection was busy last: one that shares the loop with others must not poll."""

    last: "Connection | None" = None


class Connection:
    """A connected client. run() does everything; stop(), freeze(), hurry() and abort() end it from outside.

    `shed` is called when the server's memory is used up and this connection has to wait for it.
    """

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        budget: Budget,
        shed: Callable[[], None] = lambda: None,
    ) -> None:
        self.sock = sock
        self.limits = limits
        self.export: Export | None = None
        self.session: Session | None = None
        """Set once transmission has begun."""
        self.frozen = False
        """After freeze(), when run() has returned: the socket is open, and `session` says how to go on with it."""
        self._life = trio.CancelScope(shield=True)
        self._haggling = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._working = trio.CancelScope()
        self._out = Outbox(sock, limits, budget, self.abort)
        self._slow = SlowRequests(self._out, limits, budget)
        self._reader = RequestReader(limits.receive_buffer, limits.in_place_bytes)
        self._shed = shed
        self._keen = False
        self._alone = False
        self._turn_ends = 0.0
        self._freezing = False
        self._unfed = memoryview(b"")

    # --- from outside ----------------------------------------------------------------------
    def abort(self) -> None:
        """Ends the connection at once; requests in flight are given up."""
        self._life.cancel()

    def stop(self) -> None:
        """Takes no more requests; those in flight complete, within shutdown_seconds.

        No ESHUTDOWN for what the client sends meanwhile: a client that reconnects repeats it, and loses nothing.
        """
        self._haggling.cancel()
        self._reading.cancel()
        self._life.deadline = min(
            self._life.deadline, trio.current_time() + self.limits.shutdown_seconds
        )

    def freeze(self) -> None:
        """As stop(), but run() leaves the socket open and `session` complete, for another process to resume().

        Only for connections in transmission whose client is there (`frozen` says so); a handshake is simply ended.
        """
        self._freezing = True
        self.stop()

    def hurry(self) -> None:
        """After freeze(): waits for nothing any more. What was begun and has no reply is part of `session`.

        Doing it again in the other process is right for every command: nobody was told that it was done.
        """
        self._working.cancel()

    @property
    def unanswered_since(self) -> float | None:
        """Trio time since when the oldest request that had to wait does so; None where none does."""
        return self._slow.unanswered_since

    @property
    def answered(self) -> int:
        """Requests that had to wait and were answered."""
        return self._slow.answered

    @property
    def stalled_since(self) -> float | None:
        """Trio time since when the client takes no replies, or does not finish the payload it began."""
        return self._out.stalled_since or self._slow.payload_since

    # --- life ----------------------------------------------------------------------
    async def run(
        self, resolve: Callable[[str], Export | None], names: Callable[[], list[str]]
    ) -> None:
        """Serves the client until it leaves or stop(). Raises ProtocolError if it broke the protocol.

        Closes the socket, unless freeze() was called. Shielded from cancellation: use stop() or abort().
        """
        with self._life:
            try:
                self._haggling.deadline = trio.current_time() + self.limits.handshake_seconds
                with self._haggling:
                    self.session = await self._handshake(
                        Negotiation(resolve, names, self.limits.name_bytes)
                    )
                if self.session is not None:
                    await self._transmission(self.session)
            finally:
                self._close()

    async def resume(self, session: Session, export: Export) -> None:
        """As run(), for a connection that another process froze."""
        self.export, self.session = export, session
        with self._life:
            try:
                await self._transmission(session)
            finally:
                self._close()

    def _close(self) -> None:
        self._out.discard()
        trio.lowlevel.notify_closing(self.sock)
        if not self.frozen:
            self.sock.close()

    # --- handshake ----------------------------------------------------------------------
    async def _handshake(self, negotiation: Negotiation) -> Session | None:
        hands = ServerHandshake(self.limits.option_bytes, self.limits.queries)
        await self._say(hands.send(ev.Greeting(hands.FLAGS)))
        options = 0
        while hands.state is not State.TRANSMISSION:
            event = hands.next_event()
            if isinstance(event, ev.NeedData):
                data = await self._hear()
                if not data:
                    return None
                hands.receive(data)
            elif isinstance(event, ev.ClientFlags):
                negotiation.padding = not hands.no_zeroes
            else:
                options += 1
                if options > self.limits.options:
                    raise ProtocolError(f"more than {self.limits.options} options")
                await self._say(b"".join(map(hands.send, negotiation.answer(event))))
                if hands.state is State.CLOSED or self._out.broken:
                    return None
        self.export = negotiation.export
        return Session(
            negotiation.export_name, negotiation.structured, negotiation.contexts, hands.trailing()
        )

    async def _hear(self) -> bytes:
        """Some bytes of the handshake; none when the client is gone."""
        while True:
            try:
                return self.sock.recv(self.limits.option_bytes)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
            except OSError:
                return b""

    async def _say(self, data: bytes) -> None:
        if not self._out.send([data], len(data)):
            await self._out.drain()

    # --- transmission ----------------------------------------------------------------------
    async def _transmission(self, session: Session) -> None:
        export = self.export
        assert export is not None, "transmission without an export"
        self._out.export = export
        batch = Batch(
            self._reader,
            export,
            self._slow,
            self.limits,
            session.structured,
            bool(session.contexts),
        )
        left = False
        export.opened()
        try:
            with self._working:
                async with trio.open_nursery() as nursery:
                    self._slow.begin(nursery, export, session.structured, session.contexts)
                    with self._reading:
                        if await self._first(batch, session):
                            await self._serve(batch)
                        left = True
                await self._out.drain()
        finally:
            self._slow.payload_done()
            export.closed()
        if batch.error is not None:
            raise batch.error
        if self._freezing and not left and not self._out.broken:
            self.session = self._carried_on(session, batch.waiting())
            self.frozen = True

    def _carried_on(self, session: Session, waiting: Request | None) -> Session:
        """The session as another process finds it: requests without a reply first, then what was not parsed."""
        unanswered = self._slow.unanswered() + ([] if waiting is None else [waiting])
        requests = [b"".join(encode_request(one)) for one in unanswered]
        unparsed = b"".join([*requests, self._reader.unparsed(), self._unfed])
        return replace(session, unparsed=unparsed, unsent=self._out.unsent())

    async def _first(self, batch: Batch, session: Session) -> bool:
        """Serves what came before this connection's first recv: behind the handshake, or in another process."""
        if session.unsent and not self._out.send([session.unsent], len(session.unsent)):
            await self._out.drain()
        self._unfed = memoryview(session.unparsed)
        while self._unfed:
            self._unfed = self._unfed[self._reader.feed(self._unfed) :]
            if not await self._answer(batch):
                return False
            if self._reader.wanted():
                await self._payload_room(self._reader.wanted())
        return True

    async def _serve(self, batch: Batch) -> None:
        """Reads and answers requests until the client leaves."""
        reader = self._reader
        while await self._answer(batch):
            if reader.wanted():
                await self._payload_room(reader.wanted())
            count = await self._receive(reader.space())
            if not count:
                return
            reader.received(count)
            now = perf_counter()
            if now > self._turn_ends:
                await self._yield_turn()

    async def _answer(self, batch: Batch) -> bool:
        """Answers all that has been received; False when the client has left."""
        while True:
            outcome = batch.run()
            buffers, total = batch.take()
            if buffers and not self._out.send(buffers, total):
                await self._out.drain()
            if outcome is Outcome.ALL_TAKEN:
                return not self._out.broken
            if outcome is Outcome.LEFT or outcome is Outcome.BROKEN or self._out.broken:
                return False
            if outcome is Outcome.NO_ROOM:
                await self._wait_for_room()
            elif perf_counter() > self._turn_ends:
                await self._yield_turn()

    async def _wait_for_room(self) -> None:
        if not self._slow.count:
            self._shed()
        await self._slow.room()

    async def _payload_room(self, size: int) -> None:
        while not self._slow.expect(size):
            await self._wait_for_room()
        self._slow.payload_since = trio.current_time()

    async def _yield_turn(self) -> None:
        """Lets other tasks run; a connection that finds another one busy takes shorter turns and does not poll."""
        _Turn.last = self
        await trio.lowlevel.checkpoint()
        self._alone = _Turn.last is self
        self._turn_ends = perf_counter() + self.limits.turn_seconds * (1.0 if self._alone else 0.2)

    async def _receive(self, space: memoryview) -> int:
        """Receives into `space`, and awaits only if nothing is there; 0 when the client is gone.

        Before it sleeps it polls, for as long as waking up would cost, if the last request came that fast and nobody
        else is kept waiting.
        """
        recv_into = self.sock.recv_into
        try:
            try:
                return recv_into(space)
            except BlockingIOError:
                pass
            asleep = perf_counter()
            if self._keen and self._alone and not self._slow.count:
                limit = asleep + self.limits.poll_seconds
                while perf_counter() < limit:
                    sched_yield()  # the client may be waiting for this very core
                    try:
                        return recv_into(space)
                    except BlockingIOError:
                        pass
            _Turn.last = self
            while True:
                await trio.lowlevel.wait_readable(self.sock)
                now = perf_counter()
                self._keen = now - asleep < 4 * self.limits.poll_seconds
                self._alone = _Turn.last is self
                self._turn_ends = now + self.limits.turn_seconds
                try:
                    return recv_into(space)
                except BlockingIOError:
                    pass
        except OSError:
            return 0
