# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where the requests of one connection wait for the throttle of its export, in the receive buffer.

A request that waits has no task, and no memory is reserved for it. Meanwhile the socket is read as long as the buffer
has room: a FLUSH overtakes what waits, and a client that hangs up is noticed.
"""

import contextlib
import select
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Protocol

import trio

from forebay_nbd.protocol.requests import RequestReader
from forebay_nbd.throttle.held import Held
from forebay_nbd.throttle.throttle import Throttle, Waiter

LOOK_SECONDS: Final = 1.0
"""How often is looked whether a client is there whose requests fill the buffer."""


class Turn(Protocol):
    """What a connection may keep the event loop for."""

    async def end_if_due(self) -> None:
        """Lets others run, if it has lasted as long as it may."""

    def begin(self) -> None:
        """Others have just run."""


class Turnstile:
    """Of one connection. Nothing but :meth:`while_open` and :meth:`serve` awaits."""

    def __init__(self, sock: socket.socket, reader: RequestReader, in_place: int) -> None:
        self._sock = sock
        self._reader = reader
        self._held = Held(reader, in_place)
        self._throttle: Throttle | None = None
        self._waiter: Waiter | None = None
        self._open: trio.CancelScope | None = None
        """Of what is served without asking."""
        self._asleep: trio.CancelScope | None = None
        """Of rest(), while it waits."""
        self._has_ended = False
        """The client sends nothing more. It may read replies still."""

    @contextlib.contextmanager
    def of(self, throttle: Throttle | None) -> Iterator[None]:
        """Around the transmission of a connection to an export with that throttle."""
        self._throttle = throttle
        if throttle is not None:
            self._waiter = throttle.enter(self._look_again)
        try:
            yield
        finally:
            self._held.forget()
            if self._waiter is not None:
                self._waiter.leave()
                self._waiter = None

    @property
    def is_shut(self) -> bool:
        """True if requests have to ask before they are carried out."""
        return self._throttle is not None and self._throttle.is_on

    def _look_again(self) -> None:
        if self._asleep is not None:
            self._asleep.cancel()
        if self._open is not None and self.is_shut:
            self._open.cancel()

    @contextlib.contextmanager
    def while_open(self) -> Iterator[None]:
        """Around what serves requests without asking: it is cancelled when they have to ask."""
        if self._throttle is None:
            yield
            return
        try:
            with trio.CancelScope() as self._open:
                yield
        finally:
            self._open = None

    async def serve(
        self,
        answer: Callable[[], Awaitable[bool]],
        receive: Callable[[], Awaitable[bool]],
        turn: Turn,
        *,
        receives: bool = True,
    ) -> bool:
        """Have requests answered as fast as the throttle says. True once nobody has to ask; False if the client left.

        `answer` carries out what the reader shows, which is all of it when it returns True; False: the client has left.
        `receive` receives more, however long that takes, and returns the same; it may carry out requests meanwhile that
        it has asked for. Unless it `receives`, nothing is
        received here, and it returns True as well when no complete request is left.
        """
        self._held.hide_all()
        try:
            if not await answer():  # a request that the reader has handed out before
                return False
            while self.is_shut:
                await turn.end_if_due()
                is_large = bool(self._reader.large_payload())
                wait = None if is_large else self._let_in()
                if wait is None:
                    if not receives:
                        return True
                    self._held.forget()  # nothing waits, and `receive` may carry out what may be carried out
                    if self._has_ended or not await receive():
                        return False
                elif wait and not await self._rest(wait, turn, receives=receives):
                    return False
                if (is_large or wait == 0.0) and not await answer():
                    return False
        finally:
            self._held.forget()
            if self._waiter is not None:
                self._waiter.pass_on()
        return True

    def _let_in(self) -> float | None:
        """See `Held.let_in`. It has a place among those that wait only if it does, and has nothing else to do."""
        assert self._waiter is not None, "outside of()"
        wait = self._held.let_in(self._waiter.admit)
        if wait:
            self._waiter.wait()
        else:
            self._waiter.pass_on()
        return wait

    async def _rest(self, wait: float, turn: Turn, *, receives: bool) -> bool:
        """Receive what is there; if nothing is, wait for that, at most so many seconds. False if the client is gone.

        Where it does not wait the turn goes on, and ends when it is due: there may be something all the time.
        """
        space = self._held.space() if receives and not self._has_ended else None
        if space:
            received = self._received(space)
            if received is not None:
                return received or not self._has_hung_up()
        elif self._has_hung_up():
            return False
        seconds = wait if space else min(wait, LOOK_SECONDS)
        try:
            with trio.CancelScope(deadline=trio.current_time() + seconds) as self._asleep:
                if space:
                    await trio.lowlevel.wait_readable(self._sock)
                else:
                    await trio.sleep_forever()
        finally:
            self._asleep = None
        turn.begin()
        return True

    def _received(self, space: memoryview) -> bool | None:
        """Receive into `space`. None: nothing is there; False: nothing will be."""
        try:
            count = self._sock.recv_into(space)
        except BlockingIOError:
            return None
        except OSError:
            count = 0
        if not count:
            self._has_ended = True
            return False
        self._reader.received(count)
        return True

    def _has_hung_up(self) -> bool:
        """True if nobody takes replies any more."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))
