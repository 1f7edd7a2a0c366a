# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The NBD server: it accepts connections on a socket, bounds their number, and keeps their failures apart."""

import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from functools import partial

import trio

from forebay_nbd.protocol.session import Session
from forebay_nbd.protocol.wire import ProtocolError
from forebay_nbd.server.budget import Budgets, Share
from forebay_nbd.server.connection import Connection
from forebay_nbd.server.export import Exports, Refused
from forebay_nbd.server.handshaking import refuse
from forebay_nbd.server.limits import OWN_CONNECTIONS, REFUSALS, Limits
from forebay_nbd.server.places import Places, Process

log = logging.getLogger(__name__)

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
"""Errors of accept() that say that process or host have run out of something."""
_PAUSE_SECONDS = 0.1
"""How long the server waits after one of them before it accepts again."""


class Server:
    """Serves exports to all clients of one listener.

    `exports` makes what the client of a connection may have. `may_connect` is given each new connection before a byte
    is sent; it is closed if that returns False. Both are called in the event loop, and must not take long. `budgets`
    are the memory that all servers of the process share; without them the server has some of its own. One part of
    `share` of what is there for connections is as much as this one gets of it. `on_session` is told, as `may_connect`
    is asked, when a client is past the handshake (True), and when it leaves (False).
    """

    def __init__(
        self,
        exports: Callable[[Connection], Exports],
        limits: Limits | None = None,
        may_connect: Callable[[socket.socket], bool] = lambda _sock: True,
        budgets: Budgets | None = None,
        share: int = 4,
        on_session: Callable[[Connection, bool], None] = lambda _connection, _begins: None,
    ) -> None:
        self._may_connect = may_connect
        self._exports = exports
        self._on_session = on_session
        self.limits = limits or Limits()
        self.connections: set[Connection] = set()
        self._places = Places(self.limits.connections)
        budgets = budgets or Budgets()
        own = self.limits.own_bytes
        self._budget = Share(budgets.requests, own, self.limits.server_bytes)
        self._status = Share(budgets.status, own, own + budgets.status.limit // 4)
        self._status.holders = self._budget.holders
        own = OWN_CONNECTIONS * self.limits.connection_bytes
        most = budgets.connections.limit // share
        self._memory = Share(budgets.connections, own, own + most)
        self.refusals = 0
        """Clients that are being told that there is no room for them."""
        self._held: dict[Connection, int] = {}
        """Bytes of the memory for connections that each of them has."""

    async def serve(
        self,
        listener: trio.abc.Listener[trio.SocketStream],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts and serves connections until cancelled; then closes the listener, and calls stop().

        Returns when all of them have ended. Raises OSError if the listener fails.
        """
        async with trio.open_nursery() as nursery:
            task_status.started()
            try:
                async with listener:
                    while True:
                        sock = await self._accept(listener)
                        if sock is None:
                            continue
                        if why := self._why_no_room(sock):
                            nursery.start_soon(self._refuse, sock, why)
                        else:
                            nursery.start_soon(self._run, self._add(sock))
            finally:
                self.stop()

    def stop(self) -> None:
        """Stops all connections: they take no more requests, and end when those in flight are done."""
        for connection in self.connections:
            connection.stop()

    async def resume(self, sock: socket.socket, session: Session) -> None:
        """Goes on with a connection that another process has suspended; returns when it has ended.

        The socket is closed at once if there is no export of that name any more.
        """
        connection = self._add(sock)
        exports = self._exports(connection)
        await self._supervise(connection, exports, self._go_on(connection, exports, session))

    async def _go_on(self, connection: Connection, exports: Exports, session: Session) -> None:
        """Raises what Connection.resume() raises."""
        export = None
        try:
            await exports.look(session.export_name)
            export = exports.find(session.export_name)
        except Refused as refused:
            log.info("a connection of before is not gone on with: %s", refused)
        finally:
            if export is None:
                connection.sock.close()
        if export is not None:
            await connection.resume(session, export)

    def _add(self, sock: socket.socket) -> Connection:
        """A new connection on a connected socket, counted as one of this server's. The caller has to run it.

        One that another process has suspended is not refused: where there is no memory for it, it has it uncounted.
        """
        sock.setblocking(False)
        _set_options(sock, self.limits.send_buffer)
        connection = Connection(sock, self.limits, self._budget, self._status)
        connection.on_session = partial(self._on_session, connection)
        size = self.limits.connection_bytes
        self._held[connection] = size if self._memory.reserve(size) else 0
        self.connections.add(connection)
        self._places.add(connection, Process.at(sock))
        self._budget.holders.add(connection)
        return connection

    def _remove(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._places.remove(connection)
        self._budget.holders.discard(connection)
        self._memory.release(self._held.pop(connection))

    async def _accept(self, listener: trio.abc.Listener[trio.SocketStream]) -> socket.socket | None:
        """The socket of the next client; None if it may not connect, or something was exhausted. Raises OSError."""
        try:
            stream = await listener.accept()
        except OSError as exc:
            if exc.errno not in _EXHAUSTED:
                raise
            log.error("cannot accept a connection: %s", exc.strerror)
            await trio.sleep(_PAUSE_SECONDS)
            return None
        sock = socket.socket(fileno=stream.socket.detach())
        if not self._may_connect(sock):
            sock.close()
            return None
        return sock

    def _why_no_room(self, sock: socket.socket) -> str:
        """Why there is no room for a client that has connected; empty if there is."""
        if not self._places.has_room_for(Process.at(sock)):
            return f"{self.limits.connections} connections to this socket at most: try again when others have ended"
        if not self._memory.has_room(self.limits.connection_bytes):
            return "no memory is left for connections: try again when others have ended"
        return ""

    async def _refuse(self, sock: socket.socket, why: str) -> None:
        """Tells a client for which there is no room, unless too many are being told, and hangs up."""
        log.info("a client is refused: %s", why)
        if self.refusals >= REFUSALS:
            sock.close()
            return
        sock.setblocking(False)
        self.refusals += 1
        try:
            await refuse(sock, self.limits, self._budget, why)
        finally:
            self.refusals -= 1

    async def _run(self, connection: Connection) -> None:
        exports = self._exports(connection)
        await self._supervise(connection, exports, connection.run(exports))

    async def _supervise(
        self, connection: Connection, exports: Exports, serving: Coroutine[object, object, None]
    ) -> None:
        """Awaits `serving`, the run() or resume() of a connection, and logs any exception that it raises.

        So no failure of one connection reaches the others or the server.
        """
        try:
            await serving
        except ProtocolError as exc:
            log.info("connection dropped: %s", exc)
        except Exception as exc:
            if isinstance(exc, ExceptionGroup) and exc.split(ProtocolError)[1] is None:
                log.info("connection dropped: %s", exc.exceptions[0])
            else:
                log.exception("connection failed")
        finally:
            self._remove(connection)
            exports.close()


def _set_options(sock: socket.socket, send_buffer: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
