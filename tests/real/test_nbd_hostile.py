# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Clients that mean no good, after the CVE table of NBD servers: each hurts its own connection and nothing else."""

import contextlib
import re
import resource
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay.config.model import Config
from forebay.config.sections import OriginsSection
from forebay.errors import ForebayError
from forebay.origin.addresses import resolve
from forebay_nbd import Limits
from forebay_nbd.server.limits import REFUSALS
from real.gateway_process import GatewayProcess
from real.nbd_hostile_cases import BREAKS, ENDS, ERRORS, MIB, REFUSED, STREAMS, contexts
from real.nbd_memory import MemoryExport, Running, serving
from real.nbd_raw import Raw, go, option, request, still_serves, until
from real.processes import random_image

QUICK = Limits(handshake_seconds=0.3, stall_seconds=0.05)
"""For tests in which somebody has to be given up."""


@pytest.fixture
async def running(short_path: Path) -> AsyncIterator[Running]:
    async with serving(short_path) as server:
        yield server


@pytest.mark.parametrize("data", ENDS.values(), ids=ENDS.keys())
async def test_what_ends_a_handshake(running: Running, data: bytes) -> None:
    async with Raw(running.path) as bad:
        await bad.hello()
        await bad.send(data)
        await bad.hangs_up()
    await still_serves(running.path)


@pytest.mark.parametrize(("number", "data", "kind"), REFUSED.values(), ids=REFUSED.keys())
async def test_refused_options_keep_the_stream(
    running: Running, number: int, data: bytes, kind: int
) -> None:
    async with Raw(running.path) as bad:
        await bad.hello()
        await bad.send(option(number, data) + option(3))
        answered, got, text = await bad.reply()
        assert (answered, got) == (number, kind)
        assert len(text) <= 256
        assert await bad.reply() == (3, 2, b"\0\0\0\4disk")
        assert await bad.reply() == (3, 1, b"")
        await bad.send(go())
        assert (await bad.reply())[1] == 3


# LIST (9) and SET (10) of contexts: queries, and the names they give.
BOTH = [b"base:allocation", b"forebay:cached"]
CONTEXTS = [
    (9, [], BOTH),
    (9, [b"base:"], BOTH[:1]),
    (9, [b"forebay:"], BOTH[1:]),
    (9, [b"qemu:"], []),
    (9, [b"base:alloc"], []),
    (9, [b"base:allocation", b"x-none:x", b"forebay:cached"], BOTH),
    (10, [], []),
    (10, [b"base:"], []),
    (10, [b"base:allocation"], BOTH[:1]),
    (10, [b"forebay:cached", b"base:allocation", b"base:allocation"], BOTH),
    (10, [b"qemu:dirty-bitmap:x"], []),
]


@pytest.mark.parametrize(("number", "queries", "found"), CONTEXTS)
async def test_context_queries(
    running: Running, number: int, queries: list[bytes], found: list[bytes]
) -> None:
    async with Raw(running.path) as client:
        await client.hello()
        await client.send(option(8) + option(number, contexts(*queries)))
        await client.reply()
        names, numbers = [], []
        while (reply := await client.reply())[1] == 4:
            numbers.append(int.from_bytes(reply[2][:4]))
            names.append(reply[2][4:])
        assert reply == (number, 1, b"")
        assert names == found
        assert numbers == ([0] * len(found) if number == 9 else list(range(1, len(found) + 1)))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (contexts(b"no colon"), 2**31 + 3),
        (contexts(b""), 2**31 + 3),
        (contexts(*[b"base:"] * 33), 2**31 + 9),
        (contexts(b"base:", name=b"nothing"), 2**31 + 6),
        (b"\0\0\0\0\xff\xff\xff\xff", 2**31 + 9),
        (b"\0\0\0\0\0\0\0\1\xff\xff\xff\xff", 2**31 + 3),
    ],
)
async def test_wrong_context_queries(running: Running, data: bytes, kind: int) -> None:
    """And what had been selected before is no longer, so BLOCK_STATUS is refused."""
    async with Raw(running.path) as client:
        await client.hello()
        await client.send(option(8) + option(10, contexts(b"base:allocation")) + option(10, data))
        replies = [await client.reply() for _ in range(4)]
        assert replies[3][:2] == (10, kind)
        await client.send(go(b"") + request(7, 0, 512))
        while (await client.reply())[1] != 1:
            pass
        _, _, kind, _, _ = struct.unpack(">IHHQI", await client.receive(20))
        assert kind == 0x8001


async def test_contexts_of_another_name_do_not_count(running: Running) -> None:
    async with Raw(running.path) as client:
        await client.hello()
        await client.send(option(8) + option(10, contexts(b"base:allocation")) + go(b"disk"))
        replies = [await client.reply() for _ in range(5)]
        assert replies[-1] == (7, 1, b"")
        await client.send(request(7, 0, 512))
        assert struct.unpack(">IHHQI", await client.receive(20))[2] == 0x8001


async def test_the_oldest_way_in(running: Running) -> None:
    """EXPORT_NAME, without NO_ZEROES and without fixed newstyle."""
    for flags, padding in ((0, 124), (1, 124), (3, 0)):
        async with Raw(running.path) as client:
            await client.hello(flags)
            await client.send(option(1, b"disk") + request(0, 0, 4, cookie=5))
            size, _ = struct.unpack(">QH", await client.receive(10))
            assert size == running.export.size
            assert await client.receive(padding) == bytes(padding)
            assert await client.simple(4) == (0, 5, bytes(4))


@pytest.mark.parametrize(("data", "code"), ERRORS.values(), ids=ERRORS.keys())
async def test_errors_keep_the_connection(running: Running, data: bytes, code: int) -> None:
    async with Raw(running.path) as bad:
        await bad.enter()
        await bad.send(data + request(0, 0, 8, cookie=2))
        assert await bad.simple() == (code, 1, b"")
        assert await bad.simple(8) == (0, 2, bytes(8))


async def test_requests_of_no_bytes(running: Running) -> None:
    async with Raw(running.path) as client:
        await client.enter()
        for command in (0, 1, 4, 5, 6):
            await client.send(request(command, 8 * MIB, 0, cookie=command))
            assert await client.simple() == (0, command, b"")
    async with Raw(running.path) as client:
        await client.enter(structured=True)
        await client.send(request(0, 0, 0, cookie=3))
        assert struct.unpack(">IHHQI", await client.receive(20)) == (0x668E33EF, 1, 0, 3, 0)


@pytest.mark.parametrize("data", BREAKS.values(), ids=BREAKS.keys())
async def test_what_ends_transmission(running: Running, data: bytes) -> None:
    async with Raw(running.path) as bad:
        await bad.enter()
        await bad.send(data)
        await bad.stream.send_eof()
        await bad.hangs_up()
    await still_serves(running.path)


async def test_gone_without_a_word_in_transmission(running: Running) -> None:
    async with Raw(running.path) as bad:
        await bad.enter()
    await still_serves(running.path)


async def test_hanging_up_at_every_byte(running: Running) -> None:
    whole = (
        struct.pack(">I", 3)
        + option(8)
        + option(10, contexts(b"base:allocation"))
        + go(b"")
        + request(0, 0, 64)
        + request(1, 0, 16, payload=bytes(16))
        + request(3)
        + request(7, 0, 512)
    )
    for count in range(len(whole) + 1):
        async with Raw(running.path) as bad:
            await bad.receive(18)
            await bad.send(whole[:count])
    await still_serves(running.path)
    assert running.export.clients <= 1


async def test_queued_reads_and_a_hang_up(short_path: Path) -> None:
    """nbdkit 9d82aa4f: many reads in flight, and the client is gone."""
    export = MemoryExport(slow=True)
    async with serving(short_path, export) as running:
        async with Raw(running.path) as bad:
            await bad.enter()
            await bad.send(request(0, 0, 65536) * 86)
            await until(lambda: export.waiting == 64)
        export.gate.set()
        export.slow = False
        await still_serves(running.path)


async def test_block_status_of_4_gib_minus_one(short_path: Path) -> None:
    """CVE-2025-47711, CVE-2025-47712: the extent is cut to 32 bits, and to the end."""

    class Huge(MemoryExport):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.size = 8 << 30

    async with serving(short_path, Huge()) as running, Raw(running.path) as client:
        await client.hello()
        await client.send(option(8) + option(10, contexts(b"forebay:cached")) + go(b""))
        replies = [await client.reply() for _ in range(5)]
        assert replies[-1] == (7, 1, b"")
        for offset, flags, expected in (
            (0, 0, (1 << 32) - 65536),
            (4096, 8, 0xFFFFFFFF),
            ((8 << 30) - 100, 0, 100),
        ):
            length = min(0xFFFFFFFF, (8 << 30) - offset)
            await client.send(request(7, offset, length, flags=flags))
            head = struct.unpack(">IHHQI", await client.receive(20))
            assert (head[2], head[4]) == (5, 12)
            assert struct.unpack(">III", await client.receive(12))[1] == expected


async def test_a_silent_client_is_dropped_in_time(short_path: Path) -> None:
    async with serving(short_path, limits=QUICK) as running:
        for said in (b"", b"\0\0\0", struct.pack(">I", 3), struct.pack(">I", 3) + option(3) * 2):
            async with Raw(running.path) as idle:
                await idle.send(said)
                with trio.fail_after(5):
                    await idle.hangs_up()
        # Transmission has begun: no deadline any more.
        async with Raw(running.path) as client:
            await client.enter()
            await trio.sleep(0.5)
            await client.send(request(0, 0, 8))
            assert await client.simple(8) == (0, 1, bytes(8))


async def test_too_many_connections(short_path: Path) -> None:
    async with serving(short_path, limits=Limits(connections=3)) as running:
        async with Raw(running.path) as one, Raw(running.path) as two, Raw(running.path) as three:
            for client in (one, two, three):
                await client.enter()
            async with Raw(running.path) as four:
                await four.hello()
                for asked in (go(b"disk"), option(3)):
                    await four.send(asked)
                    _, kind, text = await four.reply()
                    assert (kind, text[:37]) == (
                        2**31 + 2,
                        b"3 connections to this socket at most:",
                    )
            async with Raw(
                running.path
            ) as five:  # which asks in the old way, where no reply says no
                await five.hello()
                await five.send(option(1, b"disk"))
                assert await five.hangs_up() == b""
            assert len(running.server.connections) == 3
        await until(lambda: not running.server.connections)


async def test_who_is_told_that_there_is_no_room_takes_none(short_path: Path) -> None:
    async with serving(short_path, limits=Limits(connections=1)) as running:
        async with contextlib.AsyncExitStack() as stack:
            one = await stack.enter_async_context(Raw(running.path))
            await one.enter()
            silent = [await stack.enter_async_context(Raw(running.path)) for _ in range(REFUSALS)]
            for client in silent:
                await client.hello()
            async with Raw(running.path) as another:
                assert await another.hangs_up() == b""
            await silent[0].stream.aclose()
            await until(lambda: running.server.refusals < REFUSALS)
            async with Raw(running.path) as another:
                await another.hello()
            with trio.fail_after(10):
                for client in silent[1:]:  # they have had their time
                    await client.hangs_up()
            await one.send(request(0, 0, 8))
            assert await one.simple(8) == (0, 1, bytes(8))
        await until(lambda: not running.server.connections)
        await still_serves(running.path)


async def test_pipelined_reads_never_read(short_path: Path) -> None:
    """It may fill its own socket and its own share of memory; others are served meanwhile."""
    limits = Limits(stall_seconds=0.05, send_buffer=64 << 10, batch_bytes=MIB)
    async with serving(short_path, limits=limits) as running:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        async with Raw(running.path) as bad:
            await bad.enter()
            with trio.move_on_after(0.5):
                await bad.stream.send_all(request(0, 0, MIB) * 100_000)
            assert running.export.pins == 0, "a stalled client keeps the cache pinned"
            assert running.export.now < 20
            await still_serves(running.path)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100 << 10  # KiB


async def test_memory_of_all_connections_is_bounded_and_a_live_one_gets_its_share(
    short_path: Path,
) -> None:
    """Ten clients stop in the middle of a large write; the eleventh needs memory, too."""
    limits = Limits(stall_seconds=0.05, server_bytes=8 * MIB)
    async with serving(short_path, limits=limits) as running, trio.open_nursery() as nursery:

        async def half(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            async with Raw(running.path) as bad:
                await bad.enter()
                await bad.send(request(1, 0, 2 * MIB, payload=bytes(300_000)))
                task_status.started()
                await trio.sleep_forever()

        for _ in range(10):
            await nursery.start(half)
        async with Raw(running.path) as good:
            await good.enter()
            for cookie in range(3):
                await good.send(request(1, 0, 6 * MIB, payload=bytes(6 * MIB), cookie=cookie))
                assert await good.simple() == (0, cookie, b"")
        nursery.cancel_scope.cancel()


async def throw(path: str, start: Callable[[Raw], Awaitable[None]], pieces: list[bytes]) -> None:
    async with Raw(path) as bad:
        await start(bad)
        for piece in pieces:
            try:
                await bad.stream.send_all(piece)
            except trio.BrokenResourceError:
                return
        await bad.stream.send_eof()
        await bad.hangs_up()


@pytest.mark.parametrize("slow", [False, True], ids=["hits", "misses"])
def test_random_streams(short_path: Path, slow: bool) -> None:
    """Anything may be said, at any stage: afterwards a good client is served, and nothing has leaked."""

    async def one(pieces: list[bytes], stage: int, number: int) -> None:
        export = MemoryExport(slow=slow)
        export.gate.set()
        directory = short_path / str(number)
        directory.mkdir()
        stages = (Raw.hello, Raw.enter, lambda raw: Raw.enter(raw, structured=True))
        async with serving(directory, export) as running:
            await throw(running.path, stages[stage], pieces)
            export.slow = False
            await still_serves(running.path)
            await until(lambda: not running.server.connections)
            assert running.server._budget.used == 0

    count = 0

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(STREAMS, st.integers(0, 2))
    def check(pieces: list[bytes], stage: int) -> None:
        nonlocal count
        count += 1
        trio.run(one, pieces, stage, count)

    check()


async def test_the_export_is_opened_at_go_and_not_before(running: Running) -> None:
    """CVE-2019-14850: whoever only connects, or asks, costs nothing behind the protocol."""
    async with Raw(running.path) as idle:
        await idle.hello()
        await idle.send(option(3) + go(b"disk", 6))
        while (await idle.reply())[:2] != (6, 1):
            pass
        assert running.export.clients == 0
        assert running.export.log == []
        await idle.send(go(b"disk"))
        while (await idle.reply())[:2] != (7, 1):
            pass
        await until(lambda: running.export.clients == 1)


@pytest.mark.parametrize(
    "stage", ["connected", "half an option", "transmission", "half a write", "stalled"]
)
async def test_the_server_stops_whatever_clients_are_at(short_path: Path, stage: str) -> None:
    """CVE-2024-7409, CVE-2015-0847: clients that are connected in any way do not hold up, or crash, the end."""
    limits = Limits(handshake_seconds=0.5, shutdown_seconds=0.5, stall_seconds=0.05)
    said = {
        "connected": b"",
        "half an option": struct.pack(">I", 3) + b"IHAVEOPT",
        "transmission": struct.pack(">I", 3) + go(b""),
        "half a write": struct.pack(">I", 3) + go(b"") + request(1, 0, MIB, payload=bytes(1000)),
        "stalled": struct.pack(">I", 3) + go(b"") + request(0, 0, MIB) * 64,
    }[stage]
    async with serving(short_path, limits=limits) as running, contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            bad = await stack.enter_async_context(Raw(running.path))
            await bad.receive(18)
            await bad.send(said)
        await until(lambda: len(running.server.connections) == 10)
        with trio.fail_after(20):
            await running.stop()
        assert not running.server.connections


def test_no_uri_starts_a_program() -> None:
    """CVE-2025-14946: `nbd+ssh` with a host that is an option of ssh."""
    config = Config(origins=OriginsSection(nbd=["*"]))
    for text in (
        "nbd+ssh://-oProxyCommand=touch%20x/disk",
        "nbds+ssh://host/disk",
        "nbd+vsock://1/disk",
        "nbd://-oProxyCommand=x/disk",
        "nbd+unix:///disk?socket=-o",
    ):
        with pytest.raises(ForebayError):
            resolve(config, text)


# --- the whole daemon --------------------------------------------------------------------------------


MOST_GROWTH = 64 << 10
"""KiB that a daemon may grow by, whatever it is told: its limits, and what the allocator keeps."""


class Target:
    """A daemon with a disk whose first bytes are known, and how a good client finds it."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway
        self.content = random_image(gateway.images / "disk.raw", 8 * MIB, 1, [])
        self.path = str(gateway.attach("disk", "disk.raw", mode="write-back"))
        trio.run(self.serves)  # what a first client brings into memory is not counted
        self.before = self.resident()

    def resident(self) -> int:
        """KiB."""
        text = Path(f"/proc/{self.gateway.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0])

    async def serves(self) -> None:
        """A good client reads what lies there; the daemon is the same, and not much larger."""
        async with Raw(self.path) as good:
            await good.enter()
            await good.send(request(0, 7 * MIB, 512, cookie=77))
            assert await good.simple(512) == (0, 77, self.content[7 * MIB :][:512])

    def is_well(self, after: str) -> None:
        trio.run(self.serves)
        assert self.gateway.alive, after
        grown = self.resident() - self.before
        assert grown < MOST_GROWTH, f"{after}: {grown} KiB more"


@pytest.fixture
def target(make_gateway: Callable[..., GatewayProcess]) -> Target:
    return Target(make_gateway())


async def _say(path: str, data: bytes, *, enter: bool) -> None:
    async with Raw(path) as bad:
        await (bad.enter() if enter else bad.hello())
        with contextlib.suppress(trio.BrokenResourceError):
            await bad.stream.send_all(data)
            await bad.stream.send_eof()
        await bad.hangs_up()


def test_the_whole_table_on_a_daemon(target: Target) -> None:
    """Each case on the socket of a real disk; after each a good client is served, and memory is bounded."""
    table = [(name, data, False) for name, data in ENDS.items()]
    table += [(name, option(number, data), False) for name, (number, data, _) in REFUSED.items()]
    table += [(name, data, True) for name, (data, _) in ERRORS.items()]
    table += [(name, data, True) for name, data in BREAKS.items()]
    for name, data, enter in table:
        trio.run(partial(_say, target.path, data, enter=enter))
        target.is_well(name)
    assert trio.run(_reads_first_block, target.path) != bytes(512)
    assert len(table) > 70


async def _reads_first_block(path: str) -> bytes:
    async with Raw(path) as good:
        await good.enter()
        await good.send(request(0, 4 * MIB, 512))
        return (await good.simple(512))[2]


def test_floods_on_a_daemon(target: Target) -> None:
    """Queued reads that nobody takes, writes that stop half-way, connections that say nothing: then they hang up."""

    async def reads(bad: Raw) -> None:
        await bad.enter()
        with trio.move_on_after(1):
            await bad.stream.send_all(request(0, 0, MIB) * 50_000)

    async def halves(bad: Raw) -> None:
        await bad.enter()
        await bad.send(request(1, 0, 32 * MIB, payload=bytes(100_000)))

    async def idle(bad: Raw) -> None:
        await bad.receive(18)

    async def many(what: Callable[[Raw], Awaitable[None]], count: int, most: int) -> None:
        async def one(task_status: trio.TaskStatus[None]) -> None:
            async with Raw(target.path) as bad:
                with contextlib.suppress(EOFError, trio.BrokenResourceError):
                    await what(bad)
                task_status.started()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                await nursery.start(one)
            if count < 100:
                await target.serves()
                grown = target.resident() - target.before
                assert grown < most, f"{what.__name__}, while they are there: {grown} KiB more"
            nursery.cancel_scope.cancel()

    each = Limits().inflight_bytes >> 10
    for what, count, most in ((reads, 3, 3 * each), (halves, 4, MOST_GROWTH), (idle, 120, 0)):
        trio.run(many, what, count, most)
        target.is_well(what.__name__)


def test_random_streams_on_a_daemon(target: Target) -> None:
    """As above, but with everything behind it: origin, cache, modes."""

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(STREAMS, st.integers(0, 2))
    def check(pieces: list[bytes], stage: int) -> None:
        stages = (Raw.hello, Raw.enter, lambda raw: Raw.enter(raw, structured=True))
        trio.run(throw, target.path, stages[stage], pieces)

    check()
    assert target.gateway.alive
    grown = target.resident() - target.before
    assert grown < MOST_GROWTH + (32 << 10), f"{grown} KiB more"  # the image was read, and written
    status = target.gateway.status("disk")
    assert status["state"] == "ready"
