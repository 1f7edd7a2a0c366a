# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which connections there is room for, and which process is at the other end of each.

Whoever may connect to a disk's socket could keep the disk's own VM out by taking all places. So some are kept for the
process that had the disk first, as long as it lives, and clients that do not get on with the handshake take no place
from anybody: the oldest of them is dropped when there are many.

The kernel is asked for the process, by a descriptor of it (pidfd_open(2)): /proc may show nothing of other users'
processes, as in a unit with `ProtectProc=invisible`. A number alone says little, since another process may get it
later. What tells the two apart is the inode of the descriptor, since Linux 6.9; before, the time at which the process
started, where /proc shows that.
"""

import errno
import os
import select
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

from forebay_nbd.server.connection import Connection

KEPT_MOST: Final = 4
"""Places that are kept for the first process, at most, and at most a quarter of all."""

HANDSHAKES: Final = 64
"""Connections in the handshake at one time, beside those in transmission. It takes real clients a millisecond."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

_SO_PEERPIDFD = 77
"""asm-generic/socket.h, since Linux 6.5."""

_START_TIME = 19  # of the fields of /proc/PID/stat behind the name: see proc(5)


class Process(NamedTuple):
    """A process of this host. Another one that gets its number later is not equal to it."""

    pid: int
    """0 for one of a container whose numbers this process does not see."""
    mark: str
    """What tells it from another of that number; empty where this kernel has nothing that does."""

    @classmethod
    def at(cls, sock: socket.socket) -> "Process | None":
        """The one that connected a Unix socket; None if that is not known, or it has ended."""
        if sock.family != socket.AF_UNIX:
            return None
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid: int = _CREDENTIALS.unpack(raw)[0]
            descriptor = _descriptor_of_peer(sock, pid)
        except OSError:
            return None
        try:
            found = cls(pid, _mark(descriptor, pid))
            return None if _has_ended(descriptor) or not (pid or found.mark) else found
        finally:
            os.close(descriptor)

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The one with that number; None if there is none. Raises OSError where the kernel cannot tell."""
        try:
            descriptor = os.pidfd_open(pid)
        except (ProcessLookupError, ValueError):
            return None
        except OSError as fault:
            if fault.errno == errno.EINVAL:  # the number of a thread
                return None
            raise
        try:
            found = cls(pid, _mark(descriptor, pid))
            return None if _has_ended(descriptor) else found
        finally:
            os.close(descriptor)

    @property
    def is_alive(self) -> bool:
        """True until it has ended, whether or not somebody has waited for it; True where the kernel cannot tell."""
        try:
            return self.of(self.pid) == self
        except OSError:
            return True


def _descriptor_of_peer(sock: socket.socket, pid: int) -> int:
    """A descriptor of the process that connected the socket, to be closed. Raises OSError if it is gone."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except ProcessLookupError:
        raise
    except OSError:  # an older kernel
        return os.pidfd_open(pid)


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _are_inodes_unique() -> bool:
    """True if each process has an inode of its own. Before Linux 6.9 all such descriptors share one."""
    try:
        descriptor = os.pidfd_open(os.getpid())
    except OSError:  # not allowed here
        return False
    other = os.eventfd(0)
    try:
        return os.fstat(descriptor).st_ino != os.fstat(other).st_ino
    finally:
        os.close(descriptor)
        os.close(other)


_UNIQUE = _are_inodes_unique()


def _mark(descriptor: int, pid: int) -> str:
    """What tells the process from others that get its number; empty if there is nothing."""
    return f"i{os.fstat(descriptor).st_ino}" if _UNIQUE else _started(pid)


def _started(pid: int) -> str:
    """When the process with this number started, in ticks; empty if there is none, or /proc does not tell."""
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
        busy = sum(one.session is not None or one.handshaking.is_looking for one in self._processes)
        if busy >= self._most - (0 if is_first else self._kept):
            return False
        waiting = [
            one for one in self._processes if one.session is None and not one.handshaking.is_looking
        ]
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
