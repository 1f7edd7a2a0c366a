# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The compiled core: its checksums are those of the on-disk format, and whoever wants to does without it."""

import random
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.lowlevel
from xxhash import xxh3_64_intdigest

import forebay_fast
from forebay_cache.format.checksum import ZERO_SECTOR_SUM, checksum
from forebay_fast.loop import epoll_of_loop, rest, wait_of_loop
from forebay_nbd import Limits, Timing
from forebay_nbd.protocol.events import Request
from forebay_nbd.protocol.requests import RequestReader
from forebay_nbd.protocol.wire import (
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Cmd,
)
from forebay_nbd.server import polling

core = pytest.importorskip("forebay_fast.core", reason="the core is not compiled: make setup")

SECTOR = 4096


@pytest.fixture
def as_before() -> Iterator[None]:
    was = forebay_fast.serves()
    yield
    forebay_fast.use(was)


@pytest.mark.parametrize("portable", [False, True])
def test_its_checksum_is_that_of_the_format(rng: random.Random, portable: bool) -> None:
    for _ in range(200):
        sector = rng.randbytes(SECTOR)
        assert core.checksum(sector, portable=portable) == checksum(sector)
        assert checksum(sector) == xxh3_64_intdigest(sector) & 0xFFFFFFFF
    assert core.checksum(bytes(SECTOR), portable=portable) == ZERO_SECTOR_SUM
    for place in range(0, SECTOR, 61):  # every stripe counts, the last one included
        one_bit = bytes(place) + b"\1" + bytes(SECTOR - place - 1)
        assert core.checksum(one_bit, portable=portable) == checksum(one_bit)


@pytest.mark.parametrize("length", [0, 1, SECTOR - 1, SECTOR + 1, 2 * SECTOR])
def test_what_is_no_sector_has_no_checksum(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes"):
        core.checksum(bytes(length))


def test_its_crc_is_that_of_zlib(rng: random.Random) -> None:
    for length in (*range(70), 511, 4096, 40_000):
        data, before = rng.randbytes(length), rng.getrandbits(32)
        assert core.crc32(data, before) == zlib.crc32(data, before)
        assert core.crc32(memoryview(data)) == zlib.crc32(data)


def test_a_setting_turns_it_off(as_before: None) -> None:
    forebay_fast.use(False)
    assert not forebay_fast.serves()


@pytest.mark.parametrize(("variable", "serves"), [({"FOREBAY_CORE": "0"}, "False"), ({}, "True")])
def test_the_environment_turns_it_off_whatever_is_set(
    variable: dict[str, str], serves: str
) -> None:
    program = "import forebay_fast; forebay_fast.use(True); print(forebay_fast.serves())"
    assert _run(program, variable) == serves


def test_without_it_the_package_says_why() -> None:
    program = (
        "import sys; sys.modules['forebay_fast.core'] = None\n"
        "import forebay_fast; forebay_fast.use(True); print(forebay_fast.serves(), forebay_fast.missing)"
    )
    assert _run(program, {}).startswith("False there was no C compiler")


def _run(program: str, variables: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# -- the wait of the loop: trio keeps its epoll object to itself, so a newer trio may keep it elsewhere ---------------


async def test_the_loop_can_wait_in_the_core() -> None:
    found = epoll_of_loop()
    assert found is not None, (
        "trio has changed: connections are served by turns, see forebay_fast/loop.py"
    )
    manager, epoll = found
    wait = wait_of_loop()
    assert manager._epoll is wait
    assert wait is not epoll
    assert wait_of_loop() is wait, "one for each loop"


async def test_a_loop_that_waits_in_the_core_does_all_that_it_did() -> None:
    """Sleep, sockets, calls from threads, cancellation; with a connection at rest, on which nothing comes."""
    wait = wait_of_loop()
    assert wait is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        turn = core.Turn(
            RequestReader(),
            Nothing(),
            Nothing(),
            ours.fileno(),
            Limits(),
            structured=False,
            refusal=len,
            polling=polling,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rest, wait, turn)
            await trio.sleep(0.001)
            assert await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(id, 7)) == id(7)
            left, right = trio.socket.socketpair()
            with left, right:
                nursery.start_soon(left.send, b"x")
                assert await right.recv(1) == b"x"
            with trio.move_on_after(0.001) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()


async def test_what_comes_to_a_connection_at_rest_is_answered_or_told() -> None:
    wait = wait_of_loop()
    assert wait is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        reader, out = RequestReader(), Nothing()
        turn = core.Turn(
            reader,
            Nothing(),
            out,
            ours.fileno(),
            Limits(),
            structured=False,
            refusal=len,
            polling=polling,
        )
        theirs.send(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.READ, 5, 0, 4))
        theirs.send(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.FLUSH, 6, 0, 0))
        assert await rest(wait, turn) == core.OTHER
        assert theirs.recv(100) == SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 5) + b"data"
        request = reader.next_event()
        assert isinstance(request, Request)
        assert request.cookie == 6
        theirs.close()
        assert await rest(wait, turn) == core.GONE


async def test_a_client_that_leaves_its_replies_unread_is_answered_on() -> None:
    """And the loop goes on, which waits a moment for such a client before it looks for the next request."""
    wait = wait_of_loop()
    assert wait is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        turn = core.Turn(
            RequestReader(),
            Nothing(),
            Nothing(),
            ours.fileno(),
            Limits(),
            structured=False,
            refusal=len,
            polling=polling,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rest, wait, turn)
            for cookie in range(60):  # of which the kernel counts a page or so each
                theirs.send(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.READ, cookie, 0, 4))
                await trio.sleep(0.0001)
            while len(theirs.recv(10000, socket.MSG_PEEK)) < 60 * 20:  # noqa: ASYNC110
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        replies = theirs.recv(10000)
        cookies = [SIMPLE_REPLY.unpack(replies[at : at + 16])[2] for at in range(0, 1200, 20)]
        assert cookies == list(range(60))


async def test_a_client_with_much_to_read_is_looked_at_again_and_so_are_others() -> None:
    """The loop sleeps while it has, and does not look for its next request then."""
    wait = wait_of_loop()
    assert wait is not None
    busy, other = Client(bytes(SECTOR)), Client(b"data")
    with busy.ours, busy.theirs, other.ours, other.theirs:
        async with trio.open_nursery() as nursery:
            busy.ask(*range(24))
            nursery.start_soon(rest, wait, busy.turn)
            nursery.start_soon(rest, wait, other.turn)
            await busy.has(24)
            busy.ask(24)
            other.ask(0)
            await busy.has(25)
            await other.has(1)
            nursery.cancel_scope.cancel()


async def test_an_export_that_breaks_ends_its_connection_and_not_the_loop() -> None:
    wait = wait_of_loop()
    assert wait is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        export = Nothing()
        export.read_now = None  # type: ignore[assignment]
        turn = core.Turn(
            RequestReader(),
            export,
            Nothing(),
            ours.fileno(),
            Limits(),
            structured=False,
            refusal=len,
            polling=polling,
        )
        theirs.send(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.READ, 5, 0, 4))
        with pytest.raises(TypeError):
            await rest(wait, turn)
        await trio.lowlevel.checkpoint()


class Nothing:
    """An export, and an outbox, as far as a turn asks for them."""

    size, read_only, broken = 4096, False, False
    _unsent: tuple[()] = ()
    timing = Timing()

    def __init__(self, data: bytes = b"data") -> None:
        self.data = data

    def read_now(self, offset: int, length: int) -> bytes:
        return self.data

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        return False


class Client:
    """A connection whose export has `data` everywhere: both ends of its socket, and the turn that serves it."""

    def __init__(self, data: bytes) -> None:
        self.length = SIMPLE_REPLY.size + len(data)
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.turn = core.Turn(
            RequestReader(),
            Nothing(data),
            Nothing(),
            self.ours.fileno(),
            Limits(),
            structured=False,
            refusal=len,
            polling=polling,
        )

    def ask(self, *cookies: int) -> None:
        self.theirs.send(
            b"".join([REQUEST.pack(REQUEST_MAGIC, 0, Cmd.READ, one, 0, 4) for one in cookies])
        )

    async def has(self, replies: int) -> None:
        """Returns when so many replies, and no more, can be read."""
        while (found := self._can_read()) < replies * self.length:  # noqa: ASYNC110
            await trio.sleep(0.001)
        assert found == replies * self.length

    def _can_read(self) -> int:
        try:
            return len(self.theirs.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return 0
