"""A disk's own NBD socket, and who is connected to it."""

import grp
import os
import pwd
import socket
from pathlib import Path

import trio

from forebay.config import GatewaySection
from forebay.errors import ForebayError
from forebay_nbd import Export, Server

LONGEST_ADDRESS = 107
"""Bytes of a Unix socket's address (unix(7))."""

BACKLOG = 64
"""Connections that may wait to be accepted: QEMU opens a few per disk, copying tools up to sixteen."""

_NEW = ".new"


def socket_path(run: Path, name: str) -> Path:
    """Where the disk's socket lies. Raises ForebayError when no socket can have so long a name."""
    path = run / "disks" / f"{name}.sock"
    length = len(os.fsencode(path)) + len(_NEW)
    if length > LONGEST_ADDRESS:
        raise ForebayError(
            f"'{name}' makes the socket's path {length - LONGEST_ADDRESS} bytes too long: "
            "choose a shorter name, or a shorter gateway.run"
        )
    return path


def listen(path: Path, section: GatewaySection) -> trio.SocketListener:
    """A listening socket at `path`, which appears there when owner and mode are set. Raises OSError."""
    new = path.with_name(path.name + _NEW)
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


class Door:
    """The socket of one disk, open or shut. `name` is the export's name; the default export is the same."""

    def __init__(self, export: Export, path: Path, section: GatewaySection) -> None:
        self.path = path
        self._section = section
        self._server = Server(
            lambda name: export if name in ("", export.name) else None, lambda: [export.name]
        )
        self._scope: trio.CancelScope | None = None
        self._shut = trio.Event()

    @property
    def clients(self) -> int:
        """Connections in transmission."""
        return sum(one.session is not None for one in self._server.connections)

    async def open(self, nursery: trio.Nursery) -> None:
        """Accept clients. Raises ForebayError."""
        try:
            listener = listen(self.path, self._section)
        except (OSError, KeyError) as fault:
            raise ForebayError(
                f"cannot make the socket {self.path}: {fault}: check [gateway] in the configuration"
            ) from None
        self._shut = trio.Event()
        self._scope = trio.CancelScope()
        await nursery.start(self._serve, listener, self._scope)

    async def _serve(
        self,
        listener: trio.SocketListener,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        ours = self.path.lstat().st_ino
        try:
            with scope:
                await self._server.serve(listener, task_status=task_status)
        finally:
            if self.path.exists() and self.path.lstat().st_ino == ours:
                self.path.unlink()
            self._scope = None
            self._shut.set()

    async def shut(self, seconds: float) -> None:
        """Accept nobody any more, let requests in flight finish, for at most so many seconds, then hang up."""
        if self._scope is None:
            return
        self._scope.cancel()
        with trio.move_on_after(seconds):
            await self._shut.wait()
            return
        for connection in list(self._server.connections):
            connection.abort()
        await self._shut.wait()
