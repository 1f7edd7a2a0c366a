# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The control API's socket, and HTTP on it. What is answered: `forebay.control.routes`."""

import grp
import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from forebay.control.routes import Answers, Control
from forebay.doors.named import NamedListener
from forebay.doors.peers import Admission, Peer
from forebay.errors import ForebayError, advice
from forebay.events.held import Events
from forebay.events.telling import ASKED, Asker
from forebay.http.connection import serve_connection
from forebay.http.routing import Router

log = logging.getLogger("forebay.control")

BACKLOG = 64
"""Connections that may wait to be accepted; scrapers and hooks come one at a time."""


MOST_CONNECTIONS = 256
"""Clients at once. Each has a descriptor, of which disks need theirs."""


class _GatewaySection(Protocol):
    @property
    def control_group(self) -> str | None: ...


class _Config(Protocol):
    @property
    def gateway(self) -> _GatewaySection: ...


class Gateway(Answers, Protocol):
    """The daemon, with the configuration that says who may use the socket."""

    @property
    def config(self) -> _Config:
        """As it was loaded."""


async def serve_control(
    gateway: Gateway,
    path: Path,
    *,
    events: Events | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on a Unix socket at `path` until cancelled; started when clients can connect. `events` are what is told.

    Raises ForebayError when the socket cannot be made or another daemon answers on it. Cancelling hangs up on all
    clients, those that read nothing included, and removes the socket unless another daemon has put its own there by
    now.
    """
    group = gateway.config.gateway.control_group
    again = partial(listen, path, group)
    listener = NamedListener(path, again(), again)
    try:
        admission = Admission.to_control(group)
        router = Router(Control(gateway, events or Events()).routes())
        await _Server(router, admission).run(listener, task_status)
    finally:
        listener.socket.close()
        listener.remove()


def listen(path: Path, group: str | None) -> trio.SocketListener:
    """A listening socket at `path`: mode 0660 for `group`, or 0600 without one.

    It appears under its name when all is set, so that nobody meets a socket that refuses them. Raises ForebayError.
    """
    if _answers(path):
        raise ForebayError(f"another daemon answers at {path}: stop it, or choose another --run")
    new = path.with_name(path.name + ".new")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        new.unlink(missing_ok=True)
        sock.bind(str(new))
        if group is not None:
            os.chown(new, -1, grp.getgrnam(group).gr_gid)
        new.chmod(0o600 if group is None else 0o660)
        sock.listen(BACKLOG)
        new.rename(path)
    except (OSError, KeyError) as fault:
        sock.close()
        raise ForebayError(
            f"cannot make the control socket {path}: {fault}: "
            f"{advice(fault, 'check gateway.run in the configuration')}"
        ) from None
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def _answers(path: Path) -> bool:
    """True if somebody listens at `path`."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
    return True


class _Server:
    """The connections of those who may ask."""

    def __init__(self, router: Router, admission: Admission) -> None:
        self._router = router
        self._admission = admission
        self._connections = 0

    async def run(self, listener: NamedListener, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._connection, [listener])
            task_status.started()

    async def _connection(self, stream: trio.SocketStream) -> None:
        """Serve one client. trio closes the stream then. Raises nothing."""
        if not self._admits(stream):
            return
        self._connections += 1
        try:
            await serve_connection(stream, self._router.answer)
        except Exception as fault:
            log.error("control API: a connection failed", exc_info=fault)
        finally:
            self._connections -= 1

    def _admits(self, stream: trio.SocketStream) -> bool:
        """True if the peer may ask."""
        if self._connections >= MOST_CONNECTIONS:
            log.warning(
                "control API: more than %d clients at once: one is refused", MOST_CONNECTIONS
            )
            return False
        try:
            peer = Peer.of(stream.socket)
        except OSError:  # gone already
            return False
        ASKED.set(Asker(peer.uid, peer.pid))
        refused = None if self._admission.admits(peer) else peer
        if refused is not None:
            log.info("control API: %s is refused: see gateway.control_group", refused)
        return refused is None
