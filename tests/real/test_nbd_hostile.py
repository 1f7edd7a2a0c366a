"""Clients that mean no good, after the CVE table of NBD servers: each hurts its own connection and nothing else."""

import errno
import resource
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay_nbd import Limits
from real.nbd_memory import MemoryExport, Running, serving
from real.nbd_raw import Raw, go, option, request, still_serves, until

MIB = 1 << 20
QUICK = Limits(handshake_seconds=0.3, stall_seconds=0.05)
"""For tests in which somebody has to be given up."""


@pytest.fixture
async def running(short_path: Path) -> AsyncIterator[Running]:
    async with serving(short_path) as server:
        yield server


def contexts(*queries: bytes, name: bytes = b"") -> bytes:
    body = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return body + b"".join(struct.pack(">I", len(query)) + query for query in queries)


# Sent after the flags; the server has to hang up.
ENDS = {
    "bad option magic": b"IHAVEOPX" + bytes(8),
    "option of 4 GiB (CVE-2017-15119)": option(7, b"", 0xFFFFFFFF),
    "unknown option of 4 GiB": option(99, b"", 0xFFFFFFFF),
    "option above 8 KiB": option(99, bytes(8193)),
    "export name of 4 GiB (CVE-2022-26495)": option(1, b"", 0xFFFFFFFF),
    "export name of 4097 bytes (CVE-2017-15118)": option(1, b"x" * 4097),
    "export name with NUL": option(1, b"disk\0"),
    "export name that is not UTF-8": option(1, b"\xff\xff"),
    "unknown export by EXPORT_NAME (CVE-2013-7441)": option(1, b"nobody"),
    "format string as a name": option(1, b"%3000d%n%s"),
    "path as a name": option(1, b"../../etc/passwd"),
    "flood of options": option(3) * 33,
    "abort (041e32b8)": option(2),
    "garbage": bytes(range(256)) * 8,
}


@pytest.mark.parametrize("data", ENDS.values(), ids=ENDS.keys())
async def test_what_ends_a_handshake(running: Running, data: bytes) -> None:
    async with Raw(running.path) as bad:
        await bad.hello()
        await bad.send(data)
        await bad.hangs_up()
    await still_serves(running.path)


# Refused, and the next option is understood: (option, its data, reply type).
REFUSED = {
    "starttls": (5, b"", 2**31 + 2),
    "starttls with data": (5, b"x", 2**31 + 3),
    "peek": (4, b"payload", 2**31 + 1),
    "extended headers": (11, b"", 2**31 + 1),
    "unknown with payload (282c3b03)": (0xFFFFFFFF, bytes(8192), 2**31 + 1),
    "list with data": (3, b"x", 2**31 + 3),
    "structured with data": (8, b"x", 2**31 + 3),
    "go without data": (7, b"", 2**31 + 3),
    "go, name longer than the option (CVE-2022-26496)": (7, b"\0\0\x0f\xffdisk\0\0", 2**31 + 3),
    "go, name of 4 GiB": (7, b"\xff\xff\xff\xff\0\0", 2**31 + 3),
    "info, more requests than data": (6, b"\0\0\0\0\xff\xff", 2**31 + 3),
    "go, missing name of 4096 bytes (CVE-2020-10761)": (7, b"\0\0\x10\0" + b"x" * 4096 + b"\0\0", 2**31 + 6),
    "info of nothing": (6, b"\0\0\0\2no\0\0", 2**31 + 6),
    "contexts before structured replies": (10, contexts(b"base:allocation"), 2**31 + 3),
    "list contexts before structured replies": (9, contexts(), 2**31 + 3),
}  # fmt: skip


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


# In transmission: what is answered with an error and goes on.
ERRORS = {
    "unknown command": (request(99, 0, 512), errno.EINVAL),
    "resize": (request(8, 0, 512), errno.EINVAL),
    "unknown flag": (request(0, 0, 512, flags=0x8000), errno.EINVAL),
    "flag of another command": (request(3, flags=8), errno.EINVAL),
    "DF without structured replies": (request(0, 0, 512, flags=4), errno.EINVAL),
    "read of 4 GiB": (request(0, 0, 0xFFFFFFFF), errno.EINVAL),
    "read beyond the end": (request(0, 8 * MIB, 1), errno.EINVAL),
    "read at 2^64-1": (request(0, 2**64 - 1, 0xFFFFFFFF), errno.EINVAL),
    "write beyond the end": (request(1, 8 * MIB - 1, 2, payload=b"ab"), errno.ENOSPC),
    "large write at 2^63": (request(1, 2**63, MIB, payload=bytes(MIB)), errno.ENOSPC),
    "trim of 4 GiB": (request(4, 0, 0xFFFFFFFF), errno.EINVAL),
    "zero at 2^64-1": (request(6, 2**64 - 1, 1), errno.ENOSPC),
    "cache of 4 GiB": (request(5, 1, 0xFFFFFFFF), errno.EINVAL),
    "flush with a range": (request(3, 0, 512), errno.EINVAL),
    "block status without contexts": (request(7, 0, 512), errno.EINVAL),
}


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


@pytest.mark.parametrize(
    "data",
    [
        bytes(28),
        request(0)[:27],
        request(1, 0, 32 * MIB + 1),
        request(1, 0, 0xFFFFFFFF),
        request(1, 0, 4096, payload=b"half"),
        request(1, 0, MIB, payload=bytes(MIB // 2)),
        b"",
        request(2) + bytes(100),
    ],
    ids=["zeros", "cut header", "32 MiB + 1", "4 GiB", "cut write", "cut large write", "nothing", "after DISC"],
)  # fmt: skip
async def test_what_ends_transmission(running: Running, data: bytes) -> None:
    async with Raw(running.path) as bad:
        await bad.enter()
        await bad.send(data)
        if data:
            await bad.stream.send_eof()
        await bad.hangs_up() if data else None
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
                assert await four.hangs_up() == b""
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


STREAMS = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
        st.builds(go, st.sampled_from([b"", b"disk", b"none"]), st.sampled_from([6, 7])),
        st.builds(
            request,
            st.integers(0, 9),
            st.integers(0, 9 * MIB),
            st.sampled_from([0, 1, 512, 4096, 70_000, MIB, 0xFFFFFFFF]),
            st.sampled_from([0, 0, 1, 2, 4, 8, 16, 255]),
            st.integers(0, 5),
            st.binary(max_size=600),
        ),
        st.builds(request, st.just(1), st.just(0), st.just(MIB), payload=st.just(bytes(200_000))),
    ),
    max_size=12,
)


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
