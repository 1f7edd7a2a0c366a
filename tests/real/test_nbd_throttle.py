# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A connection to an export with rates: what waits, what does not, and what can be done meanwhile."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest
import trio

import forebay_fast
from forebay.disk.rates.rates import Limits as Rate
from forebay.disk.rates.rates import Rates
from forebay_nbd import Limits, Phase
from forebay_nbd.throttle.words import LEFT, REQUESTS
from real.nbd_memory import MemoryExport, Running, serving
from real.nbd_raw import Raw, request, until

MIB = 1 << 20
NONE = Rate()
SLOW = Rate(iops=1)
"""So slow that nothing passes while a test runs, once `spend` was called."""
FLUSH, TRIM, DISC = 3, 4, 2


@pytest.fixture(params=["compiled", "python"], autouse=True)
def core(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "compiled" and not forebay_fast.serves():
        pytest.skip("this process serves without the compiled core")
    forebay_fast.use(request.param == "compiled")
    yield
    forebay_fast.use(True)


class Throttled(MemoryExport):
    """A disk in memory with rates."""

    throttle: Rates  # type: ignore[assignment]

    def __init__(self, rate: Rate = NONE, **given: object) -> None:
        super().__init__(**given)  # type: ignore[arg-type]
        self.throttle = Rates(self.size, lambda: True)
        self.throttle.set(rate)


@asynccontextmanager
async def client_of(
    directory: Path, export: Throttled, limits: Limits | None = None
) -> AsyncIterator[tuple[Running, Raw]]:
    async with serving(directory, export, limits) as running, Raw(running.path) as client:
        await client.enter()
        yield running, client


async def ask(client: Raw) -> None:
    """Make one request, and get its answer."""
    await client.send(request(0, 0, 512, cookie=99))
    assert (await client.simple(512))[1] == 99


async def spend(client: Raw, export: Throttled) -> None:
    """Use what SLOW lets pass in minutes."""
    await ask(client)
    export.throttle._requests.use(500)


async def test_requests_come_as_fast_as_the_rate(short_path: Path) -> None:
    began = trio.current_time()
    export = Throttled(Rate(iops=500))
    async with client_of(short_path, export) as (_, client):
        await client.send(request(0, 0, 512) * 500)
        for _ in range(500):
            await client.simple(512)
        assert trio.current_time() - began >= 0.88  # 50 at once, 450 in 0.9 s
        assert export.throttle.waits
        assert 0.5 < export.throttle.seconds < 60


async def test_bytes_count_of_large_writes_too(short_path: Path) -> None:
    began = trio.current_time()
    export = Throttled(Rate(bps=4 * MIB))
    async with client_of(short_path, export) as (_, client):
        for cookie in range(3):
            await client.send(request(1, 0, MIB, cookie=cookie, payload=bytes([cookie]) * MIB))
            assert await client.simple() == (0, cookie, b"")
        # the first with the full bucket, the others when 2 MiB are paid for, but for the bucket
        assert trio.current_time() - began >= 0.4
        assert export.memory[:MIB] == b"\2" * MIB


@pytest.mark.parametrize("slow", [False, True])
async def test_a_flush_does_not_wait_nor_do_requests_hold_memory(
    short_path: Path, slow: bool
) -> None:
    export = Throttled(SLOW)
    async with client_of(short_path, export) as (running, client):
        await spend(client, export)
        export.slow = slow
        export.gate.set()
        await client.send(request(0, 0, MIB) * 3000 + request(1, 0, 4096, payload=bytes(4096)) * 9)
        await client.send(request(FLUSH, cookie=7) * 2)
        for _ in range(2):
            assert await client.simple() == (0, 7, b"")
        await client.send(request(0, 0, 512) + request(FLUSH, cookie=8))
        assert await client.simple() == (0, 8, b"")
        assert export.log == ["flush"] * 3
        assert running.server._budget.used == running.server._budget.requests == 0


async def ask_up_to_the_limit(client: Raw, export: Throttled) -> None:
    """Of a core that serves: nothing of what it lets in is asked for in Python, and all of it is counted."""
    rates = export.throttle
    with mock.patch.object(rates, "admit", wraps=rates.admit) as python:
        for cookie in range(10):
            await ask(client)
            await client.send(request(1, 0, 4096, cookie=cookie, payload=bytes(4096)))
            assert await client.simple() == (0, cookie, b"")
        assert python.call_count == 0
        assert rates.words[REQUESTS + LEFT] < 20
        await client.send(request(0, 0, 512, cookie=3) * 30)
        await until(lambda: bool(rates._waiting))
        assert python.call_count
    assert rates.waits == 1
    for _ in range(10):
        assert (await client.simple(512))[:2] == (0, 3)


async def test_below_its_limits_a_disk_is_served_by_the_core(short_path: Path) -> None:
    if not forebay_fast.serves():
        pytest.skip("this process serves without the compiled core")
    export = Throttled(Rate(iops=1, iops_burst=30))
    async with client_of(short_path, export) as (_, client):
        await ask_up_to_the_limit(client, export)


async def test_a_core_that_asks_nobody_is_found(short_path: Path) -> None:
    if not forebay_fast.serves() or not forebay_fast.core.has_plants:
        pytest.skip("no core, or one compiled without plants: make setup")
    export = Throttled(Rate(iops=1, iops_burst=30))
    async with client_of(short_path, export) as (_, client):
        with (
            mock.patch.object(forebay_fast.core, "bugs", frozenset({"asks nobody"})),
            pytest.raises(AssertionError),
        ):
            await ask_up_to_the_limit(client, export)


async def test_all_look_again_when_the_limit_is_raised(short_path: Path) -> None:
    export = Throttled(SLOW)
    async with client_of(short_path, export) as (running, client):
        await spend(client, export)
        await client.send(request(0, 0, 512, cookie=1) * 100)
        async with Raw(running.path) as other:
            await other.enter()
            await other.send(request(0, 0, 512, cookie=2) * 100)
            await until(lambda: len(export.throttle._waiting) == 2)
            export.throttle.set(Rate(iops=100_000))
            for one, cookie in ((client, 1), (other, 2)):
                for _ in range(100):
                    assert (await one.simple(512))[:2] == (0, cookie)
            export.throttle.set(NONE)
            await ask(client)
            export.throttle.set(Rate(iops=1, iops_burst=20))
            await ask(client)
            assert export.throttle.is_on


async def test_a_limit_reaches_a_connection_at_rest_and_leaves_it_again(short_path: Path) -> None:
    export = Throttled()
    async with client_of(short_path, export) as (_, client):
        for _ in range(3):
            await ask(client)
            await trio.sleep(0.01)
            export.throttle.set(SLOW)
            await spend(client, export)
            await client.send(request(0, 0, 512, cookie=3))
            await until(lambda: bool(export.throttle._waiting))
            export.throttle.set(NONE)
            assert (await client.simple(512))[1] == 3
            assert not export.throttle._waiting


async def test_what_waits_for_room_or_for_the_export_goes_on_when_a_limit_comes(
    short_path: Path,
) -> None:
    export = Throttled(slow=True)
    async with client_of(short_path, export, Limits(inflight_requests=2)) as (_, client):
        await client.send(request(0, 0, 512, cookie=1) * 5)
        await until(lambda: export.waiting == 2)
        export.throttle.set(Rate(iops=10))
        await trio.sleep(0.05)
        export.gate.set()
        for _ in range(5):
            assert (await client.simple(512))[:2] == (0, 1)


async def test_a_large_payload_that_is_under_way_arrives_when_a_limit_comes(
    short_path: Path,
) -> None:
    export = Throttled()
    async with client_of(short_path, export) as (_, client):
        data = request(1, 0, MIB, payload=b"x" * MIB)
        await client.send(data[: MIB // 2])
        await trio.sleep(0.05)
        export.throttle.set(SLOW)
        await client.send(data[MIB // 2 :])
        assert await client.simple() == (0, 1, b"")
        await spend(client, export)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, data + request(FLUSH, cookie=5))
            await until(lambda: bool(export.throttle._waiting))
            export.throttle.set(Rate(iops=5000))
        assert {(await client.simple())[1] for _ in range(2)} == {1, 5}


@pytest.mark.parametrize("full", [False, True])
async def test_a_client_that_hangs_up_while_it_waits_is_gone(short_path: Path, full: bool) -> None:
    export = Throttled(SLOW)
    async with client_of(short_path, export) as (_, client):
        await spend(client, export)
        await client.send(request(0, 0, 512) * (9500 if full else 3))
        await until(lambda: bool(export.throttle._waiting))
        await client.stream.aclose()
        await until(lambda: export.clients == 0)
        assert not export.throttle._waiting
        assert not export.throttle._connections


async def test_one_that_sends_nothing_more_still_gets_its_answers(short_path: Path) -> None:
    export = Throttled(Rate(iops=20))
    async with client_of(short_path, export) as (_, client):
        await client.send(request(0, 0, 512, cookie=4) * 6)
        await client.stream.send_eof()
        for _ in range(6):
            assert (await client.simple(512))[:2] == (0, 4)
        assert await client.hangs_up() == b""


async def test_a_disconnect_waits_only_for_what_was_asked_before(short_path: Path) -> None:
    export = Throttled(SLOW)
    async with client_of(short_path, export) as (_, client):
        await spend(client, export)
        await client.send(request(DISC))
        assert await client.hangs_up() == b""
    export = Throttled(Rate(iops=20))
    directory = short_path / "other"
    directory.mkdir()
    async with client_of(directory, export) as (_, client):
        await client.send(request(0, 0, 512) * 5 + request(DISC))
        assert len(await client.hangs_up()) == 5 * (16 + 512)


async def test_a_server_that_stops_does_not_wait_for_what_waits(short_path: Path) -> None:
    export = Throttled(SLOW)
    async with client_of(short_path, export) as (running, client):
        await spend(client, export)
        await client.send(request(0, 0, 512) * 50)
        await until(lambda: bool(export.throttle._waiting))
        with trio.fail_after(10):
            await running.stop()
        assert await client.hangs_up() == b""
        assert not export.throttle._connections


async def test_the_protocol_is_looked_at_as_ever(short_path: Path) -> None:
    export = Throttled(Rate(iops=1000))
    async with client_of(short_path, export) as (_, client):
        await client.send(request(77, 0, 512, cookie=1) + request(0, 1 << 40, 512, cookie=2))
        assert await client.simple() == (22, 1, b"")
        assert await client.simple() == (22, 2, b"")
        await client.send(request(TRIM, 0, 512, cookie=3))
        assert await client.simple() == (0, 3, b"")
        await client.send(b"\xff" * 100)
        assert await client.hangs_up() == b""


async def test_others_are_served_while_one_asks_for_thousands_of_requests(
    short_path: Path,
) -> None:
    """Another disk of the same loop: none of its requests waits for a turn of the one that floods its own."""
    hostile, good = Throttled(Rate(iops=1000, bps=MIB)), Throttled()
    first, second = short_path / "a", short_path / "b"
    first.mkdir()
    second.mkdir()
    async with client_of(first, hostile) as (running, flood), client_of(second, good) as (_, one):
        async with trio.open_nursery() as nursery:
            others = [Raw(running.path) for _ in range(20)]
            for other in others:
                await other.__aenter__()
                await other.enter()
            for other in (flood, *others):
                nursery.start_soon(other.send, request(0, 0, 4096) * 9000)
            await until(lambda: len(hostile.throttle._waiting) == 21)
            before = hostile.now
            for _ in range(500):
                await ask(one)
            assert good.now == 500
            assert hostile.now - before < 5000
            assert not good.throttle.waits
            nursery.cancel_scope.cancel()
        for other in others:
            await other.stream.aclose()


async def test_what_waits_is_handed_over_and_waits_there(short_path: Path) -> None:
    export = Throttled(SLOW)
    async with client_of(short_path, export) as (running, client):
        await spend(client, export)
        await client.send(request(0, 0, 512, cookie=1) * 30 + request(0, 0, 512, cookie=2)[:11])
        await until(lambda: bool(export.throttle._waiting))
        (connection,) = running.server.connections
        connection.suspend()
        await until(lambda: not running.server.connections)
        assert connection.phase is Phase.SUSPENDED
        session = connection.session
        assert session is not None
        assert session.unparsed == request(0, 0, 512, cookie=1) * 30 + request(0, 0, 512)[:11]
        later = Throttled(Rate(iops=1, iops_burst=10))
        directory = short_path / "next"
        directory.mkdir()
        async with serving(directory, later) as next_one, trio.open_nursery() as nursery:
            moved = socket.socket(fileno=connection.sock.detach())
            nursery.start_soon(next_one.server.resume, moved, session)
            for _ in range(10):
                assert (await client.simple(512))[:2] == (0, 1)
            await until(lambda: bool(later.throttle._waiting))
            assert later.now == 10
            later.throttle.set(Rate(iops=1000))
            await client.send(request(0, 0, 512, cookie=2)[11:])
            for cookie in [1] * 20 + [2]:
                assert (await client.simple(512))[:2] == (0, cookie)
            await client.send(request(DISC))
