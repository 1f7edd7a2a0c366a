# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A READ of what is being fetched for another client waits without a task, and is answered whatever becomes of that."""

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

import forebay_fast
from forebay.client import Client
from forebay_nbd import Budgets, Buffer, Limits
from forebay_nbd.server.budget import Budget
from forebay_nbd.server.phase import Phase
from real.gateway_process import GatewayProcess
from real.nbd_memory import MemoryExport, Running, serving
from real.nbd_raw import Raw, answers, request, until
from real.processes import nbdkit, random_image

pytestmark = pytest.mark.skipif(not forebay_fast.serves(), reason="Python has a task for each")

DATA = b"data"
MANY = 90


@dataclass
class Fetched(MemoryExport):
    """A disk that is `away`: what is read of it then has to be waited for."""

    away: bool = True
    only_waiting: bool = False
    """What is read is shared once somebody waits for it."""
    wakes: list[Callable[[], None]] = field(default_factory=list)

    def read_now(self, offset: int, length: int) -> Buffer | None:
        return None if self.away else super().read_now(offset, length)

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        is_shared = bool(self.waiting) or not self.only_waiting
        if is_shared:
            self.wakes.append(wake)
        return is_shared

    def land(self) -> None:
        """What was fetched is there, and those who wait are told."""
        self.away = False
        self.tell()

    def tell(self) -> None:
        for wake in self.wakes:
            wake()


@contextlib.asynccontextmanager
async def joined(path: Path) -> AsyncIterator[tuple[Fetched, Running, Raw]]:
    """A client whose READ waits for a fetch."""
    export = Fetched()
    export.memory[: len(DATA)] = DATA
    async with serving(path, export) as running, Raw(running.path) as client:
        await client.enter()
        await client.send(request(0, 0, len(DATA), cookie=1))
        await until(lambda: len(export.wakes) == 1)
        yield export, running, client


async def test_it_is_answered_when_the_fetch_has_ended_and_has_no_task(short_path: Path) -> None:
    async with joined(short_path) as (export, _, client):
        export.land()
        assert (await answers(client, {1: len(DATA)}))[1] == DATA
        assert export.log == []


async def test_one_that_is_not_there_then_gets_a_task_and_does_not_wait_again(
    short_path: Path,
) -> None:
    async with joined(short_path) as (export, _, client):
        export.tell()
        assert (await answers(client, {1: len(DATA)}))[1] == DATA
        assert export.log == ["read 0 4"]
        assert len(export.wakes) == 1


async def test_what_comes_behind_it_does_not_wait_for_it(short_path: Path) -> None:
    async with joined(short_path) as (export, _, client):
        await client.send(request(3, cookie=2))
        assert (await answers(client, {1: len(DATA), 2: 0})).keys() == {1, 2}
        assert sorted(export.log) == ["flush", "read 0 4"]
        export.land()  # of which nobody has any use
        await client.send(request(0, 0, len(DATA), cookie=3))
        assert (await answers(client, {3: len(DATA)}))[3] == DATA


async def test_a_late_call_wakes_no_later_read_for_good(short_path: Path) -> None:
    async with joined(short_path) as (export, _, client):
        await client.send(request(3, cookie=2))
        await answers(client, {1: len(DATA), 2: 0})
        stale = export.wakes[0]
        await client.send(request(0, 0, len(DATA), cookie=3))
        await until(lambda: len(export.wakes) == 2)
        stale()
        assert (await answers(client, {3: len(DATA)}))[3] == DATA


async def test_a_client_that_leaves_meanwhile_is_gone(short_path: Path) -> None:
    async with joined(short_path) as (export, running, client):
        await client.stream.aclose()
        await until(lambda: not running.server.connections)
        export.land()


async def test_it_is_answered_at_shutdown(short_path: Path) -> None:
    async with joined(short_path) as (_, running, client), trio.open_nursery() as nursery:
        nursery.start_soon(running.stop)
        assert (await answers(client, {1: len(DATA)}))[1] == DATA


async def test_it_moves_to_another_process(short_path: Path) -> None:
    async with joined(short_path) as (export, running, client):
        (connection,) = running.server.connections
        connection.suspend()
        await until(lambda: not running.server.connections)
        assert connection.phase is Phase.SUSPENDED
        assert connection.session is not None
        assert connection.session.unparsed == request(0, 0, len(DATA), cookie=1)
        export.land()
        moved = socket.socket(fileno=connection.sock.detach())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.server.resume, moved, connection.session)
            assert (await answers(client, {1: len(DATA)}))[1] == DATA
            await client.send(request(2))


@contextlib.asynccontextmanager
async def crowd(path: Path, export: Fetched) -> AsyncIterator[list[Raw]]:
    """More clients than are served in one turn of the loop, at rest."""
    limits, budgets = Limits(connections=2 * MANY), Budgets(connections=Budget(1 << 30))
    async with (
        serving(path, export, limits, budgets) as running,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = []
        for _ in range(MANY):
            clients.append(await stack.enter_async_context(Raw(running.path)))
            await clients[-1].enter()
        await trio.testing.wait_all_tasks_blocked()
        yield clients


def send_all(clients: list[Raw], cookie: int) -> None:
    """A READ of each client, all before the loop looks again."""
    for client in clients:
        socket.socket.send(client.stream.socket._sock, request(0, 0, 4, cookie=cookie))  # type: ignore[attr-defined]


async def test_those_who_ask_at_the_same_instant_find_the_fetch_of_the_first(
    short_path: Path,
) -> None:
    """Before the task of the first has begun it: they are put off, and not for ever."""
    export = Fetched(slow=True, only_waiting=True)
    async with crowd(short_path, export) as clients:
        send_all(clients, 1)
        await until(lambda: export.waiting + len(export.wakes) >= MANY)
        assert export.waiting <= 3
        export.slow = export.away = False
        export.gate.set()
        export.tell()
        for client in clients:
            await answers(client, {1: 4})


@pytest.mark.parametrize("turns", range(5))
async def test_those_who_are_put_off_may_go_on_asking(short_path: Path, turns: int) -> None:
    async with crowd(short_path, Fetched(only_waiting=True)) as clients:
        send_all(clients, 1)
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        send_all(clients, 2)
        for client in clients:
            await answers(client, {1: 4, 2: 4})


def test_guests_of_a_daemon_share_a_fetch_and_each_has_counted_what_it_waited_for(
    tmp_path: Path, gateway: GatewayProcess
) -> None:
    nbd = pytest.importorskip("nbd")
    content = random_image(tmp_path / "image.raw", 1 << 20, seed=1)
    origin = nbdkit(tmp_path / "o.sock", "file", str(tmp_path / "image.raw"))
    daemon = Client(str(gateway.control))
    names, guests = [f"vm{n}" for n in range(8)], []
    for name in names:
        settings = {"name": name, "image": origin.uri, "overlay": True, "preload": "0"}
        daemon.post("/disks", settings)
        guests.append(nbd.NBD())
        guests[-1].connect_uri(gateway.uri(name))
    found = [nbd.Buffer(65536) for _ in names]
    origin.pause()
    asked = [one.aio_pread(data, 65536) for one, data in zip(guests, found, strict=True)]
    for name in names:  # each waits
        while not daemon.get(f"/disks/{name}")["boot"]["waited_bytes"]:
            time.sleep(0.01)
    origin.resume()
    for one, cookie, data in zip(guests, asked, found, strict=True):
        while not one.aio_command_completed(cookie):
            one.poll(-1)
        assert data.to_bytearray() == content[65536:131072]
        one.shutdown()
    disks = [daemon.get(f"/disks/{name}") for name in names]
    assert [(disk["read_hits"], disk["read_misses"]) for disk in disks] == [(0, 1)] * len(names)
    assert sum(disk["origin_read_bytes"] for disk in disks) == 65536
    counts = [{kind: of["count"] for kind, of in disk["latency"].items()} for disk in disks]
    assert [(one["hit"], one["miss"]) for one in counts] == [(0, 1)] * len(names)
    assert sum(one["origin_read"] for one in counts) == 1
    origin.stop()
