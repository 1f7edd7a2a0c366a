# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Both sides of the FUSE door, by sockets: a kernel that asks and counts answers; a disk that does as it is told."""

import random
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field

from forebay_fast import core
from forebay_nbd.protocol.wire import (
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    Flag,
)

GETATTR, READ, WRITE, STATFS, FSYNC, FLUSH, INTERRUPT = 3, 15, 16, 17, 20, 25, 36
IN_HEADER, OUT_HEADER = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
READ_IN = WRITE_IN = struct.Struct("=QQIIQII")
FSYNC_IN, FLUSH_IN, GETATTR_IN = (
    struct.Struct("=QII"),
    struct.Struct("=QIIQ"),
    struct.Struct("=IIQ"),
)
FLAGS = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_WRITE_ZEROES
BUFFER = 4 << 20


class Kernel:
    """Asks by messages on `asking`, as /dev/fuse has them.

    `answers` has (errno, data) by the number of the request, `others` what the core has for pyfuse3.
    """

    def __init__(self) -> None:
        self.asking, self._its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (self.asking, self._its):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            sock.setblocking(False)
        self.others: deque[bytes] = deque()
        self.complaints: list[int] = []
        self.device = core.FuseDevice(self._its.fileno(), self.others, self.complaints.append)
        self.answers: dict[int, tuple[int, bytes]] = {}
        self._unique = 0

    def close(self) -> None:
        self.asking.close()
        self._its.close()

    def ask(self, opcode: int, arguments: bytes, node: int = 7) -> int:
        """The number of the request."""
        self._unique += 2
        length = IN_HEADER.size + len(arguments)
        head = IN_HEADER.pack(length, opcode, self._unique, node, 0, 0, 1, 0, 0)
        self.asking.send(head + arguments)
        return self._unique

    def read(self, number: int, offset: int, size: int) -> int:
        return self.ask(READ, READ_IN.pack(number, offset, size, 0, 0, 0, 0))

    def write(self, number: int, offset: int, data: bytes) -> int:
        return self.ask(WRITE, WRITE_IN.pack(number, offset, len(data), 0, 0, 0, 0) + data)

    def fsync(self, number: int) -> int:
        return self.ask(FSYNC, FSYNC_IN.pack(number, 0, 0))

    def flush(self, number: int) -> int:
        return self.ask(FLUSH, FLUSH_IN.pack(number, 0, 0, 0))

    def run(self) -> int:
        """Have the core take what was asked."""
        return self.device.run(time.monotonic() + 10)

    def collect(self) -> None:
        """Take the answers that have come. Each request gets one."""
        while True:
            try:
                message = self.asking.recv(2 << 20)
            except BlockingIOError:
                return
            length, error, unique = OUT_HEADER.unpack_from(message)
            assert length == len(message)
            assert unique not in self.answers, "answered twice"
            assert 0 < unique <= self._unique, "an answer to nothing"
            self.answers[unique] = (-error, message[OUT_HEADER.size :])


@dataclass
class Asked:
    """An NBD request, as it came."""

    command: int
    cookie: int
    offset: int
    length: int
    data: bytes = b""


@dataclass
class Disk:
    """A disk behind one connection after the other; `errors` by offset, NBD's numbers."""

    content: bytearray
    errors: dict[int, int] = field(default_factory=dict)
    commands: list[tuple[int, int, int]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    """Without an answer."""

    def __post_init__(self) -> None:
        self._received = bytearray()
        self.sock: socket.socket | None = None

    def connect(self, connection: "core.DiskConnection", flags: int = FLAGS) -> None:
        """The next connection, on which nothing was asked yet."""
        self.close()
        self.sock, self.client = socket.socketpair()
        for sock in (self.sock, self.client):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        connection.begin(self.client.fileno(), flags)
        connection.run(time.monotonic() + 10)

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.client.close()
            self._received.clear()
            self.asked.clear()
            self.sock = None

    def take(self) -> list[Asked]:
        """What was asked since the last time, and waits for an answer from now on."""
        assert self.sock is not None
        while True:
            try:
                got = self.sock.recv(1 << 20)
            except BlockingIOError:
                break
            if not got:
                break
            self._received += got
        found = []
        while len(self._received) >= REQUEST.size:
            _, flags, command, cookie, offset, length = REQUEST.unpack_from(self._received)
            assert not flags
            end = REQUEST.size + (length if command == Cmd.WRITE else 0)
            if len(self._received) < end:
                break
            data = bytes(self._received[REQUEST.size : end])
            found.append(Asked(command, cookie, offset, length, data))
            del self._received[:end]
        self.commands += [(one.command, one.offset, one.length) for one in found]
        self.asked += found
        return found

    def reply_to(self, one: Asked) -> bytes:
        """Do it; the reply."""
        error = self.errors.get(one.offset, 0)
        place = slice(one.offset, one.offset + one.length)
        assert place.stop <= len(self.content), "beyond the end"
        if not error and one.command == Cmd.WRITE:
            self.content[place] = one.data
        elif not error and one.command == Cmd.WRITE_ZEROES:
            self.content[place] = bytes(one.length)
        data = bytes(self.content[place]) if one.command == Cmd.READ and not error else b""
        self.asked.remove(one)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, one.cookie) + data

    def send(self, data: bytes) -> None:
        assert self.sock is not None
        self.sock.sendall(data)

    def serve(self, rng: random.Random) -> bytes:
        """Replies to all that was asked, in any order."""
        self.take()
        return b"".join(self.reply_to(one) for one in rng.sample(self.asked, len(self.asked)))
