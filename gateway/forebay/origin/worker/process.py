# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The process of a store as the daemon sees it: started when it is first needed, and again after it has ended.

A descriptor that it has open is named here by a *handle*, a number that no descriptor of this process, and no offset,
can be. A handle says which process has it: those of one that has ended fail with EIO for ever, and the image is opened
anew.

Everything here blocks and belongs in a thread, whose wait for an answer ends with the daemon, whatever the store does.
"""

import contextlib
import errno
import itertools
import marshal
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from forebay.origin.worker import program
from forebay.origin.worker.program import ENDED, Line

FIRST = 1 << 63
"""The lowest handle. Offsets and descriptors are below it."""

_FD_BITS = 32
_FD_MASK = (1 << _FD_BITS) - 1

FOLDER = "processes"
"""The directory in RUN that has the lock files, and for a moment the sockets of servers."""

_numbers = itertools.count(1)
_holders: dict[int, "Holder"] = {}
"""Those that live, by number."""

here = threading.local()
"""`here.process` is the Process for which the call of this thread is made; unset in others."""


class Holder(Protocol):
    """Who has descriptors that are named by handles. Every method raises OSError; EIO once it has ended."""

    def call(self, name: str, *args: Any, **how: Any) -> Any:
        """Make the call of that name, and return what that returns."""
        ...

    def open(self, name: str, *args: Any, **how: Any) -> int:
        """As `call`, for one that opens a file: a handle."""
        ...

    def preadv(self, handle: int, buffers: list[bytearray | memoryview], offset: int) -> int:
        """As os.preadv. May read less, as that may."""
        ...

    def pwritev(
        self, handle: int, buffers: list[bytes | bytearray | memoryview], offset: int
    ) -> int:
        """As os.pwritev. May write less, as that may."""
        ...


class Process(Protocol):
    """A process that makes the calls of a thread."""

    def is_local(self, path: str) -> bool:
        """True for a path whose calls this process makes itself."""
        ...

    def worker(self) -> "Worker":
        """The life of it that there is now. Raises OSError."""
        ...


def hold(holder: Holder) -> int:
    """A number for one that has descriptors, until it is let go."""
    number = next(_numbers)
    _holders[number] = holder
    return number


def let_go(number: int) -> None:
    """From now on the handles of that number fail with EIO."""
    _holders.pop(number, None)


def handle_of(number: int, fd: int) -> int:
    """The handle for a descriptor of the holder with that number."""
    return (number << _FD_BITS) | fd | FIRST


class Worker:
    """One life of a store's process. Every method raises OSError; EIO once it has ended."""

    def __init__(self, store: str, lock: Path | None) -> None:
        """Start it. It does nothing before it has locked that file; None: it need not wait for any before it."""
        self.has_ended = False
        self._store = store
        self._lines: deque[Line] = deque()
        self._making = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            held = _open_lock(lock)
            try:
                self._process = _start(theirs.fileno(), held)
            finally:
                os.close(held)
        self.number = hold(self)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def call(self, name: str, *args: Any, **how: Any) -> Any:
        """Have it make a call, and return what that returns. Handles stand for its descriptors, in `args` and `how`."""
        with _Borrowed(self) as line:
            return self._ask(line, name, args, how)

    def open(self, name: str, *args: Any, **how: Any) -> int:
        """As `call`, for one that opens a file: a handle."""
        fd: int = self.call(name, *args, **how)
        return handle_of(self.number, fd)

    def preadv(self, handle: int, buffers: list[bytearray | memoryview], offset: int) -> int:
        """As os.preadv. May read less, as that may."""
        with _Borrowed(self) as line:
            wanted = min(program.SHARED, sum(len(buffer) for buffer in buffers))
            count: int = self._ask(line, "preadv", (handle, wanted, offset), {})
            _scatter(line.memory[:count], buffers)
            return count

    def pwritev(
        self, handle: int, buffers: list[bytes | bytearray | memoryview], offset: int
    ) -> int:
        """As os.pwritev. May write less, as that may."""
        with _Borrowed(self) as line:
            wanted = _gather(buffers, line.memory)
            count: int = self._ask(line, "pwritev", (handle, wanted, offset), {})
            return count

    def _ask(self, line: Line, name: str, args: tuple[Any, ...], how: dict[str, Any]) -> Any:
        ours = tuple(_plain(one) for one in args)
        try:
            line.send((name, ours, {key: _plain(value) for key, value in how.items()}))
            outcome = line.receive()
        except OSError as error:
            self._end()
            raise OSError(errno.EIO, f"{self._store}: {ENDED}") from error
        if outcome[0]:
            return outcome[1]
        _, number, text, path = outcome
        raise OSError(number, text, path) if path is not None else OSError(number, text)

    def line(self) -> Line:
        """A line that nobody uses."""
        with self._making:
            if self.has_ended:
                raise OSError(errno.EIO, f"{self._store}: {ENDED}")
            if self._lines:
                return self._lines.pop()
            ours, theirs = socket.socketpair()
            with theirs:
                memory = os.memfd_create("forebay-line", os.MFD_CLOEXEC)
                os.ftruncate(memory, program.SHARED)
                line = Line(ours, os.dup(memory))
                try:
                    socket.send_fds(self._control, [program.LINE], [theirs.fileno(), memory])
                except OSError as error:
                    self._end()
                    raise OSError(errno.EIO, f"{self._store}: {ENDED}") from error
                finally:
                    os.close(memory)
            return line

    def start_server(
        self,
        command: list[str],
        listening: int,
        errors: int,
        *,
        reads: list[int],
        writes: list[int],
        network: list[str],
    ) -> None:
        """Have it start a server, which ends with it; see `program._start`. `reads` and `writes` are handles."""
        files = ([_plain(one) for one in reads], [_plain(one) for one in writes])
        what = (command, *files, network)
        message = program.SERVER + marshal.dumps(what)
        try:
            socket.send_fds(self._control, [message], [listening, errors])
        except OSError as error:
            self._end()
            raise OSError(errno.EIO, f"{self._store}: {ENDED}") from error

    def give_back(self, line: Line) -> None:
        """Use the line for another call later."""
        if self.has_ended:
            line.sock.close()
        else:
            self._lines.append(line)

    def _end(self) -> None:
        """Note that it has ended."""
        self.has_ended = True
        let_go(self.number)
        self._process.poll()

    def leave(self) -> None:
        """Let it end, as it does when this process ends. Returns at once."""
        self._end()
        self._control.close()
        while self._lines:
            self._lines.pop().sock.close()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it has ended, which `leave` has it do, or for so long: what it had open is closed then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


class _Borrowed:
    """A line of a worker for the body of a `with`; it goes back unless the body was cut short."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __enter__(self) -> Line:
        self._line = self._worker.line()
        return self._line

    def __exit__(self, *_: object) -> None:
        self._worker.give_back(self._line)


class StoreProcess:
    """The process that makes the calls for one store, whenever one is made on a file system that may hang."""

    def __init__(self, store: str, run: Path, is_local: Callable[[str], bool]) -> None:
        """`run` is the daemon's RUN. `is_local` returns True for a path whose calls this process makes itself."""
        self.is_local = is_local
        self._store = store
        self._run = run
        self._name = sha256(store.encode(errors="surrogateescape")).hexdigest()[:32]
        self._starting = threading.Lock()
        self._worker: Worker | None = None

    def worker(self) -> Worker:
        """The one that lives now. Raises OSError where none can be started."""
        with self._starting:
            if self._worker is None or self._worker.has_ended:
                lock = folder_in(self._run) / f"{self._name}.lock"
                self._worker = Worker(self._store, lock)
            return self._worker

    def leave(self) -> None:
        """Let the process end, if there is one. Returns at once."""
        with self._starting:
            if self._worker is not None:
                self._worker.leave()


def worker_of(handle: int) -> Holder:
    """Who has the descriptor. Raises OSError(EIO) where that has ended."""
    holder = _holders.get((handle - FIRST) >> _FD_BITS)
    if holder is None:
        raise OSError(errno.EIO, ENDED)
    return holder


def is_held(handle: int) -> bool:
    """True while whoever has the descriptor has not ended."""
    return (handle - FIRST) >> _FD_BITS in _holders


def _open_lock(path: Path | None) -> int:
    if path is None:
        return os.memfd_create("forebay-lock", os.MFD_CLOEXEC)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def pids() -> set[int]:
    """The process ids of all that live."""
    return {worker.pid for worker in list(_holders.values()) if isinstance(worker, Worker)}


def folder_in(run: Path) -> Path:
    """The directory in the daemon's RUN that has lock files, and for a moment sockets."""
    folder = run / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def number_at(handle: int) -> int:
    """The descriptor that a handle stands for, in the process that has it."""
    return handle & _FD_MASK


def _plain(value: Any) -> Any:
    """What the worker is to see in place of a handle."""
    return number_at(value) if isinstance(value, int) and value >= FIRST else value


def _start(control: int, lock: int) -> subprocess.Popen[bytes]:
    """The program, in a session of its own so that a terminal's signals do not reach it."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", program.__file__, str(control), str(lock)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(control, lock),
        start_new_session=True,
        cwd="/",
    )


def _scatter(data: memoryview, buffers: list[bytearray | memoryview]) -> None:
    """Copy the data into the buffers, one after the other."""
    for buffer in buffers:
        if not data:
            break
        part = min(len(buffer), len(data))
        memoryview(buffer)[:part] = data[:part]
        data = data[part:]


def _gather(buffers: list[bytes | bytearray | memoryview], memory: memoryview) -> int:
    """Copy as much of the buffers as there is room for. How many bytes."""
    at = 0
    for buffer in buffers:
        part = min(len(buffer), len(memory) - at)
        memory[at : at + part] = memoryview(buffer)[:part]
        at += part
    return at
