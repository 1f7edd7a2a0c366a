# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Guests that remember what was acknowledged: every 4 KiB block of a disk is a register, and each write is unique.

One guest has one disk and several libnbd connections to it. At any time each block is touched by at most one request,
so what it may hold is simple: what the last acknowledged request left there, or, where a request was not answered
because the daemon ended, that or what this request makes of it. After every reconnect the whole disk is read and
compared; what was read then stays (a block never changes by itself), and what had no answer is sent again, or given up.

Everything runs in one thread: :meth:`Guests.turn` waits for sockets, and does what is to be done.
"""

import errno
import random
import select
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

BLOCK = 4096

CHUNK = 1 << 20
"""Bytes of one read of those that compare the whole disk."""

GONE = {errno.ENOTCONN, errno.ESHUTDOWN, errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, 0}
"""What requests end with whose connection broke."""

RETRY_SECONDS = 0.1
"""How long a guest waits before it repeats what the daemon refused."""

MOST = 41 * BLOCK
"""Bytes of a guest's longest request."""

LINGER_SECONDS = 20.0
"""How long what a daemon that ended had still sent may take to be read."""


@dataclass
class Tally:
    """What the harness prints at its end."""

    kills: int = 0
    restarts: int = 0
    writes: int = 0
    reads: int = 0
    flushes: int = 0
    repeated: int = 0
    given_up: int = 0
    refused: int = 0
    verified: int = 0
    """Blocks compared after a start."""
    in_flight: int = 0
    """Blocks that a kill found in the middle of a request."""
    origins: int = 0
    """Images compared with their disks after a flush."""
    controls: int = 0
    """Commands to the daemon that were done, and those that failed or were cut short."""
    controls_failed: int = 0
    lost: list[str] = field(default_factory=list)
    errors: Counter[int] = field(default_factory=Counter)

    def line(self) -> str:
        return (
            f"kills survived {self.kills}, writes acknowledged {self.writes}, lost {len(self.lost)}"
        )

    def more(self) -> str:
        return (
            f"{self.restarts} planned restarts, {self.reads} reads compared, {self.flushes} flushes, "
            f"{self.verified} blocks verified after a start, {self.in_flight} of them with a request in flight, "
            f"{self.repeated} requests repeated, {self.given_up} given up, {self.refused} refused, "
            f"{self.origins} images compared, {self.controls} commands done and {self.controls_failed} not"
        )

    def add(self, other: "Tally") -> None:
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, name, mine + theirs)


@dataclass
class Request:
    """One request, and what each block that it touches holds once it is done."""

    kind: str
    offset: int
    length: int
    blocks: range
    after: dict[int, bytes] = field(default_factory=dict)
    fua: bool = False
    memory: bytearray | None = None
    error: int = 0
    done: bool = False

    @property
    def changes(self) -> bool:
        return bool(self.after)

    @property
    def found(self) -> bytes:
        """What was read."""
        assert self.memory is not None
        return bytes(memoryview(self.memory)[: self.length])

    def __str__(self) -> str:
        return f"{self.kind} of {self.length} at {self.offset}{' FUA' if self.fua else ''}"


class Buffers:
    """Memory for requests, used again: libnbd's binding never lets go of what it was once handed."""

    def __init__(self) -> None:
        self._free: dict[int, list[bytearray]] = {MOST: [], CHUNK: []}

    def take(self, request: Request) -> Any:
        """Memory for the request's data, as libnbd takes it."""
        import nbd

        size = MOST if request.length <= MOST else CHUNK
        request.memory = self._free[size].pop() if self._free[size] else bytearray(size)
        return nbd.Buffer.from_buffer(memoryview(request.memory)[: request.length])

    def give(self, request: Request) -> None:
        """The request has ended, or its connection has."""
        if request.memory is not None:
            self._free[len(request.memory)].append(request.memory)
            request.memory = None


BUFFERS = Buffers()


class Link:
    """One connection."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.busy: list[Request] = []

    @property
    def dead(self) -> bool:
        return bool(self.handle.aio_is_dead() or self.handle.aio_is_closed())

    def send(self, request: Request) -> None:
        """Raises nbd.Error where the connection is gone."""
        import nbd

        def done(error: Any) -> int:
            request.error, request.done = int(error.value), True
            return 1

        handle, flags = self.handle, nbd.CMD_FLAG_FUA if request.fua else 0
        if request.kind == "write":
            data = bytearray(b"".join(request.after[b] for b in request.blocks))
            start = request.offset - request.blocks.start * BLOCK
            data = data[start : start + request.length]
            buffer = BUFFERS.take(request)
            buffer.to_buffer()[:] = data
            handle.aio_pwrite(buffer, request.offset, completion=done, flags=flags)
        elif request.kind in ("read", "verify", "look"):
            handle.aio_pread(BUFFERS.take(request), request.offset, completion=done)
        elif request.kind == "zero":
            handle.aio_zero(request.length, request.offset, completion=done, flags=flags)
        elif request.kind == "trim":
            handle.aio_trim(request.length, request.offset, completion=done, flags=flags)
        elif request.kind == "cache":
            handle.aio_cache(request.length, request.offset, completion=done)
        else:
            handle.aio_flush(completion=done)
        self.busy.append(request)


class Guest:
    """One disk. `model` is what it holds; `lenient`: refused requests are repeated, and no fault.

    `tears`: a write to the image that a kill interrupts may end inside a block. FUSE cuts requests where the
    memory that they come from is not there, a local file system does not. `trims` False: none are sent, for where no
    holes can be punched a trim may change nothing, and FUSE cannot pass them on.
    """

    def __init__(
        self,
        name: str,
        uri: str,
        content: bytes,
        tally: Tally,
        rng: random.Random,
        *,
        links: int = 2,
        depth: int = 6,
        lenient: bool = False,
        tears: bool = False,
        trims: bool = True,
    ) -> None:
        self.name, self.uri, self.tally, self.rng = name, uri, tally, rng
        self.model = bytearray(content)
        self.size = len(content)
        self.count = -(-self.size // BLOCK)
        self.depth = depth
        self.lenient = lenient
        self.tears = tears
        self.trims = trims
        self.wanted = links
        self.links: list[Link] = []
        self.locked: set[int] = set()
        self.unanswered: list[Request] = []
        self.later: list[tuple[float, Request]] = []
        self.to_verify: list[Request] = []
        self.verifying = 0
        self.quiet = False
        """No new requests are begun."""
        self.may_be_full = False
        """The cache is so small that ENOSPC is no fault: the request is repeated."""
        self.away = False
        """Its disk is detached: it stays without connections."""
        self.serial = 0

    # -- life

    def connect(self) -> None:
        """Connect all, and have the whole disk compared before anything else. Raises nbd.Error."""
        import nbd

        self.hang_up()
        for _ in range(self.wanted):
            handle = nbd.NBD()
            handle.connect_uri(self.uri)
            self.links.append(Link(handle))
        self.compare_all()

    def compare_all(self) -> None:
        """Have the whole disk read and compared; new requests wait."""
        self.to_verify = [
            Request("verify", at, min(CHUNK, self.size - at), range(0))
            for at in range(0, self.size, CHUNK)
        ]
        self.verifying = len(self.to_verify)

    def hang_up(self) -> None:
        """Close the connections. What was not answered is to be settled at the next connect."""
        for link in self.links:
            self._settle(link, gone=True)
            link.handle = None  # closes it
        self.links = []
        for _, request in self.later:
            if not request.changes:
                self.locked.difference_update(request.blocks)
        self.later = [one for one in self.later if one[1].changes]

    @property
    def connected(self) -> bool:
        return bool(self.links) and not any(link.dead for link in self.links)

    @property
    def idle(self) -> bool:
        """Nothing is under way, and nothing is owed."""
        busy = any(link.busy for link in self.links)
        return not (busy or self.verifying or self.unanswered or self.later)

    # -- what comes back

    def reap(self) -> None:
        for link in self.links:
            self._settle(link, gone=False)

    def _settle(self, link: Link, *, gone: bool) -> None:
        dead = gone or link.dead
        left: list[Request] = []
        for request in link.busy:
            if request.done and not request.error:
                self._answered(request)
            elif request.done and not (dead and request.error in GONE):
                self._refused(request)
            elif request.done or dead:
                self._broken(request)
            else:
                left.append(request)
                continue
            BUFFERS.give(request)
        link.busy = left

    def _answered(self, request: Request) -> None:
        if request.kind == "verify":
            self._verified(request)
            return
        if request.kind == "read":
            self.tally.reads += 1
            found = request.found
            if found != self.model[request.offset : request.offset + request.length]:
                self._compare(request.offset, found, "a read")
        elif request.kind == "flush":
            self.tally.flushes += 1
        elif request.kind == "trim":
            self._look_what_it_did(request)
            return
        elif request.kind == "look":
            self._compare(request.offset, request.found, "after a trim", self._after_trim(request))
            self.locked.difference_update(request.blocks)
            return
        for block, data in request.after.items():
            self._set(block, data)
        self.tally.writes += request.changes
        self.locked.difference_update(request.blocks)

    def _look_what_it_did(self, trim: Request) -> None:
        """A trim is a hint: it made zeros, or nothing of what it names. Its blocks stay locked until that is read."""
        first, end = trim.blocks.start * BLOCK, min(self.size, trim.blocks.stop * BLOCK)
        look = Request("look", first, end - first, trim.blocks, trim.after)
        self.later.append((0.0, look))

    def _after_trim(self, look: Request) -> dict[int, Request]:
        return dict.fromkeys(look.blocks, look)

    def _refused(self, request: Request) -> None:
        """The daemon answered with an error: a fault, unless the origin is being made to fail."""
        self.tally.errors[request.error] += 1
        full = self.may_be_full and request.error == errno.ENOSPC
        if request.error in GONE or self.lenient or full:
            self.tally.refused += 1
            self.later.append((time.monotonic() + RETRY_SECONDS, request))
        else:
            self.lose(f"{request} was refused: {errno.errorcode.get(request.error, request.error)}")
            self.locked.difference_update(request.blocks)
            self.verifying -= request.kind == "verify"

    def _broken(self, request: Request) -> None:
        if request.changes:
            self.unanswered.append(request)
        else:
            self.locked.difference_update(request.blocks)

    def _set(self, block: int, data: bytes) -> None:
        self.model[block * BLOCK : block * BLOCK + len(data)] = data

    # -- comparing

    def _verified(self, request: Request) -> None:
        found = request.found
        self.tally.verified += -(-request.length // BLOCK)
        if found != self.model[request.offset : request.offset + request.length]:
            self._compare(request.offset, found, "after a start", self._owed())
        self.verifying -= 1
        if not self.verifying:
            self._decide()

    def _owed(self) -> dict[int, Request]:
        waiting = [*self.unanswered, *(r for _, r in self.later)]
        return {block: request for request in waiting for block in request.after}

    def _compare(
        self, offset: int, found: bytes, when: str, owed: dict[int, Request] | None = None
    ) -> None:
        for at in range(offset - offset % BLOCK, offset + len(found), BLOCK):
            start, end = max(at, offset), min(at + BLOCK, offset + len(found))
            data = found[start - offset : end - offset]
            if data == self.model[start:end]:
                continue
            block = at // BLOCK
            request = (owed or {}).get(block)
            if request is not None and self._is_of(request, block, data):
                self._set(block, data)  # what was read stays
                continue
            self.lose(
                f"block {block} {when}: expected {bytes(self.model[start:end][:48])!r}"
                f"{f' or {request}' if request else ''}, found {data[:48]!r}"
            )
            self.model[start:end] = data

    def _is_of(self, request: Request, block: int, data: bytes) -> bool:
        """Whether the request that was not answered leaves that: all of it or, where blocks tear, its first bytes."""
        new = request.after[block]
        if data == new or not self.tears:
            return data == new
        old = self.model[block * BLOCK : block * BLOCK + len(data)]
        same = next(i for i, (a, b) in enumerate(zip(data, new, strict=True)) if a != b)
        return data[same:] == old[same:]

    def _decide(self) -> None:
        """What had no answer is repeated, as QEMU does, or given up, as a guest that was restarted does."""
        owed, self.unanswered = self.unanswered, []
        self.tally.in_flight += sum(len(request.after) for request in owed)
        give_up = not self.lenient and self.rng.random() < 0.3
        for request in owed:
            if give_up:
                self.tally.given_up += 1
                self.locked.difference_update(request.blocks)
            else:
                self.tally.repeated += 1
                request.done, request.error = False, 0
                self.later.append((0.0, request))

    def lose(self, what: str) -> None:
        self.tally.lost.append(f"{self.name}: {what}")

    # -- what is asked

    def fill(self) -> None:
        """Put requests on their way. Raises nbd.Error where a connection is gone."""
        live = [link for link in self.links if not link.dead]
        if not live:
            return
        while self.to_verify and len(live[0].busy) < self.depth:
            self._send(self.rng.choice(live), self.to_verify, 0)
        now = time.monotonic()
        for i in reversed(range(len(self.later))):
            when, request = self.later[i]
            if when <= now and (request.kind == "verify" or not self.verifying):
                request.done, request.error = False, 0
                link = self.rng.choice(live)
                link.send(request)
                del self.later[i]
        if self.verifying or self.quiet:
            return
        for link in live:
            while len(link.busy) < self.depth:
                fresh = self._new()
                if fresh is None:
                    break
                link.send(fresh)
                self.locked.update(fresh.blocks)

    def _send(self, link: Link, waiting: list[Request], which: int) -> None:
        link.send(waiting[which])
        del waiting[which]

    def _new(self) -> Request | None:
        kind = self.rng.choices(KINDS, WEIGHTS)[0]
        if kind == "trim" and not self.trims:
            kind = "zero"
        if kind == "flush":
            return Request(kind, 0, 0, range(0))
        offset, length = self._range()
        blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        if not self.locked.isdisjoint(blocks):
            return None
        request = Request(kind, offset, length, blocks, fua=self.rng.random() < 0.08)
        if kind == "write":
            self.serial += 1
            request.after = {b: self._written(b, request) for b in blocks}
        elif kind in ("zero", "trim"):
            request.after = self._zeroed(request)
        return request

    def _range(self) -> tuple[int, int]:
        rng = self.rng
        most = self.count if rng.random() < 0.5 else max(1, self.count // 8)
        first = rng.randrange(most)
        blocks = rng.choice((1, 1, 1, 1, 2, 3, 8, 16, 40))
        offset, end = first * BLOCK, min(self.size, (first + blocks) * BLOCK)
        if rng.random() < 0.25:  # not whole blocks
            offset = rng.randrange(offset, min(offset + BLOCK, end))
            end = rng.randrange(offset, end) + 1
        return offset, end - offset

    def _written(self, block: int, request: Request) -> bytes:
        start = block * BLOCK
        whole = bytearray(self.model[start : start + BLOCK])
        text = b"%s block %d write %d\n" % (self.name.encode(), block, self.serial)
        unique = (text * (BLOCK // len(text) + 1))[: len(whole)]
        first = max(0, request.offset - start)
        last = min(len(whole), request.offset + request.length - start)
        whole[first:last] = unique[first:last]
        return bytes(whole)

    def _zeroed(self, request: Request) -> dict[int, bytes]:
        """Zeros where they are asked for. A trim makes zeros of whole blocks and leaves the rest as it was."""
        after = {}
        for block in request.blocks:
            start = block * BLOCK
            whole = bytearray(self.model[start : start + BLOCK])
            first = max(0, request.offset - start)
            last = min(len(whole), request.offset + request.length - start)
            if request.kind == "zero" or (first == 0 and last == BLOCK):
                whole[first:last] = bytes(last - first)
            after[block] = bytes(whole)
        return after


KINDS = ("write", "read", "zero", "trim", "flush", "cache")
WEIGHTS = (60, 24, 5, 5, 3, 3)


class Guests:
    """Several guests on one gateway."""

    def __init__(self, guests: Iterable[Guest]) -> None:
        self.all = list(guests)

    def connect(self) -> bool:
        """All of them. False: the daemon is gone again."""
        import nbd

        try:
            for guest in self.all:
                if not guest.connected and not guest.away:
                    guest.connect()
        except nbd.Error:
            return False
        return True

    def turn(self, timeout: float, *also: int) -> bool:
        """Send what is to be sent, wait for an answer, take it in. False: a connection is gone.

        Descriptors in `also` end the waiting, too.
        """
        import nbd

        for guest in self.all:
            try:
                guest.fill()
            except nbd.Error:
                if guest.connected:
                    raise
                return False
        self._wait(timeout, also)
        for guest in self.all:
            guest.reap()
        return all(guest.connected or guest.away for guest in self.all)

    def _wait(self, timeout: float, also: tuple[int, ...]) -> None:
        import nbd

        poll = select.poll()
        by_fd = {}
        for link in (link for guest in self.all for link in guest.links if not link.dead):
            direction = link.handle.aio_get_direction()
            events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
            events |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            fd = link.handle.aio_get_fd()
            by_fd[fd] = link
            poll.register(fd, events)
        for fd in also:
            poll.register(fd, select.POLLIN)
        for fd, revents in poll.poll(timeout * 1000):
            if fd in by_fd:
                self._notify(by_fd[fd].handle, revents)

    def _notify(self, handle: Any, revents: int) -> None:
        import nbd

        direction = handle.aio_get_direction()
        readable = revents & (select.POLLIN | select.POLLHUP)
        try:
            if readable and direction & nbd.AIO_DIRECTION_READ:
                handle.aio_notify_read()
            elif revents:
                handle.aio_notify_write()
        except nbd.Error:
            pass  # the handle is dead now, and its requests have ended

    def last_words(self) -> None:
        """The daemon has ended: take in what it had sent, then hang up."""
        deadline = time.monotonic() + LINGER_SECONDS
        while any(not link.dead for guest in self.all for link in guest.links):
            self._wait(0.05, ())
            assert time.monotonic() < deadline, "the daemon ended, and its connections did not"
        for guest in self.all:
            guest.reap()
        for guest in self.all:
            guest.hang_up()

    def quiesce(self, seconds: float = 60.0) -> bool:
        """Let what is under way come to its end, and begin nothing new. False: a connection is gone."""
        for guest in self.all:
            guest.quiet = True
        deadline = time.monotonic() + seconds
        while not all(guest.idle for guest in self.all):
            if not self.turn(0.05):
                return False
            assert time.monotonic() < deadline, "requests are not answered"
        return True

    def go_on(self) -> None:
        for guest in self.all:
            guest.quiet = False

    def hang_up(self) -> None:
        for guest in self.all:
            guest.hang_up()
