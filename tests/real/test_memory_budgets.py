# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Floods over several disks: what they may hold together is bounded, and each disk goes on."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

import forebay_nbd.server.slow
from forebay_nbd import Budget, Budgets, Limits
from forebay_nbd.server.limits import OWN_CONNECTIONS
from real.nbd_memory import MemoryExport, Running, serving
from real.nbd_raw import Raw, request, still_serves, until

MIB = 1 << 20
DISKS = 3
SIZE = 2 * MIB
"""Bytes of a disk: as many extents as a reply may have, at least."""


@asynccontextmanager
async def several(
    directory: Path, limits: Limits, budgets: Budgets, make: Callable[[], MemoryExport]
) -> AsyncIterator[list[Running]]:
    """Servers of as many disks, each on a socket of its own."""
    async with AsyncExitStack() as stack:
        found = []
        for n in range(DISKS):
            (directory / str(n)).mkdir()
            one = serving(directory / str(n), make(), limits, budgets)
            found.append(await stack.enter_async_context(one))
        yield found


async def asks(path: str, what: bytes, task_status: trio.TaskStatus[None]) -> None:
    """A client that sends this, and takes no reply."""
    async with Raw(path) as client:
        await client.hello()
        await client.send(ENTER)
        task_status.started()
        await client.send(what)
        await trio.sleep_forever()


def _enter() -> bytes:
    from real.nbd_hostile_cases import contexts
    from real.nbd_raw import go, option

    return option(8) + option(10, contexts(b"base:allocation")) + go(b"")


ENTER = _enter()
"""Into transmission, with structured replies and a context."""


async def flood(nursery: trio.Nursery, disks: list[Running], what: bytes, connections: int) -> None:
    for disk in disks:
        for _ in range(connections):
            await nursery.start(partial(asks, disk.path, what))


async def test_block_status_of_many_disks_has_one_budget(short_path: Path) -> None:
    limits = Limits(own_bytes=0, stall_seconds=0.1)
    budgets = Budgets(status=Budget(4 * MIB))

    def make() -> MemoryExport:
        export = MemoryExport(size=SIZE, slow=True)
        export.memory[:] = b"d" * SIZE
        return export

    async with several(short_path, limits, budgets, make) as disks, trio.open_nursery() as nursery:
        await flood(nursery, disks, request(7, 0, SIZE) * 50, 8)
        await until(lambda: budgets.status.used >= DISKS * MIB)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
            assert budgets.status.used <= 4 * MIB
        assert sum(one.export.waiting for one in disks) == DISKS, "a quarter of it each"
        assert budgets.requests.used == 0, "others have all of theirs"
        for one in disks:
            one.export.gate.set()
            one.export.slow = False
        for one in disks:
            await still_serves(one.path)
        nursery.cancel_scope.cancel()
    assert budgets.status.used == budgets.status.own == 0


async def test_writes_to_many_disks_have_one_budget(short_path: Path) -> None:
    """Clients that stop in the middle of a write: what they have announced is held for them."""
    limits = Limits(own_bytes=0, stall_seconds=3600.0)
    budgets = Budgets(requests=Budget(4 * MIB))
    make = partial(MemoryExport, size=SIZE)
    async with several(short_path, limits, budgets, make) as disks, trio.open_nursery() as nursery:
        await flood(nursery, disks, request(1, 0, MIB, payload=bytes(300_000)), 4)
        await until(lambda: budgets.requests.used >= 4 * MIB)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
            assert budgets.requests.used <= 4 * MIB
        nursery.cancel_scope.cancel()
    assert budgets.requests.used == budgets.requests.own == 0


async def test_connections_to_many_disks_have_one_budget(short_path: Path) -> None:
    """Four of each disk are its own; the rest is shared, and no disk gets more than a quarter of that."""
    limits = Limits()
    room = 8
    budgets = Budgets(connections=Budget(room * limits.connection_bytes))
    async with several(short_path, limits, budgets, MemoryExport) as disks:
        async with AsyncExitStack() as stack:
            for one in disks:
                for _ in range(30):
                    client = await stack.enter_async_context(Raw(one.path))
                    try:
                        await client.enter()
                    except (EOFError, trio.BrokenResourceError):
                        break
                assert len(one.server.connections) == OWN_CONNECTIONS + room // 4
                assert budgets.connections.used <= budgets.connections.limit
        await until(lambda: not any(one.server.connections for one in disks))
        for one in disks:
            await still_serves(one.path)
    assert budgets.connections.used == budgets.connections.own == 0


async def test_a_disk_whose_neighbours_have_taken_all_gets_its_own_connections(
    short_path: Path,
) -> None:
    budgets = Budgets(connections=Budget(0))
    async with several(short_path, Limits(), budgets, MemoryExport) as disks:
        for one in disks:
            await still_serves(one.path)
            await one.stop()


async def test_requests_of_all_connections_of_a_disk_have_a_bound(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they wait for may come for all of them at once: others have their turn after that."""
    monkeypatch.setattr(forebay_nbd.server.slow, "SERVER_REQUESTS", 20)
    make = partial(MemoryExport, slow=True)
    async with (
        several(short_path, Limits(), Budgets(), make) as disks,
        trio.open_nursery() as nursery,
    ):
        await flood(nursery, disks[:1], request(3) * 64, 10)
        [disk, other, _] = disks
        other.export.slow = False
        await until(lambda: disk.export.waiting >= 20)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        assert disk.export.waiting <= 20 + 10, "and one of each connection that has none yet"
        await still_serves(other.path)
        disk.export.gate.set()
        disk.export.slow = False
        await still_serves(disk.path)
        nursery.cancel_scope.cancel()
