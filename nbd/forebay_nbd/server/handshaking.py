# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The server's side of the handshake on a socket."""

import math
import socket
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.handshake import ServerHandshake, State
from forebay_nbd.protocol.session import Session
from forebay_nbd.protocol.wire import ProtocolError
from forebay_nbd.server.budget import Share
from forebay_nbd.server.export import Exports, Refused
from forebay_nbd.server.limits import REFUSAL_SECONDS, Limits
from forebay_nbd.server.negotiation import Negotiation
from forebay_nbd.server.outbox import Outbox


class Handshaking:
    """The time that a client has for its handshake. What the server takes to look for its export does not count."""

    def __init__(self, limits: Limits) -> None:
        self.is_looking = False
        """The server looks for the export that the client has named, or for all: it is not the client that is slow."""
        self._limits = limits
        self._scope = trio.CancelScope()

    def scope(self) -> trio.CancelScope:
        """Around the handshake: it ends the body when the client has been too slow. The time begins now."""
        self._scope.deadline = trio.current_time() + self._limits.handshake_seconds
        return self._scope

    def cancel(self) -> None:
        """Ends the handshake, now or as soon as it begins."""
        self._scope.cancel()

    async def look_up(self, exports: Exports, option: ev.ClientOption) -> None:
        """Finds out what the answer to an option depends on. Names that are too long are unknown anyway."""
        left = self._scope.deadline - trio.current_time()
        self._scope.deadline, self.is_looking = math.inf, True
        try:
            if isinstance(option, ev.ListExports):
                await exports.look_around()
            name = option.name if isinstance(option, ev.NamesExport) else None
            if name is not None and len(name.encode()) <= self._limits.name_bytes:
                await exports.look(name)
        finally:
            self._scope.deadline, self.is_looking = trio.current_time() + left, False


async def do_handshake(
    sock: socket.socket,
    out: Outbox,
    limits: Limits,
    negotiation: Negotiation,
    look: Callable[[ev.ClientOption], Awaitable[None]],
) -> Session | None:
    """Greets a client and answers its options until it asks for transmission.

    `look` finds out about an option what `negotiation` is going to be asked for.
    Returns the session, with what the client has sent beyond the handshake as `unparsed`; `negotiation` has the export.
    Returns None if the client left. Raises ProtocolError if it broke the protocol or sent too many options.
    """
    handshake = ServerHandshake(limits.option_bytes, limits.queries)
    await _send(out, handshake.send(ev.Greeting(handshake.FLAGS)))
    options = 0
    while handshake.state is not State.TRANSMISSION:
        event = handshake.next_event()
        if isinstance(event, ev.NeedData):
            data = await _receive(sock, limits.option_bytes)
            if not data:
                return None
            handshake.receive(data)
        elif isinstance(event, ev.ClientFlags):
            negotiation.padding = not handshake.no_zeroes
        else:
            options += 1
            if options > limits.options:
                raise ProtocolError(f"more than {limits.options} options")
            await look(event)
            await _send(out, b"".join(map(handshake.send, negotiation.answer(event))))
            if handshake.state is State.CLOSED or out.broken:
                return None
    return Session(
        negotiation.export_name, negotiation.structured, negotiation.contexts, handshake.trailing()
    )


async def refuse(sock: socket.socket, limits: Limits, budget: Share, reason: str) -> None:
    """Answers whatever a client asks for with `reason`, until it leaves or has had REFUSAL_SECONDS, and hangs up."""

    def raise_refused(*_: object) -> NoReturn:
        raise Refused(reason)

    async def look(_: ev.ClientOption) -> None:
        """There is nothing to find out."""

    with trio.move_on_after(REFUSAL_SECONDS) as scope:
        out = Outbox(sock, limits, budget, scope.cancel)
        try:
            await do_handshake(sock, out, limits, Negotiation(raise_refused, raise_refused), look)
        except ProtocolError:
            pass  # EXPORT_NAME, which has no reply that says no, or a client that breaks the protocol
        finally:
            out.discard()
            trio.lowlevel.notify_closing(sock)
            sock.close()


async def _receive(sock: socket.socket, most: int) -> bytes:
    """At least one byte from the client, and at most `most`; none if it is gone."""
    while True:
        try:
            return sock.recv(most)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
        except OSError:
            return b""


async def _send(out: Outbox, data: bytes) -> None:
    """Sends `data`, unless the client is gone."""
    if not out.send([data], len(data)):
        await out.drain()
