# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Guests without virtual machines: each makes the requests of a recording, with its pauses, on a disk of its own.

They run in processes of their own, some guests in each, and throw away what they read. The client is as small as one in
Python can be: NBD's simple replies, one buffer for all. What it costs is counted apart from what the server does.
"""

import heapq
import itertools
import multiprocessing
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

from bench.boot.recording import Recording

Disk = tuple[Path, str]
"""A socket and an export."""

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_OPTION = struct.Struct(">QII")
_OPTION_MAGIC = 0x49484156454F5054
_SCRATCH = 1 << 20
END = -2
"""In place of the number of a request: the guest has booted."""


@dataclass(frozen=True)
class Storm:
    """How guests booted that began at the same time."""

    seconds: list[float]
    """Of each guest, until it had booted; sorted."""
    client_cpu: float
    """Seconds that the guests' processes computed."""

    @property
    def last(self) -> float:
        return self.seconds[-1]

    @property
    def median(self) -> float:
        return self.seconds[len(self.seconds) // 2]


class Guest:
    """One boot: `due` are the requests that it makes when their time has come."""

    def __init__(self, number: int, recording: Recording, followers: list[list[int]]) -> None:
        self.number = number
        self._recording = recording
        self._followers = followers
        self._left = len(recording.reads)
        self._head = bytearray()
        self._body = 0
        self._cookie = 0
        self.sock = socket.socket(socket.AF_UNIX)
        self.booted = 0.0

    def connect(self, disk: Disk) -> None:
        """Raises OSError."""
        self.sock.connect(str(disk[0]))
        self._take(18)
        name = disk[1].encode()
        flags = struct.pack(">I", 3)  # fixed newstyle, no zeroes
        self.sock.sendall(flags + _OPTION.pack(_OPTION_MAGIC, 1, len(name)) + name)
        self._take(10)
        self.sock.setblocking(False)

    def _take(self, count: int) -> None:
        if len(self.sock.recv(count, socket.MSG_WAITALL)) != count:
            raise ConnectionError("the server hung up during the handshake")

    def ask(self, number: int) -> None:
        """Make the request of that number of the recording."""
        offset, length, _, _ = self._recording.reads[number]
        self.sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, 0, number, offset, length))

    def receive(self, scratch: memoryview) -> list[int]:
        """Take what is there; the numbers of the requests that are answered by that. Raises OSError."""
        answered = []
        while True:
            try:
                if self._body:
                    count = self.sock.recv_into(scratch[: min(self._body, _SCRATCH)])
                    self._body -= count
                    if count and not self._body:
                        answered.append(self._cookie)
                else:
                    part = self.sock.recv(_REPLY.size - len(self._head))
                    count = len(part)
                    self._head += part
                    if len(self._head) == _REPLY.size:
                        self._begin_reply()
            except BlockingIOError:
                return answered
            if not count:
                raise ConnectionError("the server hung up")

    def _begin_reply(self) -> None:
        magic, error, self._cookie = _REPLY.unpack(self._head)
        if magic != _REPLY_MAGIC or error:
            raise OSError(
                error, f"read {self._cookie} of guest {self.number}: {os.strerror(error)}"
            )
        self._head.clear()
        self._body = self._recording.reads[self._cookie].length

    def go_on(self, answered: int, now: float) -> list[tuple[float, int]]:
        """(when, which request) follows from the answer to one, -1 for the start; END in place of a request."""
        reads = self._recording.reads
        found = [(now + reads[n].think, n) for n in self._followers[answered]]
        if answered >= 0:
            self._left -= 1
        if not self._left:
            found.append((now + self._recording.tail, END))
        return found


def followers_of(recording: Recording) -> list[list[int]]:
    """By the number of a read: which follow from its answer; in the last place (-1) which follow from the start."""
    found: list[list[int]] = [[] for _ in range(len(recording.reads) + 1)]
    for number, read in enumerate(recording.reads):
        found[read.after].append(number)
    return found


def boot_together(
    disks: Sequence[Disk], recording: Recording, processes: int | None = None
) -> Storm:
    """Boot a guest from each of these disks, all at once. Raises OSError where one of them cannot."""
    count = min(len(disks), processes or os.cpu_count() or 1)
    context = multiprocessing.get_context("fork")
    begin, ends = context.Barrier(count), []
    workers = []
    for n in range(count):
        mine, theirs = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(disks[n::count], recording, begin, theirs), daemon=True
        )
        worker.start()
        theirs.close()
        workers.append(worker)
        ends.append(mine)
    seconds: list[float] = []
    cpu = 0.0
    fault: OSError | None = None
    for end in ends:
        try:
            told = end.recv()
        except EOFError:
            told = OSError("a client's process died")
        if isinstance(told, OSError):
            fault = fault or told
        else:
            seconds += told[0]
            cpu += told[1]
    for worker in workers:
        worker.join()
    if fault is not None:
        raise fault
    return Storm(sorted(seconds), cpu)


def _work(disks: Sequence[Disk], recording: Recording, begin: Barrier, told: Connection) -> None:
    """A process of guests: tells their seconds and its CPU seconds, or an OSError."""
    try:
        guests = _connected(disks, recording)
        begin.wait(60)
        before = time.process_time()
        seconds = _boot(guests)
        told.send((seconds, time.process_time() - before))
    except OSError as error:
        begin.abort()
        told.send(OSError(error.errno, str(error)))
    except Exception as error:  # noqa: BLE001 - the barrier was broken by another one
        told.send(OSError(f"{type(error).__name__} {error}"))


def _connected(disks: Sequence[Disk], recording: Recording) -> list[Guest]:
    followers = followers_of(recording)
    guests = [Guest(number, recording, followers) for number in range(len(disks))]
    for guest, disk in zip(guests, disks, strict=True):
        guest.connect(disk)
    return guests


def _boot(guests: list[Guest]) -> list[float]:
    """Until all have booted: the seconds of each."""
    scratch, order = memoryview(bytearray(_SCRATCH)), itertools.count()
    poll, by_fd = select.epoll(), {guest.sock.fileno(): guest for guest in guests}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    began = time.monotonic()
    due: list[tuple[float, int, Guest, int]] = []

    def plan(guest: Guest, answered: int, now: float) -> None:
        for when, number in guest.go_on(answered, now):
            heapq.heappush(due, (when, next(order), guest, number))

    for guest in guests:
        plan(guest, -1, began)
    left = len(guests)
    while left:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        for fd, _ in poll.poll(wait):
            for answered in by_fd[fd].receive(scratch):
                plan(by_fd[fd], answered, time.monotonic())
        now = time.monotonic()
        while due and due[0][0] <= now:
            _, _, guest, number = heapq.heappop(due)
            if number == END:
                guest.booted, left = now - began, left - 1
                poll.unregister(guest.sock.fileno())
                guest.sock.close()
            else:
                guest.ask(number)
    poll.close()
    return [guest.booted for guest in guests]
