# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An NBD client that waits for nothing longer than it says, and the one that watches the neighbours of a fault.

    python isolation_client.py

reads one line of JSON, a list of `{"name", "socket", "content", "warm"}`: disks, the file that holds what each has to
hold, and how many bytes of it, from the start, are read. It reads sectors of them, one at a time from each disk, says
"ready", and answers each further line with one of JSON: `begin` with an empty object, `end` with what was seen since
the last `begin`, by disk: `reads`, `median`, `p99` and `longest` (seconds; a read without an answer counts with the
time that it has waited), `faults`. It ends with its input.
"""

import contextlib
import json
import os
import random
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any

SECTOR = 4096
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)

PAUSE = 0.002
"""Seconds between an answer and the next read of a disk."""


def request(command: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    """The header of a request."""
    return struct.pack(">IHHQQI", 0x25609513, flags, command, 1, offset, length)


class Client:
    """One connection in transmission. Everything on it takes at most `patience` seconds, or is a TimeoutError."""

    def __init__(self, path: Path, patience: float = 10.0, *, structured: bool = False) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(patience)
        try:
            self.sock.connect(str(path))
            self._shake_hands(structured)
        except BaseException:
            self.sock.close()
            raise

    def _shake_hands(self, structured: bool) -> None:
        self.receive(18)
        self.sock.sendall(struct.pack(">I", 3))
        if structured:
            self._option(8, b"")
            query = b"base:allocation"
            self._option(10, struct.pack(">III", 0, 1, len(query)) + query)
        self._option(7, struct.pack(">I", 0) + b"\0\0")

    def _option(self, number: int, data: bytes) -> None:
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        kind = 0
        while kind != 1:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            data = self.receive(length)
            if kind >> 31:
                raise ConnectionError(f"option {number} refused: {data!r}")

    def receive(self, count: int) -> bytes:
        """Exactly so many bytes. ConnectionError if the server hangs up before."""
        data = bytearray()
        while len(data) < count:
            some = self.sock.recv(count - len(data))
            if not some:
                raise ConnectionError("hung up on")
            data += some
        return bytes(data)

    def ask(self, command: int, offset: int, length: int, data: bytes = b"") -> bytes:
        """The data of the reply. OSError with the number of the error that the server tells."""
        self.sock.sendall(request(command, offset, length) + data)
        _, error, _ = struct.unpack(">IIQ", self.receive(16))
        if error:
            raise OSError(error, os.strerror(error))
        return self.receive(length) if command == READ else b""

    def read(self, offset: int, length: int) -> bytes:
        return self.ask(READ, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self.ask(WRITE, offset, len(data), data)

    def flush(self) -> None:
        self.ask(FLUSH, 0, 0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(request(DISC))
        self.sock.close()


class Watched:
    """One neighbour, and what was seen of it since the last `begin`."""

    def __init__(self, name: str, socket: str, content: str, warm: int) -> None:
        self.name = name
        self.client = Client(Path(socket))
        with Path(content).open("rb") as file:
            self._content = file.read(warm)
        self._rng = random.Random(name)
        self._at = 0
        self._got = bytearray()
        self.asked = 0.0
        """When the read that has no answer yet was sent; 0: there is none."""
        self.next = 0.0
        """When the next one is to be sent."""
        self.begin()

    def begin(self) -> None:
        self.took: list[float] = []
        self.faults: list[str] = []

    def ask(self, now: float) -> None:
        self._at = self._rng.randrange(len(self._content) // SECTOR) * SECTOR
        self.client.sock.sendall(request(READ, self._at, SECTOR))
        self._got.clear()
        self.asked = now

    def take(self, now: float) -> None:
        """What has come of the answer."""
        some = self.client.sock.recv(16 + SECTOR - len(self._got))
        self._got += some
        if not some:
            raise ConnectionError("hung up on")
        error = struct.unpack_from(">I", self._got, 4)[0] if len(self._got) >= 8 else 0
        if error:
            self.faults.append(f"error {error} of the read at {self._at}")
        elif len(self._got) < 16 + SECTOR:
            return
        elif self._got[16:] != self._content[self._at : self._at + SECTOR]:
            self.faults.append(f"not what was written, at {self._at}")
        self.took.append(now - self.asked)
        self.asked, self.next = 0.0, now + PAUSE

    def figures(self, now: float) -> dict[str, Any]:
        took = sorted([*self.took, now - self.asked] if self.asked else self.took) or [0.0]
        return {
            "reads": len(self.took),
            "median": took[len(took) // 2],
            "p99": took[len(took) * 99 // 100],
            "longest": took[-1],
            "faults": self.faults[:3],
        }


def watch(disks: list[Watched]) -> None:
    """Read from all of them until the input ends."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    by_fd = {one.client.sock.fileno(): one for one in disks}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    buffer = b""
    while True:
        now = time.monotonic()
        for one in disks:
            if not one.asked and one.next <= now:
                one.ask(now)
        idle = [one.next for one in disks if not one.asked]
        left = max(0.0, min(idle) - now) * 1000 + 1 if idle else None
        ready = [fd for fd, _ in poll.poll(left)]
        now = time.monotonic()
        for fd in ready:
            if fd:
                by_fd[fd].take(now)
        if 0 in ready:
            data = os.read(0, 4096)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                answer = {one.name: one.figures(now) for one in disks} if line == b"end" else {}
                if line == b"begin":
                    for one in disks:
                        one.begin()
                print(json.dumps(answer), flush=True)


def main() -> None:
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1 << 16)
    disks = [Watched(**one) for one in json.loads(line)]
    print("ready", flush=True)
    watch(disks)


if __name__ == "__main__":
    main()
