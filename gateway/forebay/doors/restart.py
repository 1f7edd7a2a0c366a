# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A planned restart: the sockets of the disks go from one process to the next, by way of systemd's descriptor store.

At SIGTERM each connection is suspended at a request boundary, and the old process gives to the service manager, in this
order, one memory file that says how to go on, and the sockets, listening and connected. It does so whenever there is a
manager that listens: whether it is a restart is the manager's decision, who closes what it holds at a stop.

The new process takes what it finds when its cache is open: it marks the memory file as used, has the manager forget
everything, and only then reads from the sockets. So

- what was given before a kill can be used: a socket that is there is suspended, and described in the memory file;
- it is used once: killed later, the next process finds a mark, if it finds anything, and hangs up;
- a process that fails before it took the set leaves it to the next try, for PATIENCE_SECONDS.

The memory file, integers in network byte order::

    "FBHANDOV" | version u32 | used u32 | length of the body u64 | crc32 of the body u32
    body:  length of the text u32 | text, a JSON object | unparsed and unsent bytes of each connection, in its order

The JSON object has `at` (CLOCK_BOOTTIME, seconds), `listeners` (`fd`, `disk`, `path`, `file`: device and inode of the
path) and `clients` (`fd`, `disk`, `size` and `read_only` as negotiated, `export`, `structured`, `contexts`, and the
lengths of `unparsed` and `unsent`); `fd` is the name in the store. Whatever changes its meaning gets another version;
who finds one that it does not know hangs up, says so, and serves whoever comes back.
"""

import json
import logging
import os
import socket
import stat
import struct
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from forebay import systemd
from forebay_nbd import Session

log = logging.getLogger("forebay.daemon")

VERSION = 1
"""Of the memory file."""

PATIENCE_SECONDS = 30.0
"""Clients wait so long for a daemon that fails to start, and is started again; then it hangs up on them."""

SETTLE_SECONDS = 5.0
"""How long the manager may take to say that it has everything."""

LONGEST_BODY = 1 << 32
"""Bytes. A thousand connections with a full receive buffer have a quarter of that."""

_HEAD = struct.Struct(">8sIIQI")
_MAGIC = b"FBHANDOV"
_USED_AT = 12
_USED = struct.pack(">I", 1)
_LENGTH = struct.Struct(">I")
_SESSIONS = "forebay-sessions"


@dataclass(frozen=True)
class Client:
    """A connection at a request boundary. `size` and `read_only` are what the client was told of the disk."""

    sock: socket.socket
    session: Session
    size: int
    read_only: bool


@dataclass
class Sockets:
    """Those of one disk: `listener`, bound to `path`, and the clients."""

    listener: socket.socket | None = None
    path: Path | None = None
    clients: list[Client] = field(default_factory=list)

    def hang_up(self) -> None:
        """Close all of them. The manager may still have copies, so the clients are told explicitly."""
        if self.listener is not None:
            self.listener.close()
        for client in self.clients:
            _hang_up(client.sock)
        self.listener, self.clients = None, []

    def close(self) -> None:
        """Close this process's copies; whoever else has some goes on with them."""
        if self.listener is not None:
            self.listener.close()
        for client in self.clients:
            client.sock.close()


def _hang_up(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()


# -------------------------------------------------------------------------------------------------- the old process


def leave_sockets(disks: dict[str, Sockets]) -> bool:
    """Leave suspended sockets, by disk, with the service manager. True if it took them; else clients are hung up on.

    The sockets are closed in this process in any case.
    """
    names: list[str] = []
    try:
        stored = _store(disks, names)
        if not stored:
            log.warning("the service manager did not take the sockets: clients have to reconnect")
            for name in (*names, _SESSIONS):
                systemd.unstore(name)
            for sockets in disks.values():
                sockets.hang_up()
        return stored
    finally:
        for sockets in disks.values():
            sockets.close()


def _store(disks: dict[str, Sockets], names: list[str]) -> bool:
    """Send everything to the manager. True if it says that it has it; adds to `names` under what it was sent."""
    body = _body(disks, names)
    with _memory_file(body) as memory:
        return (
            systemd.store(_SESSIONS, memory.fileno())
            and all(systemd.store(name, fd) for name, fd in _descriptors(disks))
            and systemd.settled(SETTLE_SECONDS)
        )


def _listener_name(disk: str) -> str:
    return f"listen-{disk}"


def _client_name(disk: str, number: int) -> str:
    return f"client-{disk}-{number}"


def _descriptors(disks: dict[str, Sockets]) -> Iterable[tuple[str, int]]:
    for disk, sockets in disks.items():
        if sockets.listener is not None:
            yield _listener_name(disk), sockets.listener.fileno()
        for number, client in enumerate(sockets.clients):
            yield _client_name(disk, number), client.sock.fileno()


def _body(disks: dict[str, Sockets], names: list[str]) -> bytes:
    """What the memory file says; adds to `names` under what the descriptors are stored."""
    listeners: list[dict[str, Any]] = []
    clients: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for disk, sockets in disks.items():
        if sockets.listener is not None and sockets.path is not None:
            listeners.append(_described_listener(disk, sockets.path))
        for number, client in enumerate(sockets.clients):
            clients.append(_described_client(disk, number, client))
            blobs += [client.session.unparsed, client.session.unsent]
    names += [one["fd"] for one in (*listeners, *clients)]
    text = json.dumps({"at": _now(), "listeners": listeners, "clients": clients}).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *blobs])


def _described_listener(disk: str, path: Path) -> dict[str, Any]:
    return {"fd": _listener_name(disk), "disk": disk, "path": str(path), "file": _file(path)}


def _described_client(disk: str, number: int, client: Client) -> dict[str, Any]:
    session = client.session
    return {
        "fd": _client_name(disk, number),
        "disk": disk,
        "size": client.size,
        "read_only": client.read_only,
        "export": session.export_name,
        "structured": session.structured,
        "contexts": [[number, name] for number, name in session.contexts.items()],
        "unparsed": len(session.unparsed),
        "unsent": len(session.unsent),
    }


def _memory_file(body: bytes) -> IO[bytes]:
    memory = os.fdopen(os.memfd_create(_SESSIONS, os.MFD_CLOEXEC), "w+b")
    memory.write(_HEAD.pack(_MAGIC, VERSION, 0, len(body), zlib.crc32(body)))
    memory.write(body)
    memory.flush()
    return memory


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _file(path: Path) -> list[int] | None:
    """Device and inode of what lies at `path`; None where nothing does."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino]


# -------------------------------------------------------------------------------------------------- the new process


class EarlierSockets:
    """The sockets that the process before this one left with the service manager, by disk; none if it left none."""

    def __init__(self) -> None:
        self._disks: dict[str, Sockets] = {}
        self._memory: int | None = None
        self._names: set[str] = set()
        self._at = 0.0

    @classmethod
    def find(cls) -> Self:
        """What this process was started with. It belongs to the manager, who keeps a copy, until `claim`.

        A set that cannot be understood, or was used before, is given up here: its clients are hung up on.
        """
        found = cls()
        given = systemd.received()
        found._names = {name for name, _ in given}
        fds = {name: fd for name, fd in given if name != _SESSIONS}
        memories = [fd for name, fd in given if name == _SESSIONS]
        try:
            found._read(memories, fds)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as fault:
            log.error(
                "the sockets of the process before are not used, their clients have to reconnect: %s",
                fault,
            )
            found.claim()
            for sockets in found._disks.values():
                sockets.hang_up()
            found._disks = {}
        _close(fds.values())
        _close(memories)
        return found

    def _read(self, memories: list[int], fds: dict[str, int]) -> None:
        """Take from `fds` what the memory file describes. Raises ValueError and others where it makes no sense."""
        if not memories:
            if fds:
                raise ValueError("nothing says how to go on with them")
            return
        if len(memories) > 1:
            raise ValueError("there are two sets of them")
        self._memory = memories.pop()
        text, blobs = _content(self._memory)
        self._at = float(text["at"])
        for one in text["listeners"]:
            self._take_listener(one, fds)
        for one in text["clients"]:
            blobs = self._take_client(one, blobs, fds)

    def _take_listener(self, described: dict[str, Any], fds: dict[str, int]) -> None:
        """The listening socket, if its path still leads to it."""
        name, path, file = described["fd"], Path(described["path"]), described["file"]
        if name in fds and file and _file(path) == file:
            sockets = self._disks.setdefault(described["disk"], Sockets())
            sockets.path = path
            sockets.listener = socket.socket(fileno=fds.pop(name))

    def _take_client(
        self, described: dict[str, Any], blobs: memoryview, fds: dict[str, int]
    ) -> memoryview:
        """A connected client, if it is still there. The blobs without its own are returned."""
        unparsed, blobs = _cut(blobs, described["unparsed"])
        unsent, blobs = _cut(blobs, described["unsent"])
        session = Session(
            str(described["export"]),
            bool(described["structured"]),
            {int(number): str(name) for number, name in described["contexts"]},
            bytes(unparsed),
            bytes(unsent),
        )
        if described["fd"] in fds:  # else it hung up meanwhile, and the manager noticed
            sock = socket.socket(fileno=fds.pop(described["fd"]))
            client = Client(sock, session, int(described["size"]), bool(described["read_only"]))
            self._disks.setdefault(described["disk"], Sockets()).clients.append(client)
        return blobs

    @property
    def paths(self) -> set[Path]:
        """Of sockets that are listened to already."""
        return {one.path for one in self._disks.values() if one.path is not None}

    def claim(self) -> None:
        """From now on they are this process's: no later one may use them. Called before a byte is read from them."""
        if self._memory is not None:
            os.pwrite(self._memory, _USED, _USED_AT)
            os.close(self._memory)
            self._memory = None
        for name in self._names:
            systemd.unstore(name)
        self._names = set()

    def take(self, disk: str) -> Sockets:
        """Those of a disk, to be served or closed by the caller; empty where there are none."""
        return self._disks.pop(disk, Sockets())

    def drop_rest(self, why: str) -> None:
        """Hang up on the clients of disks that nobody took. `why` is for the log."""
        for disk, sockets in self._disks.items():
            if sockets.clients:
                log.error("disk '%s': %d clients hung up on: %s", disk, len(sockets.clients), why)
            sockets.hang_up()
            if sockets.path is not None:
                sockets.path.unlink(missing_ok=True)
        self._disks = {}

    def failed(self, why: str) -> None:
        """This process could not start: leave them to the next try, unless clients have waited long enough."""
        if self._disks and _now() - self._at > PATIENCE_SECONDS:
            self.claim()
            self.drop_rest(why)


def _content(memory: int) -> tuple[dict[str, Any], memoryview]:
    """The JSON object and the bytes behind it. Raises ValueError."""
    magic, version, used, length, checksum = _HEAD.unpack(os.pread(memory, _HEAD.size, 0))
    if magic != _MAGIC:
        raise ValueError("not a hand-over of ours")
    if version != VERSION:
        raise ValueError(f"handed over in version {version}, and this program knows {VERSION}")
    if used:
        raise ValueError("they were in use before, and that process ended without warning")
    if length > LONGEST_BODY:
        raise ValueError(f"a hand-over of {length} bytes")
    body = _read_all(memory, length)
    if len(body) != length or zlib.crc32(body) != checksum:
        raise ValueError("the hand-over is damaged")
    (size,) = _LENGTH.unpack_from(body)
    text = json.loads(bytes(body[_LENGTH.size : _LENGTH.size + size]))
    return text, memoryview(body)[_LENGTH.size + size :]


def _read_all(memory: int, length: int) -> bytes:
    parts = []
    at = _HEAD.size
    while length and (part := os.pread(memory, length, at)):
        parts.append(part)
        at, length = at + len(part), length - len(part)
    return b"".join(parts)


def _cut(data: memoryview, length: int) -> tuple[memoryview, memoryview]:
    """The first `length` bytes, and the rest. Raises ValueError."""
    if not 0 <= length <= len(data):
        raise ValueError("the hand-over is too short")
    return data[:length], data[length:]


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            _hang_up(socket.socket(fileno=fd))
        else:
            os.close(fd)
