# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A process of another user that connects to disks and holds on, as a QEMU does: told what to do by its test."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = r"""
import os, socket, sys
uid, gid, groups = sys.argv[1:]
os.setgroups([int(one) for one in groups.split(",") if one])
os.setgid(int(gid))
os.setuid(int(uid))
held = []

def connect(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    try:
        sock.connect(path)
        if sock.recv(8) != b"NBDMAGIC":
            return "out"
    except OSError as error:
        return "out" if isinstance(error, ConnectionError) else type(error).__name__
    held.append(sock)
    return "in"

def idle(path, count):
    for _ in range(int(count)):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except ConnectionError:
            continue
        held.append(sock)
    return "idle"

def close():
    held.clear()
    return "closed"

def fork():
    child = os.fork()
    if child:
        return str(child)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # the next line is its parent's
    os.dup2(0, 1)
    import signal
    signal.pause()

for line in sys.stdin:
    word, *rest = line.split()
    print({"connect": connect, "idle": idle, "close": close, "fork": fork}[word](*rest), flush=True)
"""


class TenantProcess:
    """A process of user `uid`, which lives until `end`."""

    def __init__(self, uid: int, gid: int, groups: Sequence[int] = ()) -> None:
        arguments = [str(uid), str(gid), ",".join(map(str, groups))]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def _ask(self, *words: object) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def gets_in(self, path: Path) -> bool:
        """Connect. True if the server greets, and then the connection is held; False if it hangs up."""
        said = self._ask("connect", path)
        assert said in ("in", "out"), said
        return said == "in"

    def connect_idly(self, path: Path, count: int) -> None:
        """Connect so often, and say nothing."""
        assert self._ask("idle", path, count) == "idle"

    def close(self) -> None:
        """Close all connections."""
        assert self._ask("close") == "closed"

    def fork(self) -> int:
        """Leave the connections to a child as well, which does nothing; its number."""
        return int(self._ask("fork"))

    def end(self) -> None:
        """End it and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
