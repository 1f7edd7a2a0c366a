"""The NBD server: accepts connections on one socket and keeps them apart."""

import errno
import logging
import socket
from collections.abc import Callable, Coroutine

import trio

from forebay_nbd.protocol.wire import ProtocolError
from forebay_nbd.server.budget import Budget
from forebay_nbd.server.connection import Connection, Session
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import Limits

log = logging.getLogger(__name__)

_OUT_OF = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
_PAUSE = 0.1
"""Seconds before another accept() when the process has run out of something."""


class Server:
    """Serves exports on one listener.

    `resolve` finds an export by name; resolve("") is the default export. `names` is what LIST shows. `admits` is asked
    about each connection before a byte is said. All are called from the event loop and must not wait.
    """

    def __init__(
        self,
        resolve: Callable[[str], Export | None],
        names: Callable[[], list[str]],
        limits: Limits | None = None,
        admits: Callable[[socket.socket], bool] = lambda _sock: True,
    ) -> None:
        self._admits = admits
        self._resolve = resolve
        self._names = names
        self.limits = limits or Limits()
        self.connections: set[Connection] = set()
        self._budget = Budget(self.limits.server_bytes)

    async def serve(
        self,
        listener: trio.SocketListener,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts and serves until cancelled; then closes the listener and lets requests in flight complete."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            try:
                async with listener:
                    while True:
                        sock = await self._accept(listener)
                        if sock is not None:
                            nursery.start_soon(self._run, self.adopt(sock))
            finally:
                self.stop()

    def stop(self) -> None:
        """Ends all connections after their requests in flight."""
        for connection in self.connections:
            connection.stop()

    def adopt(self, sock: socket.socket) -> Connection:
        """A connection on a connected socket, counted as one of this server's; run() or resume() it."""
        sock.setblocking(False)
        _tune(sock, self.limits.send_buffer)
        connection = Connection(sock, self.limits, self._budget, self._shed)
        self.connections.add(connection)
        return connection

    async def resume(self, sock: socket.socket, session: Session) -> None:
        """Carries on a connection that another process froze; closes it if its export is gone."""
        connection = self.adopt(sock)
        export = self._resolve(session.export_name)
        if export is None:
            self.connections.discard(connection)
            sock.close()
            return
        await self._guard(connection, connection.resume(session, export))

    async def _accept(self, listener: trio.SocketListener) -> socket.socket | None:
        try:
            stream = await listener.accept()
        except OSError as exc:
            if exc.errno not in _OUT_OF:
                raise
            log.error("cannot accept a connection: %s", exc.strerror)
            await trio.sleep(_PAUSE)
            return None
        sock = socket.socket(fileno=stream.socket.detach())
        if not self._admits(sock):
            sock.close()
            return None
        if len(self.connections) >= self.limits.connections:
            log.info("more than %d connections: one refused", self.limits.connections)
            sock.close()
            return None
        return sock

    async def _run(self, connection: Connection) -> None:
        await self._guard(connection, connection.run(self._resolve, self._names))

    async def _guard(self, connection: Connection, life: Coroutine[object, object, None]) -> None:
        """Runs one connection; whatever happens in it stays in it."""
        try:
            await life
        except ProtocolError as exc:
            log.info("connection dropped: %s", exc)
        except Exception as exc:
            if isinstance(exc, ExceptionGroup) and exc.split(ProtocolError)[1] is None:
                log.info("connection dropped: %s", exc.exceptions[0])
            else:
                log.exception("connection failed")
        finally:
            self.connections.discard(connection)

    def _shed(self) -> None:
        """Memory is used up: drops the connection whose client has not moved for longest."""
        before = trio.current_time() - self.limits.stall_seconds
        stalled = [
            c for c in self.connections if c.stalled_since is not None and c.stalled_since <= before
        ]
        if stalled:
            victim = min(stalled, key=lambda c: c.stalled_since or 0.0)
            log.info("connection dropped: it holds memory and does not move")
            victim.abort()


def _tune(sock: socket.socket, send_buffer: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
