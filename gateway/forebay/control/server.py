# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The control API's socket, and HTTP on it by hypercorn. What is answered: `forebay.control.routes`."""

import grp
import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, Framework, LifespanState
from hypercorn.utils import wrap_app
from starlette.applications import Starlette

from forebay.control.routes import Answers, control_app
from forebay.doors.named import NamedListener
from forebay.doors.peers import Admission
from forebay.errors import ForebayError, advice

log = logging.getLogger("forebay.control")

BACKLOG = 64
"""Connections that may wait to be accepted; scrapers and hooks come one at a time."""


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
    gateway: Gateway, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer on a Unix socket at `path` until cancelled; started when clients can connect.

    Raises ForebayError when the socket cannot be made or another daemon answers on it. Cancelling hangs up on all
    clients, those that read nothing included, and removes the socket unless another daemon has put its own there by
    now.
    """
    group = gateway.config.gateway.control_group
    again = partial(listen, path, group)
    listener = NamedListener(path, again(), again)
    try:
        admission = Admission.to_control(group)
        await _Server(control_app(gateway), admission).run(listener, task_status)
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
    """Hypercorn's handling of one connection, over a listener and connections of our own.

    hypercorn.trio.serve would do for serving. But it sends under a shielded scope, so that one client that does not
    read (a `forebay flush` stopped with Ctrl-Z is enough) would keep a cancelled daemon from ending. Here cancelling
    shuts the connections down first.
    """

    def __init__(self, app: Starlette, admission: Admission) -> None:
        self._admission = admission
        self._config = _hypercorn_config()
        framework = cast("Framework", app)  # two spellings of the same ASGI types
        self._app = wrap_app(framework, self._config.wsgi_max_body_size, "asgi")
        self._context = WorkerContext(None)
        self._streams: set[trio.SocketStream] = set()

    async def run(self, listener: NamedListener, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hang_up_when_cancelled)
            nursery.start_soon(trio.serve_listeners, self._connection, [listener])
            task_status.started()

    async def _connection(self, stream: trio.SocketStream) -> None:
        """Serve one client. Raises nothing."""
        if not self._admits(stream):
            return
        state = ConnectionState(LifespanState({}))
        self._streams.add(stream)
        plain: Any = stream  # hypercorn's types know TLS only, its code both
        try:
            await TCPServer(self._app, self._config, self._context, state, plain).run()
        except* Exception as faults:
            log.error("control API: a connection failed", exc_info=faults)
        finally:
            self._streams.discard(stream)

    def _admits(self, stream: trio.SocketStream) -> bool:
        """True if the peer may ask. trio closes the stream where it may not."""
        try:
            refused = self._admission.refused(stream.socket)
        except OSError:  # gone already
            return False
        if refused is not None:
            log.info("control API: %s is refused: see gateway.control_group", refused)
        return refused is None

    async def _hang_up_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for stream in self._streams:
                _shut_down(stream)


def _shut_down(stream: trio.SocketStream) -> None:
    try:
        stream.socket.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was gone already


def _hypercorn_config() -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    config.errorlog = log
    config.include_server_header = False
    return config
