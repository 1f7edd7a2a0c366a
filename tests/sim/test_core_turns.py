# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A connection that the compiled core serves answers as one that Python serves, request by request.

The same requests of a client, cut anywhere, to two caches: each gets the same reply, and both disks are the same
afterwards. In one batch nothing is read that it writes, or written twice, so that nothing depends on who is first.
Both count how long as many requests of each kind took. Where bytes lie may differ here, since frames are cut where the
socket was empty; test_core_twins.py compares that.
"""

import contextlib
import errno
import random
import select
import shutil
import socket
import struct
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from trio.testing import MockClock

import forebay_fast
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_fast.latency import BUCKETS, REQUESTS
from forebay_nbd import Limits
from forebay_nbd.protocol.session import Session
from forebay_nbd.protocol.wire import MAX_PAYLOAD
from forebay_nbd.server.budget import Budget, Share
from forebay_nbd.server.connection import Connection
from sim.fake_loop import Dice, simulated
from sim.side_disk import DISC, DISK, FLUSH, READ, TRIM, WRITE, Disk, packed
from sim.twins import Side, content, serving

pytestmark = pytest.mark.skipif(bool(forebay_fast.missing), reason="no core: make setup")

HALF = DISK // 2
FUA = 1
HISTORIES = 6
BATCHES = 8


Request = tuple[int, bytes, int]
"""Cookie, what is sent, and how much data a good reply has."""


def batch(rng: random.Random, first: int, writing: int) -> list[Request]:
    """Requests that write in the half of the disk that begins at `writing`, and read in the other one."""
    found: list[Request] = []
    taken: set[int] = set()
    for cookie in range(first, first + rng.choice((1, 1, 2, 5, 20, 60))):
        length = rng.choice((1, 512, SECTOR, SECTOR, SECTOR, 4 * SECTOR, BLOCK, BLOCK, 3 * BLOCK))
        kind = rng.random()
        if kind < 0.45:
            at = HALF - writing + rng.randrange(HALF - length + 1)
            if rng.random() < 0.7:
                at &= -SECTOR
            found.append((cookie, packed(READ, cookie, at, length), length))
        elif kind < 0.9:
            length = max(SECTOR, length & -SECTOR)
            at = writing + rng.randrange(HALF - length + 1) // SECTOR * SECTOR
            if not taken.isdisjoint(range(at, at + length, SECTOR)):
                continue
            taken.update(range(at, at + length, SECTOR))
            data = content(cookie % 256, length // SECTOR)
            flags = FUA if rng.random() < 0.05 else 0
            found.append((cookie, packed(WRITE, cookie, at, length, flags) + data, 0))
        else:
            found.append((cookie, rng.choice(odd(cookie, writing)), 0))
    return found or [(first, packed(FLUSH, first, 0, 0), 0)]


def odd(cookie: int, writing: int) -> list[bytes]:
    """Requests that Python has to look at; none has data in its reply."""
    return [
        packed(FLUSH, cookie, 0, 0),
        packed(FLUSH, cookie, 0, 8),
        packed(READ, cookie, DISK - 1, 2),
        packed(READ, cookie, (1 << 64) - 1, 2),
        packed(READ, cookie, 0, MAX_PAYLOAD + 1),
        packed(READ, cookie, 0, 0),
        packed(WRITE, cookie, 0, 0),
        packed(WRITE, cookie, DISK, SECTOR) + bytes(SECTOR),
        packed(WRITE, cookie, writing + 512, 512) + bytes(512),
        packed(TRIM, cookie, 0, SECTOR),
        packed(77, cookie, 0, SECTOR),
    ]


class Client:
    """The other end of one connection."""

    def __init__(self, end: socket.socket, structured: bool) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(end))
        self._structured = structured
        self._buffer = bytearray()

    async def exchange(
        self, requests: list[Request], rng: random.Random, pause: bool
    ) -> dict[int, bytes]:
        """The replies by cookie. `pause`: it reads nothing before the server waits for that."""

        async def send() -> None:
            stream = b"".join(raw for _, raw, _ in requests)
            while stream:
                cut = rng.choice((len(stream), rng.randrange(1, len(stream) + 1), 28, 30))
                await self._stream.send_all(stream[:cut])
                stream = stream[cut:]
                if rng.random() < 0.5:
                    await trio.testing.wait_all_tasks_blocked()

        lengths = {cookie: length for cookie, _, length in requests}
        replies: dict[int, bytes] = {}
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                if pause:
                    await trio.testing.wait_all_tasks_blocked()
                while len(replies) < len(requests):
                    cookie, reply = await self.reply(lengths)
                    assert cookie not in replies, "two replies to one request"
                    replies[cookie] = reply
        assert not self._buffer, "bytes that belong to no reply"
        return replies

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            got = await self._stream.receive_some(4096)
            assert got, "the server hung up"
            self._buffer += got
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def reply(self, lengths: dict[int, int]) -> tuple[int, bytes]:
        head = await self._take(16)
        magic, error, cookie = struct.unpack(">IIQ", head)
        if magic == 0x67446698:
            data = 0 if error or self._structured else lengths[cookie]
            return cookie, head + await self._take(data)
        assert magic == 0x668E33EF, hex(magic)
        assert self._structured
        more = await self._take(4)
        return cookie, head + more + await self._take(struct.unpack(">I", more)[0])

    def fileno(self) -> int:
        return self._stream.socket.fileno()

    async def leave(self) -> None:
        await self._stream.send_all(packed(DISC, 0, 0, 0))
        await self._stream.aclose()


async def tell(side: Side, name: int, structured: bool, small: bool, core: bool) -> list[object]:
    """All replies to a history, and what the disk holds after each batch."""
    rng = random.Random(name)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    limits = Limits(turn_seconds=1e9, poll_seconds=0.0)
    disk, client = Disk(side), Client(theirs, structured)
    told: list[object] = []
    with serving(core=core):
        connection = Connection(ours, limits, Share(Budget(64 << 20)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.resume, Session("d", structured), disk)
            try:
                for n in range(BATCHES):
                    requests = batch(rng, 1000 * n, HALF * (n % 2))
                    if small:  # what waits for the client lets tasks run in between
                        requests = [one for one in requests if one[2]] or requests[:1]
                    told.append(await client.exchange(requests, rng, pause=rng.random() < 0.5))
                    told.append(b"".join(await side.view.read(0, DISK)))
                    if rng.random() < 0.3:
                        await side.do(("commit",))
                    if rng.random() < 0.3:
                        await side.do(("forget_ready",))
                    if rng.random() < 0.3:
                        await side.do(("freeze",))
                await client.leave()
            finally:
                connection.abort()
                theirs.close()
    assert not small or disk.pins, "the client took everything at once"
    latency = disk.timing.latency
    told.append({kind: sum(latency.of(n)[:BUCKETS]) for n, kind in enumerate(REQUESTS)})
    return told


def compare(name: int) -> None:
    structured, small = bool(name & 1), name % 3 == 0
    with contextlib.ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="forebay-turns-"))
        stack.callback(shutil.rmtree, home)
        stack.enter_context(simulated(Dice("turns")))
        forebay_fast.core.write_by_python(False)
        both = []
        for core in (False, True):
            (home / str(core)).mkdir()
            both.append(Side(home / str(core), core=core, size=32 << 20))
            stack.callback(both[-1].cache.release)
        told = [
            trio.run(tell, side, name, structured, small, core, clock=MockClock(0, 0.01))
            for side, core in zip(both, (False, True), strict=True)
        ]
        for n, (one, other) in enumerate(zip(*told, strict=True)):
            assert one == other, f"history {name}, batch {n // 2}: not the same"


@pytest.mark.parametrize("name", range(HISTORIES))
def test_both_answer_the_same(name: int) -> None:
    compare(name)


# -- one thing at a time, with Python, with the core, and with a bug in it --------------------------------------------


Story = Callable[[Disk, Client, Side], Awaitable[None]]


def play(story: Story, *, core: bool) -> None:
    async def live() -> None:
        side = Side(home, core=core)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        disk, client = Disk(side), Client(theirs, structured=False)
        with serving(core=core), trio.fail_after(10):
            connection = Connection(ours, Limits(poll_seconds=0.0), Share(Budget(64 << 20)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.resume, Session("d", structured=False), disk)
                try:
                    await story(disk, client, side)
                finally:
                    connection.abort()
                    theirs.close()
        side.cache.release()

    with contextlib.ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="forebay-turns-"))
        stack.callback(shutil.rmtree, home)
        stack.enter_context(simulated(Dice("turns")))
        trio.run(live, clock=MockClock(0, 0.01))


async def requests_behind_a_half_sent_reply(disk: Disk, client: Client, side: Side) -> None:
    """A task has sent part of its reply; what is answered at once waits for the rest."""
    side.do_writes([(0, 1, 7)], -1)
    miss, hit = (
        (1, packed(READ, 1, HALF, 4 * BLOCK), 4 * BLOCK),
        (2, packed(READ, 2, 0, 4096), 4096),
    )
    await client.send(miss[1])
    await trio.sleep(1)
    await client.send(hit[1])
    await trio.sleep(1)
    lengths = {1: miss[2], 2: hit[2]}
    first, second = await client.reply(lengths), await client.reply(lengths)
    assert (first[0], second[0]) == (1, 2)
    assert first[1][16:] == await disk.fetch(HALF, 4 * BLOCK)
    assert second[1][16:] == content(7, 1)


async def a_publish_that_fails(disk: Disk, client: Client, side: Side) -> None:
    """No write is acknowledged before its record is with the kernel."""
    side.cache.intent.publish()
    write = packed(WRITE, 3, 0, SECTOR) + bytes(SECTOR)
    with mock.patch.object(side.cache.intent.journal, "write", side_effect=OSError(28, "full")):
        await client.send(write)
        cookie, reply = await client.reply({3: 0})
    assert (cookie, struct.unpack(">I", reply[4:8])[0]) == (3, errno.ENOSPC)


async def a_write_that_the_disk_is_told_was_answered(
    disk: Disk, client: Client, side: Side
) -> None:
    """When its reply can be received, once for what came in one piece, and not for reads."""
    told: list[bool] = []
    end = client.fileno()
    disk.on_answer = lambda: told.append(bool(select.select([end], [], [], 0)[0]))
    await client.send(packed(WRITE, 1, 0, SECTOR) + bytes(SECTOR))
    await client.reply({1: 0})
    await client.send(packed(READ, 2, 0, SECTOR))
    await client.reply({2: SECTOR})
    assert told == [True]
    await client.send(written(3)[1] + packed(WRITE, 4, HALF, SECTOR) + bytes(SECTOR))
    assert {(await client.reply({3: 0, 4: 0}))[0] for _ in range(2)} == {3, 4}
    assert told == [True, True]


async def several_reads_in_one_piece(disk: Disk, client: Client, side: Side) -> None:
    """All of them are answered, although nothing more comes."""
    side.do_writes([(0, 1, 7)], -1)
    await client.send(b"".join(packed(READ, n, 0, 512) for n in range(9)))
    replies = [await client.reply(dict.fromkeys(range(9), 512)) for _ in range(9)]
    assert [cookie for cookie, _ in replies] == list(range(9))


class Held:
    """The syncs of a cache that the kernel does begin, and end only when told so; ``done`` counts all syncs."""

    def __init__(self, side: Side, error: int = 0) -> None:
        self.done = 0
        self._go = trio.Semaphore(0)
        syncer: Any = side.cache.sync._syncer
        syncer._sync, syncer._kernel = self._sync, partial(self._kernel, syncer._kernel)
        self._error = error

    def _sync(self) -> None:
        self.done += 1
        if self._error:
            raise OSError(self._error, "injected")

    async def _kernel(self, really: Callable[[], Awaitable[None]]) -> None:
        await self._go.acquire()
        await really()

    async def exchange(self, client: Client, flush: Request, others: list[Request]) -> list[int]:
        """Errors of all but the first, then of the flush, whose sync goes on when these have been answered."""
        before = self.done
        for _, raw, _ in (others[0], flush):
            await client.send(raw)
        await trio.sleep(0.1)
        for _, raw, _ in others[1:]:
            await client.send(raw)
        lengths = {cookie: length for cookie, _, length in (*others, flush)}
        errors: dict[int, int] = {}
        while len(errors) < len(lengths):
            cookie, reply = await client.reply(lengths)
            assert cookie != flush[0] or self.done > before, "answered before the sync"
            errors[cookie] = struct.unpack(">I", reply[4:8])[0]
            if errors.keys() | {flush[0]} == lengths.keys():
                self._go.release()
        return [errors[cookie] for cookie, _, _ in (*others[1:], flush)]


def written(cookie: int) -> Request:
    return cookie, packed(WRITE, cookie, 0, SECTOR) + content(cookie, 1), 0


async def a_flush_that_takes_long(disk: Disk, client: Client, side: Side) -> None:
    """It is answered when its sync has ended, and all else meanwhile."""
    held = Held(side)
    for n in range(0, 30, 3):
        flush = n + 1, packed(FLUSH, n + 1, 0, 0), 0
        read = n + 2, packed(READ, n + 2, 0, SECTOR), SECTOR
        assert await held.exchange(client, flush, [written(n), read]) == [0, 0]


async def a_flush_that_python_takes_over(disk: Disk, client: Client, side: Side) -> None:
    """Something that only Python looks at comes while the sync goes on: each request has one reply."""
    held = Held(side)
    for n in range(0, 40, 4):
        flush = n + 1, packed(FLUSH, n + 1, 0, 0), 0
        trim = n + 2, packed(TRIM, n + 2, 0, SECTOR), 0
        read = n + 3, packed(READ, n + 3, 0, SECTOR), SECTOR
        found = await held.exchange(client, flush, [written(n), trim, read])
        assert found == [errno.ENOSPC, 0, 0]


async def a_flush_that_fails(disk: Disk, client: Client, side: Side) -> None:
    """Whoever has asked for it is told, and the device has failed."""
    held = Held(side, errno.EIO)
    assert await held.exchange(client, (2, packed(FLUSH, 2, 0, 0), 0), [written(1)]) == [errno.EIO]
    assert side.cache.failed is not None
    await client.send(packed(FLUSH, 3, 0, 0))
    cookie, reply = await client.reply({3: 0})
    assert (cookie, struct.unpack(">I", reply[4:8])[0]) == (3, errno.EIO)


SOUND = (
    a_flush_that_python_takes_over,
    a_flush_that_fails,
    a_write_that_the_disk_is_told_was_answered,
)
"""Stories in which the bugs do no harm."""
BUGS: dict[Story, str] = {
    a_flush_that_takes_long: "reply before sync",
    requests_behind_a_half_sent_reply: "past the outbox",
    a_publish_that_fails: "record after reply",
    several_reads_in_one_piece: "waits too early",
}


@pytest.mark.expect_log("cache device .* failed|connection .* failed")
@pytest.mark.parametrize("story", [*BUGS, *SOUND])
@pytest.mark.parametrize("core", [False, True])
def test_a_connection_keeps_its_order(story: Story, core: bool) -> None:
    play(story, core=core)


@pytest.mark.expect_log("cache device .* failed|connection .* failed")
@pytest.mark.parametrize("story", BUGS)
def test_a_bug_in_the_core_is_found(story: Story) -> None:
    if not forebay_fast.core.has_plants:
        pytest.skip("compiled without plants: make setup")
    found = (AssertionError, trio.TooSlowError, BaseExceptionGroup)
    bug = mock.patch.object(forebay_fast.core, "bugs", frozenset({BUGS[story]}))
    with bug, pytest.raises(found):
        play(story, core=True)
