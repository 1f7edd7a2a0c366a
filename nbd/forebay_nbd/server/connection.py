# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One client of the server: the handshake, then its requests, until it leaves or the server stops.

The hot path awaits nothing: all requests that one recv() brought are decoded, those that need not wait are answered by
read_now() and write_now(), and one sendmsg() sends the replies. Each request that has to wait becomes a task (slow.py).
No await may come between read_now() and the sendmsg() of the buffer that it returned, but for one under the pin of the
outbox.
"""

import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import trio

import forebay_fast
from forebay_fast.loop import wait_of_loop
from forebay_nbd.protocol.events import Request
from forebay_nbd.protocol.requests import RequestReader, encode_request
from forebay_nbd.protocol.session import Session
from forebay_nbd.server.batch import Batch, Outcome, compiled_turn
from forebay_nbd.server.budget import Share
from forebay_nbd.server.export import Export, Exports
from forebay_nbd.server.handshaking import Handshaking, do_handshake
from forebay_nbd.server.limits import Limits
from forebay_nbd.server.negotiation import Negotiation
from forebay_nbd.server.outbox import Outbox
from forebay_nbd.server.phase import MOVES, Phase
from forebay_nbd.server.polling import Turns
from forebay_nbd.server.slow import SlowRequests
from forebay_nbd.throttle.turnstile import Turnstile


class Connection:
    """A connected client. run() or resume() serves it; stop(), suspend() and abort() end that from outside.

    The socket must not block. `budget` and `status` are the shares of the server that the connection belongs to: of the
    memory for requests, and for BLOCK_STATUS.
    """

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        budget: Share,
        status: Share | None = None,
    ) -> None:
        self.sock = sock
        self.limits = limits
        self.phase = Phase.HANDSHAKE
        self.export: Export | None = None
        """The export of GO or EXPORT_NAME; None before that."""
        self.on_session: Callable[[bool], None] = lambda _begins: None
        """Called with True when transmission begins, and with False when it ends and is not suspended."""
        self.is_resumed = False
        """True for one that another process has suspended."""
        self.session: Session | None = None
        """Set once transmission has begun. In phase SUSPENDED it says how to go on with the socket."""
        self._serving = trio.CancelScope(shield=True)
        """All of run(); cancelled by abort()."""
        self.handshaking = Handshaking(limits)
        """The handshake's time; cancelled by stop()."""
        self._reading = trio.CancelScope()
        """Reading of requests; cancelled by stop()."""
        self._working = trio.CancelScope()
        """Transmission with the tasks of requests that wait; cancelled by cancel_requests()."""
        self._out = Outbox(sock, limits, budget, self.abort)
        self._slow = SlowRequests(self._out, limits, budget, status or budget)
        self._reader = RequestReader(limits.receive_buffer, limits.in_place_bytes)
        self._turnstile = Turnstile(sock, self._reader, limits.in_place_bytes)
        self._turns = Turns(sock, limits)
        self._unfed = memoryview(b"")
        """What the session brought as `unparsed` and the reader has not been fed yet."""

    # --- from outside ----------------------------------------------------------------------
    def abort(self) -> None:
        """Ends the connection at once: requests in flight are cancelled, replies not sent are dropped."""
        self._serving.cancel()

    def stop(self) -> None:
        """Takes no more requests; those in flight complete and are answered, within `shutdown_seconds`.

        What the client sends meanwhile is not answered with ESHUTDOWN: a client that reconnects sends it again, and
        would otherwise see an error.
        """
        if self.phase in (Phase.HANDSHAKE, Phase.TRANSMISSION):
            self._enter(Phase.STOPPING)
        self.handshaking.cancel()
        self._reading.cancel()
        self._serving.deadline = min(
            self._serving.deadline, trio.current_time() + self.limits.shutdown_seconds
        )

    def suspend(self) -> None:
        """As stop(), but run() leaves the socket open and `session` complete, for another process to resume().

        Once run() has returned, the phase is SUSPENDED if that worked. It does only in transmission, and if the client
        has not left; a handshake is ended.
        """
        if self.phase in (Phase.HANDSHAKE, Phase.TRANSMISSION, Phase.STOPPING):
            self._enter(Phase.SUSPENDING)
        self.stop()

    def cancel_requests(self) -> None:
        """Called after suspend(), to wait for nothing any more: requests without a reply become part of `session`.

        They may have been carried out, and the other process carries them out again. That is right for each command,
        since the client has not been told that it was done.
        """
        self._working.cancel()

    @property
    def unanswered_since(self) -> float | None:
        """Trio time since when the oldest request that had to wait does so; None if none does."""
        return self._slow.unanswered_since

    @property
    def answered(self) -> int:
        """Number of requests that had to wait and were answered."""
        return self._slow.answered

    @property
    def stalled_since(self) -> float | None:
        """Trio time since when the client takes no replies, or does not send the rest of a payload, or hardly any.

        None if the server does not wait for it.
        """
        return self._out.stalled_since or self._slow.payload_pace.since

    # --- life ----------------------------------------------------------------------
    async def run(self, exports: Exports) -> None:
        """Serves the client from the handshake on, until it leaves, or stop(), suspend() or abort() is called.

        `exports` are what the client may have; the caller closes them. Closes the socket, but in phase SUSPENDED.
        Raises ProtocolError if the client broke the protocol, and passes on what an export raises in a method that is
        not async, beside OSError. Shielded from cancellation: use stop() or abort().
        """
        with self._serving:
            try:
                negotiation = Negotiation(exports.find, exports.names, self.limits.name_bytes)
                look_up = partial(self.handshaking.look_up, exports)
                with self.handshaking.scope():
                    self.session = await do_handshake(
                        self.sock, self._out, self.limits, negotiation, look_up
                    )
                if self.session is not None:
                    self.export = negotiation.export
                    await self._transmission(self.session)
            finally:
                self._close()

    async def resume(self, session: Session, export: Export) -> None:
        """As run(), for a connection to `export` that another process has suspended with this session."""
        self.export, self.session, self.is_resumed = export, session, True
        with self._serving:
            try:
                await self._transmission(session)
            finally:
                self._close()

    def _enter(self, phase: Phase) -> None:
        """Enters the next phase, which must be one that MOVES allows."""
        assert phase in MOVES[self.phase], f"{self.phase.value} must not become {phase.value}"
        self.phase = phase

    def _close(self) -> None:
        self._out.discard()
        trio.lowlevel.notify_closing(self.sock)
        if self.phase is not Phase.SUSPENDED:
            self._enter(Phase.CLOSED)
            self.sock.close()

    # --- transmission ----------------------------------------------------------------------
    async def _transmission(self, session: Session) -> None:
        """Answers requests until the client leaves or stop() is called, and waits for those in flight.

        Raises ProtocolError if the client broke the protocol, after its requests before that were answered.
        """
        export = self.export
        assert export is not None, "transmission without an export"
        if self.phase is Phase.HANDSHAKE:
            self._enter(Phase.TRANSMISSION)
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
        self.on_session(True)
        try:
            with self._working:
                async with trio.open_nursery() as nursery:
                    self._slow.begin(nursery, export, session.structured, session.contexts)
                    with self._reading, self._turnstile.of(export.throttle):
                        if await self._serve_session(batch, session):
                            await self._serve(batch, session.structured)
                        left = True
                await self._out.drain()
        finally:
            self._slow.release_payload()
            export.closed()
            if self.phase is not Phase.SUSPENDING:
                self.on_session(False)
        if batch.error is not None:
            raise batch.error
        if self.phase is Phase.SUSPENDING and not left and not self._out.broken:
            self.session = self._session_to_resume(session, batch.waiting)
            self._enter(Phase.SUSPENDED)

    def _session_to_resume(self, session: Session, waiting: Request | None) -> Session:
        """The session for another process. Requests without a reply come first in it, then those not decoded.

        `waiting` is the request that was decoded and for which there was no room. Raises OSError if replies that are
        not sent cannot be read.
        """
        unanswered = self._slow.unanswered() + ([] if waiting is None else [waiting])
        requests = [b"".join(encode_request(one)) for one in unanswered]
        unparsed = b"".join([*requests, self._reader.unparsed(), self._unfed])
        return replace(session, unparsed=unparsed, unsent=self._out.unsent())

    async def _serve_session(self, batch: Batch, session: Session) -> bool:
        """Sends and answers what `session` brought: sent behind the handshake, or received by another process.

        False if the client has left.
        """
        if session.unsent and not self._out.send([session.unsent], len(session.unsent)):
            await self._out.drain()
        self._unfed = memoryview(session.unparsed)
        while self._unfed:
            self._unfed = self._unfed[self._reader.feed(self._unfed) :]
            if self._turnstile.is_shut and not await self._serve_in_turn(batch, receives=False):
                return False
            if not await self._answer_received(batch):
                return False
            if self._reader.large_payload():
                await self._reserve_payload(self._reader.large_payload())
        return True

    async def _serve(self, batch: Batch, structured: bool) -> None:
        """Receives and answers requests until the client leaves."""
        turn = compiled_turn(
            self._reader, self.export, self._out, self.sock, self.limits, structured
        )
        while True:
            if not self._turnstile.is_shut:
                with self._turnstile.while_open():
                    await self._serve_at_once(batch, turn)
                    return
            if not await self._serve_in_turn(batch, turn):
                return

    async def _serve_in_turn(
        self,
        batch: Batch,
        turn: "forebay_fast.core.Turn | None" = None,
        *,
        receives: bool = True,
    ) -> bool:
        """Serves as fast as the export's throttle says: see `Turnstile.serve`. False if the client has left.

        Where nothing waits the core serves, and asks by itself.
        """

        async def answer() -> bool:
            batch.since = perf_counter()  # what it has waited for its turn does not count
            return await self._answer_received(batch)

        async def receive() -> bool:
            if turn is not None and not self._reader.large_payload() and turn.may_receive():
                return await self._serve_by_core(batch, turn)
            return await self._receive_any()

        return await self._turnstile.serve(answer, receive, self._turns, receives=receives)

    async def _serve_at_once(self, batch: Batch, turn: "forebay_fast.core.Turn | None") -> None:
        """Receives and answers requests, which have to ask nobody, until the client leaves."""
        reader = self._reader
        while await self._answer_received(batch):
            if reader.large_payload():
                await self._reserve_payload(reader.large_payload())
            elif turn is not None and turn.may_receive():
                if not await self._serve_by_core(batch, turn):
                    return
                continue
            if not await self._receive_more():
                return
            batch.since = perf_counter()

    async def _serve_by_core(self, batch: Batch, turn: "forebay_fast.core.Turn") -> bool:
        """As `_serve_plain`; what the core has begun is Python's afterwards, also when this is cancelled."""
        try:
            return await self._serve_plain(turn)
        finally:
            self._slow.take_over(turn.take_flush())
            batch.since = turn.since
            if turn.waits and self.phase is Phase.STOPPING:  # a READ, which gets a task
                batch.run()
                self._out.send(*batch.take_replies())

    async def _receive_more(self) -> bool:
        """Receives what is there, or comes next; False if the client has left."""
        count = await self._turns.receive(self._reader.space(), may_poll=not self._slow.count)
        self._reader.received(count)
        if self._slow.payload_pace.since is not None:
            self._slow.payload_pace.move(count)
        await self._turns.end_if_due()
        return bool(count)

    async def _receive_any(self) -> bool:
        """The same; for a payload that has memory of its own, once that is reserved."""
        if self._reader.large_payload():
            await self._reserve_payload(self._reader.large_payload())
        return await self._receive_more()

    async def _serve_plain(self, turn: "forebay_fast.core.Turn") -> bool:
        """Has the core receive and answer requests. True once it has received another one; False if the client left."""
        core, wait = forebay_fast.core, wait_of_loop()
        turn.may_flush = wait is not None
        while True:
            status = turn.run(self._turns.end_at)
            if status == core.WAIT and wait is not None:
                status = await self._turns.rest(wait, turn)
            if status == core.WAIT:
                if not await self._turns.wait_for_more(turn, may_poll=not self._slow.count):
                    return False
            elif status == core.YIELD:
                await self._turns.end()
            elif status == core.UNSENT:
                self._slow.take_over(turn.take_flush())
                await self._out.drain()
            else:
                return status == core.OTHER

    async def _answer_received(self, batch: Batch) -> bool:
        """Answers all that has been received; False if the client has left, or broke the protocol (`batch.error`)."""
        while True:
            outcome = batch.run()
            buffers, total = batch.take_replies()
            if buffers and not self._out.send(buffers, total):
                batch.note_time()
                await self._out.drain()
            else:
                batch.note_time()
                batch.note_sent()
            if outcome is Outcome.NEEDS_DATA:
                return not self._out.broken
            if (
                outcome is Outcome.DISCONNECT
                or outcome is Outcome.PROTOCOL_ERROR
                or self._out.broken
            ):
                return False
            if outcome is Outcome.NO_ROOM:
                await self._wait_for_room()
            elif perf_counter() > self._turns.end_at:
                await self._turns.end()

    async def _wait_for_room(self) -> None:
        """Returns when there may be room for a request. If others hold the memory, one of them may be dropped first."""
        if not self._slow.count:
            self._slow.drop_stalled()
        await self._slow.wait_for_room()

    async def _reserve_payload(self, size: int) -> None:
        """Returns when memory is reserved for a payload of `size` bytes that is being received."""
        while not self._slow.reserve_payload(size):
            await self._wait_for_room()
