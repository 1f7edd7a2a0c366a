# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Starting a server: a program that listens for NBD at a socket that we made, and whose name is gone when it begins.

All connections are made before it is started, so nobody else ever has one.
"""

import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from forebay.origin.worker.process import Worker
from forebay_nbd.client.blocking import BlockingClient

CONNECTIONS = 16
"""To the server of an image: as many calls are made at a time."""

MOST_SAID = 8192
"""Bytes that are read of what a server says when it ends."""

Connection = BlockingClient | socket.socket
"""A connection, or one whose handshake is still to be done."""

Start = Callable[[Worker], list[Connection]]
"""Starts a server as a child of the worker; the connections to it. Raises ForebayError with what it says, OSError."""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Server:
    """A server to be started."""

    command: list[str]
    reads: list[int] = field(default_factory=list)
    """Handles of the files that it may open for reading, and, below, for writing as well."""
    writes: list[int] = field(default_factory=list)
    network: list[str] = field(default_factory=list)
    """If it may connect to others: paths of what it needs for that."""
    at_once: bool = True
    """Do all handshakes at once, which some servers do not wait for; else each with the first use of its connection."""


def start(
    worker: Worker, server: Server, folder: Path, refused: Callable[[str], Exception]
) -> list[Connection]:
    """Have the worker start a server; all connections to it, of which the first has done its handshake.

    The socket lies in `folder` for a moment. `refused` makes an exception of what the server has said, in one line,
    where it ends instead of serving. Raises that, and OSError.
    """
    with socket.socket(socket.AF_UNIX) as listening:
        socks = _connected(listening, folder / f"{next(_numbers)}.nbd")
        errors = os.memfd_create("forebay-server", os.MFD_CLOEXEC)
        try:
            worker.start_server(
                server.command,
                listening.fileno(),
                errors,
                reads=server.reads,
                writes=server.writes,
                network=server.network,
            )
            listening.close()
            count = len(socks) if server.at_once else 1
            return [*socks[count:], *(BlockingClient(sock) for sock in socks[:count])]
        except ConnectionError as error:
            raise refused(_said(errors)) from error
        finally:
            os.close(errors)


def _connected(listening: socket.socket, path: Path) -> list[socket.socket]:
    """Connections to the socket, which listens at that path meanwhile. Raises OSError."""
    path.unlink(missing_ok=True)
    listening.bind(os.fspath(path))
    socks: list[socket.socket] = []
    try:
        listening.listen(CONNECTIONS)
        for _ in range(CONNECTIONS):
            socks.append(socket.socket(socket.AF_UNIX))
            socks[-1].connect(os.fspath(path))
        return socks
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    finally:
        path.unlink(missing_ok=True)


def _said(errors: int) -> str:
    """What the server has said, in one line."""
    said = os.pread(errors, MOST_SAID, 0).decode(errors="replace")
    line = " ".join(part.strip() for part in said.splitlines())
    return "".join(c if c.isprintable() else "?" for c in line) or "it ended without a word"
