# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which connections there is room for: clients in transmission, clients in the handshake, and the one that was first.

Whoever may connect to a disk's socket could keep the disk's own VM out by taking all places. So some are kept for the
process that had the disk first, as long as it lives, and clients that do not get on with the handshake take no place
from anybody: the oldest of them is dropped when there are many.
"""

import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

from forebay_nbd.server.connection import Connection

KEPT_MOST: Final = 4
"""Places that are kept for the first process, at most, and at most a quarter of all."""

HANDSHAKES: Final = 64
"""Connections in the handshake at one time, beside those in transmission. It takes real clients a millisecond."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_START_TIME = 19  # of the fields of /proc/PID/stat behind the name: see proc(5)


class Process(NamedTuple):
    """A process of this host. Another one that gets its number later is not equal to it."""

    pid: int
    started: str
    """When, as /proc tells."""

    @classmethod
    def at(cls, sock: socket.socket) -> "Process | None":
        """The one that connected a Unix socket; None if that is not known, or it has ended."""
        if sock.family != socket.AF_UNIX:
            return None
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None
        pid: int = _CREDENTIALS.unpack(raw)[0]
        started = _started(pid)
        return cls(pid, started) if started else None

    @property
    def is_alive(self) -> bool:
        """True until it has ended."""
        return _started(self.pid) == self.started


def _started(pid: int) -> str:
    """When the process with this number started; empty if there is none, or /proc does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[_START_TIME]


class Places:
    """The connections of one server, each with the process at its other end, in the order in which they came."""

    def __init__(self, most: int) -> None:
        """`most` is how many may be in transmission at one time."""
        self._most = most
        self._kept = min(KEPT_MOST, most // 4)
        self._processes: dict[Connection, Process | None] = {}
        self._first: Process | None = None

    def has_room_for(self, process: Process | None) -> bool:
        """True if another connection of the process may be accepted.

        If there are too many in the handshake, the oldest that is not of the first process is dropped.
        """
        self._note_first()
        is_first = process is not None and process == self._first
        busy = sum(one.session is not None for one in self._processes)
        if busy >= self._most - (0 if is_first else self._kept):
            return False
        waiting = [one for one in self._processes if one.session is None]
        if len(waiting) >= HANDSHAKES:
            others = (one for one in waiting if self._processes[one] != self._first)
            dropped = next(others, waiting[0])
            del self._processes[dropped]
            dropped.abort()
        return True

    def add(self, connection: Connection, process: Process | None) -> None:
        """The process has connected."""
        self._processes[connection] = process

    def remove(self, connection: Connection) -> None:
        """The connection has ended."""
        self._note_first()
        self._processes.pop(connection, None)

    def _note_first(self) -> None:
        """If the first process has ended, or there was none, the one takes its place that came next."""
        if self._first is not None and self._first.is_alive:
            return
        self._first = next(
            (
                process
                for one, process in self._processes.items()
                if one.session is not None and process is not None and process.is_alive
            ),
            None,
        )
