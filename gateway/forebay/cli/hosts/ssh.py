# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One command on many hosts by ssh, some at a time, each for a bounded time and with an answer of a bounded size.

One thread waits for all of them. Each ssh leads a process group of its own, which is killed when its time is up, when
it says too much, and when this process is told to end.
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol

OPTIONS = (
    "-T",
    "-x",
    "-a",
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=3"),
    *("-o", "ConnectionAttempts=1"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=2"),
    *("-o", "ClearAllForwardings=yes"),
)
"""Of ssh: no questions, no terminal, nothing forwarded; a host that is off is known as that in seconds."""

LONGEST_ANSWER = 8 << 20
"""Bytes. A summary with a thousand images takes 200 KiB, the status of a thousand disks 1 MiB."""
LONGEST_LINE = 64 << 10
"""Bytes of one line of progress."""
LONGEST_ERROR = 4 << 10
"""Bytes of what ssh and the command there say is wrong: the last ones."""
MOST_JOBS = 256
"""Hosts at a time: each takes three descriptors."""
_PIECE = 64 << 10
_LAST_PIECES = 32
"""That are read of a pipe once ssh has ended: 2 MiB, more than the kernel lets a pipe of a user hold. What ssh left
behind may go on to write.
"""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TooLong(Exception):
    """A host says more than there can be to say."""


class Sink(Protocol):
    """Takes what a host says."""

    def feed(self, data: bytes) -> None:
        """Some more of it. Raises TooLong."""

    def taken(self) -> bytes:
        """What counts of it."""


class Whole:
    """All that a host says."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Some more of it. Raises TooLong."""
        self._data += data
        if len(self._data) > LONGEST_ANSWER:
            raise TooLong

    def taken(self) -> bytes:
        """All of it."""
        return bytes(self._data)


class Lines:
    """What a host says line by line: each goes to `on_line`, and the last one counts."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self._last = b""

    def feed(self, data: bytes) -> None:
        """Some more of it. Raises TooLong."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE or any(len(line) > LONGEST_LINE for line in lines):
            raise TooLong
        for line in lines:
            self._last = line
            self._on_line(line)

    def taken(self) -> bytes:
        """The last line."""
        return self._rest or self._last


@dataclass(frozen=True)
class Ended:
    """How the command ended on one host."""

    host: str
    code: int
    """The exit code of ssh, which is that of the command there, or 255; negative where a signal ended it."""
    out: bytes
    err: str
    """The end of what was said on stderr."""
    late: bool = False
    """True if it was ended because its time was up."""
    long: bool = False
    """True if it was ended because it said too much."""


class _Child:
    """One ssh."""

    def __init__(self, host: str, command: str, sink: Sink, deadline: float) -> None:
        """Raises OSError where ssh cannot be started."""
        self.host = host
        self.deadline = deadline
        self._sink = sink
        self._err = b""
        self._late = self._long = False
        self._process = subprocess.Popen(
            ["ssh", *OPTIONS, "--", host, command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._pipes = (_pipe(self._process.stdout), _pipe(self._process.stderr))
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have the selector tell of output, and of the end."""
        for source in (*self._pipes, self._pidfd):
            selector.register(source, selectors.EVENT_READ, self)

    def leave(self, selector: selectors.BaseSelector) -> None:
        """Undo `register`, and close everything."""
        for source in (*self._pipes, self._pidfd):
            with suppress(KeyError):
                selector.unregister(source)
        for pipe in self._pipes:
            pipe.close()
        os.close(self._pidfd)

    def read(self, source: Any, selector: selectors.BaseSelector) -> None:
        """Take what there is. A pipe that ends is not looked at any more; the process may outlive it."""
        if source != self._pidfd and self._take(source):
            selector.unregister(source)

    def _take(self, pipe: IO[bytes], pieces: int = 1) -> bool:
        """Take some of what the pipe has: others wait meanwhile. True at its end."""
        for _ in range(pieces):
            if self._long:
                return True
            try:
                data = os.read(pipe.fileno(), _PIECE)
            except BlockingIOError:
                return False
            if not data:
                return True
            if pipe is self._pipes[1]:
                self._err = (self._err + data)[-LONGEST_ERROR:]
                continue
            try:
                self._sink.feed(data)
            except TooLong:
                self._long = True
                self.kill()
                return True
        return False

    def has_ended(self) -> bool:
        """True once ssh has ended."""
        return self._process.poll() is not None

    def give_up(self) -> None:
        """Its time is up."""
        self._late = True
        self.kill()

    def kill(self) -> None:
        """End ssh and what it has started, if it has not ended."""
        if self._process.returncode is None:  # else its number may be another's by now
            os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)

    def ended(self) -> Ended:
        """What came of it, with what it said last."""
        for pipe in self._pipes:
            self._take(pipe, _LAST_PIECES)
        code = self._process.returncode
        return Ended(
            self.host,
            -signal.SIGKILL if code is None else code,
            self._sink.taken(),
            self._err.decode(errors="replace"),
            late=self._late,
            long=self._long,
        )


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "asked for as PIPE"
    return pipe


class Fleet:
    """Runs one command on many hosts."""

    def __init__(
        self,
        command: str,
        *,
        jobs: int,
        timeout: float | None,
        sink: Callable[[str], Sink] = lambda _host: Whole(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`command` is for the shell there. `timeout` in seconds for each host; None: as long as it takes.

        `sink` makes what takes the answer of a host.
        """
        self._command = command
        self._jobs = jobs
        self._timeout = float("inf") if timeout is None else timeout
        self._sink = sink
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._running: list[_Child] = []

    def run(self, hosts: Sequence[str]) -> Generator[Ended, None, None]:
        """Each host as it is done. Raises OSError where ssh cannot be started, KeyboardInterrupt and SystemExit.

        However it ends, none of its children is left.
        """
        waiting = deque(hosts)
        with self._selector, _told_to_end(self._selector) as check:
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < self._jobs:
                        self._start(waiting.popleft())
                    self._wait()
                    check()
                    yield from self._reaped()
            finally:
                for one in self._running:
                    one.kill()
                    one.leave(self._selector)

    def _start(self, host: str) -> None:
        child = _Child(host, self._command, self._sink(host), self._clock() + self._timeout)
        self._running.append(child)
        child.register(self._selector)

    def _wait(self) -> None:
        """Until somebody says something, or ends, or its time is up."""
        first = min(one.deadline for one in self._running)
        left = None if first == float("inf") else max(0.0, first - self._clock())
        for key, _ in self._selector.select(left):
            if isinstance(key.data, _Child):
                key.data.read(key.fileobj, self._selector)

    def _reaped(self) -> Iterator[Ended]:
        """Those that have ended, or had to."""
        now = self._clock()
        for one in list(self._running):
            has_ended = one.has_ended()
            if not has_ended and now >= one.deadline:
                one.give_up()
            if has_ended or now >= one.deadline:
                self._running.remove(one)
                found = one.ended()
                one.leave(self._selector)
                yield found


@contextmanager
def _told_to_end(selector: selectors.BaseSelector) -> Iterator[Callable[[], None]]:
    """Signals to end wake the selector, and are raised by the function that this gives: never while a child is made.

    Only the main thread is told of signals; in another one they do what they did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    told: list[int] = []
    here, there = socket.socketpair()
    with here, there:
        for end in (here, there):
            end.setblocking(False)
        before = {
            number: signal.signal(number, lambda number, _frame: told.append(number))
            for number in _ENDING
            if signal.getsignal(number) is not signal.SIG_IGN  # as nohup has it
        }
        wakeup = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        selector.register(here, selectors.EVENT_READ)
        try:
            yield lambda: _raise(told)
        finally:
            selector.unregister(here)
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


def _raise(told: list[int]) -> None:
    """Raise what a signal means, if one has come."""
    if told:
        if told[0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + told[0])
