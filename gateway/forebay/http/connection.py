# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One client's connection: a request after the other, parsed and framed by h11. HTTP/1.0 and 1.1, RFC 9112.

What a client may send has bounds: of a head by h11, of a body by who reads it, of time here.
"""

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from email.utils import formatdate
from typing import Any

import h11
import trio

from forebay.http.messages import Answer, HTTPException, HungUp, JSONResponse, Request

MOST_HEAD = 16 << 10
"""Bytes of a request's head."""

MOST_AHEAD = 64 << 10
"""Bytes that a client may send before its last request is answered; one with more is taken for gone."""

REQUEST_SECONDS = 60.0
"""How long a client may take to send a request, from when the one before it was answered."""

MOST_LEFT = 1 << 20
LEFT_SECONDS = 5.0
"""How much of a body that nobody wanted, and for how long, is read before the connection is closed: a client that still
sends would not see the answer.
"""

RECEIVE_SIZE = 16 << 10

Handler = Callable[[Request], Awaitable[Answer]]
"""Answers one request. May raise HTTPException; any other fault ends the connection."""


async def serve_connection(
    stream: trio.abc.Stream, handler: Handler, *, send_seconds: float = math.inf
) -> None:
    """Answer one client until it hangs up, is too slow, or sends what is no HTTP. Raises what `handler` raises.

    `send_seconds` is how long it may take to read what is sent, each part.
    """
    connection = _Connection(stream, send_seconds)
    try:
        while await connection.answer_one(handler):
            pass
    except HungUp:
        pass


def refusal(fault: HTTPException) -> Answer:
    """The answer that says so."""
    return JSONResponse({"error": fault.detail}, fault.status_code, headers=fault.headers)


class _Connection:
    """The exchange that goes on, and the parser between two."""

    def __init__(self, stream: trio.abc.Stream, send_seconds: float) -> None:
        self._stream = stream
        self._send_seconds = send_seconds
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD)
        self.request: Request
        self._needs_body: bool
        """False while the answer is one to HEAD."""

    # -- an exchange

    async def answer_one(self, handler: Handler) -> bool:
        """Answer the next request. False if there is no other after it. Raises HungUp, and what `handler` raises."""
        deadline = trio.current_time() + REQUEST_SECONDS
        self._needs_body = True
        try:
            answer = await self._taken(handler, deadline)
        except HTTPException as fault:
            answer = refusal(fault)
        except trio.TooSlowError:
            return False
        if answer is None or self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        await answer.send(self)
        return await self._end()

    async def _taken(self, handler: Handler, deadline: float) -> Answer | None:
        """What the handler answers to the next request; None if none comes any more."""
        with trio.fail_at(deadline):
            head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        self._needs_body = head.method != b"HEAD"
        method, target = head.method.decode("ascii"), head.target.decode("ascii", "replace")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        self.request = Request(method, target, self._body(deadline), headers)
        return await handler(self.request)

    async def _body(self, deadline: float) -> AsyncGenerator[bytes, None]:
        """The parts of the body. Raises HTTPException; 408 when they do not come in time."""
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        while self._http.their_state is h11.SEND_BODY:
            try:
                with trio.fail_at(deadline):
                    event = await self._event()
            except trio.TooSlowError:
                raise HTTPException(
                    408, "the request did not come as a whole: send it again"
                ) from None
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def _end(self) -> bool:
        """End the answer. True if another request may come on this connection."""
        await self._send(h11.EndOfMessage())
        if self._http.their_state is h11.SEND_BODY:
            await self._read_what_is_left()
        if self._http.our_state is self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return True
        return False

    async def _read_what_is_left(self) -> None:
        left = MOST_LEFT
        with trio.move_on_after(LEFT_SECONDS):
            while left > 0 and self._http.their_state is h11.SEND_BODY:
                try:
                    event = await self._event()
                except HTTPException:
                    return
                left -= len(event.data) if isinstance(event, h11.Data) else 0

    # -- Exchange

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head. Raises HungUp."""
        dated = {"date": formatdate(usegmt=True), **headers}
        await self._send(h11.Response(status_code=status, headers=list(dated.items())))

    async def write(self, data: bytes) -> None:
        """Send a part of the body. Raises HungUp."""
        if self._needs_body:
            await self._send(h11.Data(data=data))

    async def hung_up(self) -> None:
        """Return when the client has hung up, or sends more than is sensible before it is answered."""
        ahead = len(self._http.trailing_data[0])
        while ahead <= MOST_AHEAD:
            try:
                ahead += await self._receive()
            except HungUp:
                return
            if self._http.trailing_data[1]:  # the end of what it sends
                return

    # -- the stream

    async def _event(self) -> Any:
        """The next event of the client. Raises HungUp, and HTTPException for what is no request."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as fault:
                text = f"no HTTP request: {fault}"
                raise HTTPException(fault.error_status_hint, text) from None
            if event is not h11.NEED_DATA:
                return event
            await self._receive()

    async def _receive(self) -> int:
        """Hand the next bytes to the parser. Raises HungUp."""
        try:
            data = await self._stream.receive_some(RECEIVE_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise HungUp from None
        self._http.receive_data(bytes(data))
        return len(data)

    async def _send(self, event: h11.Event) -> None:
        """Raises HungUp."""
        data = self._http.send(event)
        try:
            with trio.fail_after(self._send_seconds):
                await self._stream.send_all(data or b"")
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            raise HungUp from None
