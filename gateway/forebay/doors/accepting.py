# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An NBD socket: it accepts clients while it is open, serves them, and is left for another process at a restart."""

import grp
import logging
import os
import pwd
import select
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from forebay.config.sections import GatewaySection
from forebay.doors.named import NamedListener, is_gone
from forebay.doors.peers import Admission, Peer
from forebay.doors.restart import Client, Sockets
from forebay.doors.tenant import Tenant
from forebay.errors import ForebayError, advice
from forebay.events.telling import tell
from forebay.image.boundary import Boundary
from forebay_nbd import Connection, Phase, Server

log = logging.getLogger("forebay.daemon")

DISKS = "disks"
"""The folder of RUN that has the sockets of disks."""

FOLDER_MODE = 0o755
"""Of such folders where they are made: clients have to reach the sockets, whose own modes say who may use them."""

LONGEST_ADDRESS = 107
"""Bytes of a Unix socket's address (unix(7))."""

BACKLOG = 4096
"""Connections that may wait to be accepted, and as many as Linux allows at first (net.core.somaxconn). QEMU opens a few
per disk; but where the queue is full, a client that does not block hears EAGAIN, and a stranger can fill a short one.
"""

HANDSHAKE_SECONDS = 0.2
"""How long who is just connecting may take before a planned restart; clients need a millisecond."""

CANCEL_SECONDS = 2.0
"""How long cancelled requests may take to end. A connection with one that does not is aborted."""

_NEW = ".new"
"""What the name of a socket ends with until owner and mode are set."""


def socket_path(run: Path, name: str, folder: str = DISKS) -> Path:
    """Where the socket of that name lies, of a disk or in another folder of RUN.

    Raises ForebayError if no socket can have so long a path.
    """
    path = run / folder / f"{name}.sock"
    length = len(os.fsencode(path)) + len(_NEW)
    if length > LONGEST_ADDRESS:
        raise ForebayError(
            f"'{name}' makes the socket's path {length - LONGEST_ADDRESS} bytes too long: "
            "choose a shorter name, or a shorter gateway.run"
        )
    return path


def make_folder(path: Path) -> None:
    """Make a folder of RUN for sockets, if it is not there. Raises OSError."""
    try:
        path.mkdir()
    except FileExistsError:
        return
    path.chmod(FOLDER_MODE)


def listen(path: Path, section: GatewaySection) -> trio.SocketListener:
    """A listening socket at `path`, which appears there when owner and mode are set. Raises OSError."""
    new = path.with_name(path.name + _NEW)
    make_folder(path.parent)  # somebody may have tidied up
    new.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(new))
        _give(new, section)
        sock.listen(BACKLOG)
        new.rename(path)
    except BaseException:
        sock.close()
        new.unlink(missing_ok=True)
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def _give(path: Path, section: GatewaySection) -> None:
    owner = pwd.getpwnam(section.socket_owner).pw_uid if section.socket_owner else -1
    group = grp.getgrnam(section.socket_group).gr_gid if section.socket_group else -1
    if (owner, group) != (-1, -1):
        os.chown(path, owner, group)
    path.chmod(section.socket_mode)


def _gone(connections: Iterable[Connection]) -> list[Connection]:
    """Those of the connections whose client has closed both directions of its socket, as the end of a process does."""
    poll = select.poll()
    found = {one.sock.fileno(): one for one in connections}
    for descriptor in found:
        if descriptor >= 0:
            poll.register(descriptor, 0)
    ended = {descriptor for descriptor, event in poll.poll(0) if event & select.POLLHUP}
    return [one for descriptor, one in found.items() if descriptor < 0 or descriptor in ended]


def tell_client(connection: Connection, begins: bool, disk: str, **image: Any) -> None:
    """Tell that a client is there, or has left, of a disk or (`image`) of an image on its store's socket."""
    known: dict[str, Any] = {}
    try:
        peer = Peer.of(connection.sock)
    except OSError:  # it cannot be asked any more
        who = "a client"
    else:
        who, known = str(peer), {"client_uid": peer.uid, "client_pid": peer.pid}
    does = "goes on after a restart" if connection.is_resumed else "connected"
    action = "connect" if begins else "disconnect"
    text = f"{who} {does if begins else 'disconnected'}"
    tell("client", text, disk, action=action, **known, **image)


class Clients:
    """Who is connected, to whatever the connections are."""

    def __init__(self, connections: Callable[[], Iterable[Connection]]) -> None:
        """`connections` gives those that there are at that moment."""
        self.connected = connections
        """Gives the connections."""

    @property
    def clients(self) -> int:
        """How many connections are past the handshake, without those whose client is gone: that has closed its end, or
        was killed, and what it asked for last is still under way.
        """
        past = [one for one in self.connected() if one.session is not None]
        return len(past) - len(_gone(past)) if past else 0

    @property
    def unanswered_since(self) -> float | None:
        """Trio time since when the oldest request without an answer is under way; None where there is none."""
        since = (one.unanswered_since for one in self.connected())
        return min((one for one in since if one is not None), default=None)

    @property
    def answered(self) -> int:
        """A number that changes whenever a request that had to wait is answered."""
        return sum(one.answered for one in self.connected())


class Accepting(Clients):
    """A socket and its clients. Who derives from it says what it goes on with after a planned restart."""

    def __init__(self, server: Server, path: Path, section: GatewaySection, tenant: Tenant) -> None:
        """`path` is where the socket is to lie; nothing is there before `open`. `tenant` says who may connect."""
        super().__init__(lambda: server.connections)
        self.path = path
        self.tenant = tenant
        """Who may connect. `open` gives it the users and groups that the configuration names: they exist by then."""
        self._section = section
        self._server = server
        self._scope: trio.CancelScope | None = None
        """Of accepting; None while the socket is shut."""
        self._shut = trio.Event()
        """Set when the last connection has ended after the socket was shut."""
        self._accepting: NamedListener | None = None
        """While the socket is open."""
        self._leaving = False
        """True if the path stays for another process, after `suspend`."""

    # -- opening

    async def open(self, nursery: trio.Nursery | Boundary, earlier: Sockets | None = None) -> None:
        """Accept clients, and go on with those that the process before left. Raises ForebayError.

        The task that does so is started in `nursery`. Sockets of `earlier` that are not used are closed.
        """
        sockets = earlier or Sockets()
        try:
            self.tenant.admission = Admission.to_disks(self._section)
            listener = self._socket(sockets)
        except (OSError, KeyError) as fault:
            sockets.hang_up()
            raise ForebayError(
                f"cannot make the socket {self.path}: {fault}: "
                f"{advice(fault, 'check [gateway] in the configuration')}"
            ) from None
        self._shut = trio.Event()
        self._scope = trio.CancelScope()
        again = partial(listen, self.path, self._section)
        named = NamedListener(self.path, listener, again)
        await nursery.start(self._serve, named, sockets.clients, self._scope)

    def _socket(self, earlier: Sockets) -> trio.SocketListener:
        """The listening socket: the earlier one if that lies at our path, or a new one. Raises OSError, KeyError."""
        found, earlier.listener = earlier.listener, None
        if found is None:
            return listen(self.path, self._section)
        if earlier.path != self.path or is_gone(self.path):
            found.close()
            return listen(self.path, self._section)
        try:
            _give(self.path, self._section)
            found.setblocking(False)
            return trio.SocketListener(trio.socket.from_stdlib_socket(found))
        except BaseException:
            found.close()
            raise

    async def _serve(
        self,
        listener: NamedListener,
        clients: list[Client],
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Serve until `scope` is cancelled and the last connection has ended; then remove the socket's path."""
        self._accepting = listener
        try:
            async with trio.open_nursery() as nursery:
                for client in clients:
                    self._go_on(client, nursery)
                with scope:
                    await self._server.serve(listener, task_status=task_status)
        finally:
            if not self._leaving:
                listener.remove()
            self._scope = self._accepting = None
            self._shut.set()

    def _go_on(self, client: Client, nursery: trio.Nursery) -> None:
        """Serve a client of the process before, or hang up on it."""
        raise NotImplementedError

    # -- shutting

    async def shut(self, seconds: float) -> None:
        """Accept nobody any more, let requests in flight finish, for at most so many seconds, then hang up.

        Returns when the last connection has ended; at once where the socket is not open.
        """
        if self._scope is None:
            return
        self._scope.cancel()
        for connection in _gone(self._server.connections):
            connection.abort()  # nobody is there to hear what it waits for
        with trio.move_on_after(seconds):
            await self._shut.wait()
            return
        self._abort()
        await self._shut.wait()

    def hang_up(self) -> None:
        """Accept nobody any more, and give up on requests in flight and on who is connected. Waits for nothing."""
        if self._scope is not None:
            self._scope.cancel()
        self._abort()

    def _abort(self) -> None:
        for connection in list(self._server.connections):
            connection.abort()

    def evict(self) -> None:
        """Hang up on everybody but doors, and have nobody have the disk: its VM is about to start."""
        for connection in list(self._server.connections):
            if not self.tenant.is_door(connection.sock):
                connection.abort()
        self.tenant.forget()

    async def suspend(self, seconds: float) -> Sockets:
        """Stop serving and leave the sockets as they are, for another process: listener, clients, the path.

        Requests in flight have so many seconds to finish; then they move too, and are done again.
        """
        if self._scope is None or self._accepting is None:
            return Sockets()
        with trio.move_on_after(HANDSHAKE_SECONDS):
            while any(one.session is None for one in self._server.connections):  # noqa: ASYNC110 - nobody tells
                await trio.sleep(HANDSHAKE_SECONDS / 20)
        found = Sockets(socket.socket(fileno=os.dup(self._accepting.socket.fileno())), self.path)
        self._leaving = True
        connections = list(self._server.connections)
        for connection in connections:
            connection.suspend()
        self._scope.cancel()
        await self._all_suspended(connections, seconds)
        found.clients = [
            self._suspended(one) for one in connections if one.phase is Phase.SUSPENDED
        ]
        return found

    async def _all_suspended(self, connections: list[Connection], seconds: float) -> None:
        """Wait for the connections to be suspended. In the end requests are cancelled, and then connections aborted."""
        with trio.move_on_after(seconds):
            await self._shut.wait()
        for connection in connections:
            connection.cancel_requests()
        with trio.move_on_after(CANCEL_SECONDS):
            await self._shut.wait()
            return
        self._abort()
        await self._shut.wait()

    def _suspended(self, connection: Connection) -> Client:
        session, export = connection.session, connection.export
        assert session is not None, "it was in transmission"
        assert export is not None, "and on an export"
        return Client(connection.sock, session, export.size, export.read_only)
